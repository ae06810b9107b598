"""The term of Hungarian-matched logits and boxes."""

from __future__ import annotations

from torch import Tensor

from detr_kd_losses._options import HEADS, Rules
from detr_kd_losses.heads import Heads
from detr_kd_losses.losses.logits import RULES, ClassLoss, hungarian_distillation_loss, validate_class_loss
from detr_kd_losses.paired_term import Matching, Negatives, PairedTerm, Weighting
from detr_kd_losses.stages import StageMap
from detr_kd_losses.step import Step

__all__ = ["LogitsTerm"]

_LOSS_RULES = {name: rule for name, rule in RULES.items() if name not in HEADS}
_RULES: Rules = {**PairedTerm.rules, **_LOSS_RULES}


class LogitsTerm(PairedTerm):
    """Classes and boxes of matched queries: :func:`match_teacher`, then :func:`hungarian_distillation_loss`.

    Each student layer learns from its teacher layer. ``loss_kd_class``, ``loss_kd_bbox``, ``loss_kd_giou``.

    Args:
        weight: Weight of the term.
        prefix: Where its names begin.
        matching: ``"positives_first"``: the teacher queries that have a target choose first, by class and box, and
            teach both; the others share the student queries that are left, by box, and teach it. ``"joint"``: all are
            matched together and teach class and box, as in the paper's public code; where the teacher has more
            queries than the student, most positive ones are left out, and yet in our experiments this gains more, and
            takes nothing from features. ``"targets"``: a student query learns from the teacher query of its own
            target (:func:`match_through_targets`), at a small part of the cost.
        negatives: What becomes of the teacher queries without a target: ``"by_box"``, they share the student queries
            that are left, by box; ``"none"``, they teach nothing. None: as the matching has it, ``"none"`` for
            ``"targets"``. A joint matching makes no difference, and takes None alone.
        weighting: How much a teacher query counts: ``"uniform"``, all the same; ``"confidence"``
            (:func:`confidence_weight`, KD-DETR's); ``"overlap"`` (:func:`overlap_weight`, QSKD's); ``"localization"``
            (:func:`localization_weight`, D-FINE's).
        cost_class: Weight of the class in the matching cost.
        cost_bbox: Weight of the L1 distance in the matching cost.
        cost_giou: Weight of the negative GIoU in the matching cost.
        backend: Solver of the matching, by name (:func:`linear_sum_assignment`).
        stage_map: Which teacher layer teaches which student layer (:func:`select_stages`).
        class_loss: ``"kl"``, or for sigmoid students ``"bce"``.
        temperature: Divisor of both logits in the class term.
        weight_class: Weight of the class term.
        weight_bbox: Weight of the L1 distance.
        weight_giou: Weight of 1 - GIoU.
        weight_negative: Weight of the negative pairs' box terms.
        weight_negative_class: Weight of the negative pairs' class term, on top of `weight_class`.
        sync_normalizer: Whether the numbers of pairs are averaged over replicas.

    Examples:
        >>> LogitsTerm(temperature=2.0).names
        ('loss_kd_class', 'loss_kd_bbox', 'loss_kd_giou')

    References:
        Chang et al., "DETRDistill", ICCV 2023, arXiv:2211.10156, Eq. 3-5.
    """

    parts = ("class", "bbox", "giou")
    shares_counts = True
    rules = _RULES

    def __init__(
        self,
        *,
        weight: float = 1.0,
        prefix: str = "loss_kd_",
        matching: Matching = "positives_first",
        negatives: Negatives | None = None,
        weighting: Weighting = "uniform",
        cost_class: float = 1.0,
        cost_bbox: float = 5.0,
        cost_giou: float = 2.0,
        backend: str = "auto",
        stage_map: StageMap = "even",
        class_loss: ClassLoss = "kl",
        temperature: float = 1.0,
        weight_class: float = 1.0,
        weight_bbox: float = 5.0,
        weight_giou: float = 2.0,
        weight_negative: float = 1.0,
        weight_negative_class: float = 0.0,
        sync_normalizer: bool = True,
    ) -> None:
        super().__init__(
            weight=weight,
            prefix=prefix,
            matching=matching,
            negatives=negatives,
            weighting=weighting,
            cost_class=cost_class,
            cost_bbox=cost_bbox,
            cost_giou=cost_giou,
            backend=backend,
            stage_map=stage_map,
            class_loss=class_loss,
            temperature=temperature,
            weight_class=weight_class,
            weight_bbox=weight_bbox,
            weight_giou=weight_giou,
            weight_negative=weight_negative,
            weight_negative_class=weight_negative_class,
            sync_normalizer=sync_normalizer,
        )

    def validate_heads(self, heads: Heads) -> None:
        """Raise unless the class loss is defined for the student's head."""
        validate_class_loss(self.class_loss, heads)

    def compute(self, step: Step) -> dict[str, Tensor]:
        """Match student to teacher queries and distil."""
        student, teacher = step.student, step.teacher
        assignment, positive, weight = self.pair(step)
        return hungarian_distillation_loss(
            student.logits,
            student.boxes,
            self.in_students_depth(step, teacher.logits),
            self.in_students_depth(step, teacher.boxes),
            assignment,
            teacher_positive=positive,
            teacher_weight=weight,
            **step.heads.options,
            **{name: self.call_options[name] for name in _LOSS_RULES},
        )
