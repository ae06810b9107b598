"""The term of the teacher's queries as an extra group of the student's decoder."""

from __future__ import annotations

from torch import Tensor

from detr_kd_losses._options import Rules, one_of
from detr_kd_losses.heads import DetectionClassLoss, Heads, class_loss_of
from detr_kd_losses.losses.detection import RULES
from detr_kd_losses.losses.query_group import teacher_assigned_query_loss
from detr_kd_losses.stages import StageMap, select_stages, validate_stage_map
from detr_kd_losses.step import Step
from detr_kd_losses.term import Term

__all__ = ["QueryGroupTerm"]

_RULES: Rules = {
    **Term.rules,
    "stage_map": validate_stage_map,
    **RULES,
    "class_loss": one_of(None, "focal", "cross_entropy"),
}


class QueryGroupTerm(Term):
    """The student's predictions for the teacher's queries: :func:`teacher_assigned_query_loss`.

    It needs the ``group`` of the student, and does not apply without. ``loss_kd_group_class``, ``loss_kd_group_bbox``,
    ``loss_kd_group_giou``.

    Args:
        weight: Weight of the term.
        prefix: Where its names begin.
        stage_map: Which layer of the teacher's assignment supervises which layer (:func:`select_stages`).
        class_loss: ``"focal"`` for sigmoid heads, ``"cross_entropy"`` for softmax heads. None: as the head asks for.
        alpha: Balance of the focal loss.
        gamma: Focus of the focal loss.
        no_object_weight: Weight of a query without target in the cross-entropy.
        weight_class: Weight of the class term.
        weight_bbox: Weight of the L1 distance.
        weight_giou: Weight of 1 - GIoU.
        sync_normalizer: Whether the normalisers are averaged over replicas.

    Examples:
        >>> QueryGroupTerm().names
        ('loss_kd_group_class', 'loss_kd_group_bbox', 'loss_kd_group_giou')

    References:
        Chang et al., "DETRDistill", ICCV 2023, arXiv:2211.10156, Eq. 10.
    """

    parts = ("class", "bbox", "giou")
    needs = ("group",)
    shares_counts = True
    rules = _RULES

    def __init__(
        self,
        *,
        weight: float = 1.0,
        prefix: str = "loss_kd_group_",
        stage_map: StageMap = "even",
        class_loss: DetectionClassLoss | None = None,
        alpha: float = 0.25,
        gamma: float = 2.0,
        no_object_weight: float = 0.1,
        weight_class: float = 1.0,
        weight_bbox: float = 5.0,
        weight_giou: float = 2.0,
        sync_normalizer: bool = True,
    ) -> None:
        super().__init__(
            weight=weight,
            prefix=prefix,
            stage_map=stage_map,
            class_loss=class_loss,
            alpha=alpha,
            gamma=gamma,
            no_object_weight=no_object_weight,
            weight_class=weight_class,
            weight_bbox=weight_bbox,
            weight_giou=weight_giou,
            sync_normalizer=sync_normalizer,
        )

    def validate_heads(self, heads: Heads) -> None:
        """Raise if the class loss is that of the other kind of head: it would read a class as "no object"."""
        fits = class_loss_of(heads.student)
        if self.class_loss not in (None, fits):
            msg = f"`class_loss` must be {fits!r} or None for a {heads.student} student, got {self.class_loss!r}"
            raise ValueError(msg)

    def compute(self, step: Step) -> dict[str, Tensor]:
        """Supervise the student's predictions for the teacher's queries with the teacher's assignment."""
        self.validate_heads(step.heads)
        if step.student.group is None:
            msg = "`student.group` must be given where `teacher.group` is, got None"
            raise ValueError(msg)
        if step.teacher.group is not None:
            msg = (
                "`teacher.group` must be None for the query group term, whose group has the teacher's own queries "
                "(or set its weight to 0), got predictions for others"
            )
            raise ValueError(msg)
        logits, boxes = step.student.group
        # As in the term of logits: a class that the teacher does not know is nothing that its queries could teach.
        logits = step.heads.forget_unknown_classes(logits, step.teacher.logits)
        options = {name: self.call_options[name] for name in RULES}
        if self.class_loss is None:
            options["class_loss"] = class_loss_of(step.heads.student)
        assignment = select_stages(step.of_group(step.teacher_assignment), len(logits), stage_map=self.stage_map)
        group = logits, boxes, *step.known_targets, assignment
        return teacher_assigned_query_loss(*group, query_mask=step.group_mask(), **options)
