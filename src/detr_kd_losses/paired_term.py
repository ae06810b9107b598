"""What terms over matched queries have in common: who teaches whom, and how much each teacher query counts."""

from __future__ import annotations

from functools import partial
from typing import ClassVar, Literal, NamedTuple

from torch import Tensor

from detr_kd_losses._options import Rules, one_of
from detr_kd_losses._validation import validate_not_negative
from detr_kd_losses.assignment import validate_backend
from detr_kd_losses.matching import match_rest, match_teacher
from detr_kd_losses.outputs import Predictions
from detr_kd_losses.pairs import gather_partners, match_through_targets
from detr_kd_losses.stages import select_stages, validate_stage_map
from detr_kd_losses.step import Step
from detr_kd_losses.term import Term
from detr_kd_losses.weights import confidence_weight, localization_weight, overlap_weight

__all__ = ["Matching", "Negatives", "PairedTerm", "Pairing", "Weighting"]

Matching = Literal["positives_first", "joint", "targets"]
Negatives = Literal["by_box", "none"]
Weighting = Literal["uniform", "confidence", "overlap", "localization"]


class Pairing(NamedTuple):
    """The teacher query (L, B, N) of each student query, and of the teacher's (L, B, M), in the student's depth."""

    assignment: Tensor
    positive: Tensor | None
    weight: Tensor | None


class PairedTerm(Term):
    """A term over pairs of a student query and the teacher query that teaches it, with the options of its matching."""

    rules: ClassVar[Rules] = {
        **Term.rules,
        "matching": one_of("positives_first", "joint", "targets"),
        "negatives": one_of(None, "by_box", "none"),
        "weighting": one_of("uniform", "confidence", "overlap", "localization"),
        **dict.fromkeys(("cost_class", "cost_bbox", "cost_giou"), validate_not_negative),
        "backend": validate_backend,
        "stage_map": validate_stage_map,
    }

    def in_students_depth(self, step: Step, teacher: Tensor) -> Tensor:
        """The layers of the teacher's (L_T, ...) that teach the student's."""
        return select_stages(teacher, len(step.student.logits), stage_map=self.stage_map)

    def pair(self, step: Step) -> Pairing:
        """Match student to teacher queries."""
        select = partial(self.in_students_depth, step)
        assigned, weight = select(step.teacher_assignment), self._weigh(step)
        positive = None if self.matching == "joint" else assigned >= 0
        teacher = Predictions(select(step.teacher.logits), select(step.teacher.boxes))
        match = self._match_through_targets if self.matching == "targets" else self._match_directly
        return Pairing(match(step, teacher, assigned), positive, None if weight is None else select(weight))

    def leave_out_the_single(self, step: Step, assignment: Tensor, *students: Tensor) -> list[Tensor]:
        """`assignment` (L, B, N) and what `students` (L, B, N, ...) say, of as many queries as can have a partner."""
        most = step.targets.mask.shape[-1]
        through_targets = self.matching == "targets" and self.negatives != "by_box"
        # What does not fit is for the loss to name.
        fit = all(student.shape[:3] == assignment.shape for student in students)
        if not through_targets or not fit or most >= assignment.shape[-1]:
            return [assignment, *students]
        chosen = (assignment >= 0).int().topk(most).indices
        said = [gather_partners(student.flatten(3), chosen) for student in students]
        shapes = [(*chosen.shape, *student.shape[3:]) for student in students]
        return [gather_partners(assignment, chosen), *map(Tensor.reshape, said, shapes)]

    def _weigh(self, step: Step) -> Tensor | None:
        """How much each teacher query (L_T, B, M) counts; None: all the same."""
        boxes, targets, head = step.teacher.boxes, step.known_targets, {"activation": step.heads.teacher}
        if self.weighting == "confidence":
            return confidence_weight(step.teacher_logits, **head)
        if self.weighting == "overlap":
            return overlap_weight(boxes, targets.boxes, targets.mask)
        if self.weighting == "localization":
            return localization_weight(step.teacher_logits, boxes, targets.boxes, step.teacher_assignment, **head)
        return None

    def _match_through_targets(self, step: Step, teacher: Predictions, assigned: Tensor) -> Tensor:
        """The teacher query (L, B, N) of each student query, by their targets, then by boxes."""
        assignment = match_through_targets(step.student_assignment, assigned, step.targets.mask.shape[-1])
        if self.negatives != "by_box":
            return assignment
        boxes = step.student.boxes, teacher.boxes
        weights = {"weight_bbox": self.cost_bbox, "weight_giou": self.cost_giou}
        mask = step.teacher.query_mask
        return match_rest(assignment, *boxes, assigned >= 0, teacher_mask=mask, backend=self.backend, **weights)

    def _match_directly(self, step: Step, teacher: Predictions, assigned: Tensor) -> Tensor:
        """The teacher query (L, B, N) of each student query, by what both predict."""
        if self.matching == "joint" and self.negatives is not None:
            msg = f"`negatives` must be None for a joint matching, which knows none, got {self.negatives!r}"
            raise ValueError(msg)
        positive = None if self.matching == "joint" else assigned >= 0
        assignment = match_teacher(
            step.student.logits,
            step.student.boxes,
            *teacher,
            teacher_positive=positive,
            teacher_mask=step.teacher.query_mask,
            weight_class=self.cost_class,
            weight_bbox=self.cost_bbox,
            weight_giou=self.cost_giou,
            backend=self.backend,
            **step.heads.options,
        )
        if self.negatives == "none":
            assignment = assignment.where(gather_partners(assigned, assignment) >= 0, -1)
        return assignment
