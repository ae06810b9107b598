"""The term of queries that ran through both decoders."""

from __future__ import annotations

from torch import Tensor

from detr_kd_losses._options import HEADS, Rules
from detr_kd_losses._validation import validate_same_shape
from detr_kd_losses.heads import Heads
from detr_kd_losses.losses.logits import ClassLoss, validate_class_loss
from detr_kd_losses.losses.shared_queries import RULES, SharedWeighting, shared_query_distillation_loss
from detr_kd_losses.outputs import Predictions
from detr_kd_losses.stages import StageMap, select_stages, validate_stage_map
from detr_kd_losses.step import Step
from detr_kd_losses.term import Term

__all__ = ["SharedQueryTerm"]

_LOSS_RULES = {name: rule for name, rule in RULES.items() if name not in HEADS}
_RULES: Rules = {**Term.rules, "stage_map": validate_stage_map, **_LOSS_RULES}


class SharedQueryTerm(Term):
    """Queries that ran through both decoders: :func:`shared_query_distillation_loss`.

    It needs the ``group`` of the student, and does not apply without: its predictions for the teacher's queries, which
    learn the teacher's own predictions, so that no pass is needed beyond that of the paper's third loss. Where the
    teacher has a ``group``, too, of random queries that ran through both decoders, say, the two are paired instead.
    ``loss_kd_shared_class``, ``loss_kd_shared_bbox``, ``loss_kd_shared_giou``.

    Args:
        weight: Weight of the term.
        prefix: Where its names begin.
        stage_map: Which teacher layer teaches which student layer (:func:`select_stages`). ``"last"``, as in KD-DETR:
            all layers of the student learn the best answer that there is to their query.
        weighting: ``"confidence"``: a query counts by the teacher's highest class score. ``"uniform"``: all the same.
        class_loss: ``"kl"``, or for sigmoid students ``"bce"``.
        temperature: Divisor of both logits in the class term.
        weight_class: Weight of the class term.
        weight_bbox: Weight of the L1 distance.
        weight_giou: Weight of 1 - GIoU.
        sync_normalizer: Whether the sums of weights are averaged over replicas.

    Examples:
        >>> SharedQueryTerm().names
        ('loss_kd_shared_class', 'loss_kd_shared_bbox', 'loss_kd_shared_giou')

    References:
        Wang et al., "KD-DETR", CVPR 2024, arXiv:2211.08071.
    """

    parts = ("class", "bbox", "giou")
    needs = ("group",)
    shares_counts = True
    rules = _RULES

    def __init__(
        self,
        *,
        weight: float = 1.0,
        prefix: str = "loss_kd_shared_",
        stage_map: StageMap = "last",
        weighting: SharedWeighting = "confidence",
        class_loss: ClassLoss = "kl",
        temperature: float = 1.0,
        weight_class: float = 1.0,
        weight_bbox: float = 5.0,
        weight_giou: float = 2.0,
        sync_normalizer: bool = True,
    ) -> None:
        super().__init__(
            weight=weight,
            prefix=prefix,
            stage_map=stage_map,
            weighting=weighting,
            class_loss=class_loss,
            temperature=temperature,
            weight_class=weight_class,
            weight_bbox=weight_bbox,
            weight_giou=weight_giou,
            sync_normalizer=sync_normalizer,
        )

    def validate_heads(self, heads: Heads) -> None:
        """Raise unless the class loss is defined for the student's head."""
        validate_class_loss(self.class_loss, heads)

    def compute(self, step: Step) -> dict[str, Tensor]:
        """Distil the teacher's predictions for the queries of the group into the student's."""
        group, shared = step.student.group, step.teacher.group
        if group is None:
            msg = "`student.group` must be given where `teacher.group` is, got None"
            raise ValueError(msg)
        mask = None
        if shared is None:
            mask = step.group_mask()
            shared = Predictions(*map(step.of_group, (step.teacher.logits, step.teacher.boxes)))
        queries = shared.logits.shape[1:3]
        validate_same_shape("student.group", group.logits.shape[1:3], "the teacher's queries", queries, "(B, K)")
        logits, boxes = (select_stages(tensor, len(group.logits), stage_map=self.stage_map) for tensor in shared)
        options = {name: self.call_options[name] for name in _LOSS_RULES}
        return shared_query_distillation_loss(
            group.logits, group.boxes, logits, boxes, query_mask=mask, **step.heads.options, **options
        )
