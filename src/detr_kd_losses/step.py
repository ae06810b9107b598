"""What the terms of one training step share, each part computed once, when a term first asks for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from detr_kd_losses._labels import labels_fit, nan_unless
from detr_kd_losses._options import OptionModule, Rules, one_of
from detr_kd_losses._precision import full_precision
from detr_kd_losses._validation import validate_dtype, validate_same_device, validate_same_shape
from detr_kd_losses.assignment import validate_backend
from detr_kd_losses.costs import COST_RULES
from detr_kd_losses.heads import Activation, ClassCost, Heads, class_cost_of, nothing, num_classes_of
from detr_kd_losses.losses.features.projection import Levels, as_levels, resized_mask
from detr_kd_losses.matching import match_targets
from detr_kd_losses.outputs import DetectorOutput, Predictions, Targets, validate_step, with_stages
from detr_kd_losses.pairs import gather_partners

__all__ = ["Step", "TargetMatching"]

_RULES: Rules = {**COST_RULES, "class_cost": one_of(None, "focal", "softmax"), "backend": validate_backend}


class TargetMatching(OptionModule):
    """How predictions are matched to the targets: the options of :func:`match_targets`.

    Args:
        class_cost: ``"focal"`` for sigmoid heads, ``"softmax"`` for softmax heads. None: as the head asks for.
        weight_class: Weight of the class cost.
        weight_bbox: Weight of the L1 distance of the boxes.
        weight_giou: Weight of the negative GIoU.
        alpha: Balance of the focal cost.
        gamma: Focus of the focal cost.
        backend: Solver, by name (:func:`linear_sum_assignment`).

    Examples:
        >>> predictions = Predictions(torch.zeros(1, 3, 2), torch.tensor([[[0.1] * 4, [0.5] * 4, [0.9] * 4]]))
        >>> targets = Targets(torch.tensor([[0]]), torch.full((1, 1, 4), 0.5), torch.tensor([[True]]))
        >>> TargetMatching(weight_class=1.0)(predictions, targets, "sigmoid").tolist()
        [[-1, 0, -1]]
    """

    rules = _RULES

    def __init__(
        self,
        *,
        class_cost: ClassCost | None = None,
        weight_class: float = 2.0,
        weight_bbox: float = 5.0,
        weight_giou: float = 2.0,
        alpha: float = 0.25,
        gamma: float = 2.0,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            class_cost=class_cost,
            weight_class=weight_class,
            weight_bbox=weight_bbox,
            weight_giou=weight_giou,
            alpha=alpha,
            gamma=gamma,
            backend=backend,
        )

    def forward(
        self, predictions: Predictions, targets: Targets, activation: Activation, query_mask: Tensor | None = None
    ) -> Tensor:
        """The target of each query (..., N), -1 = none, of predictions of a head with that activation."""
        class_cost = class_cost_of(activation) if self.class_cost is None else self.class_cost
        options = {**self.options, "class_cost": class_cost}
        return match_targets(*predictions, *targets, query_mask=query_mask, **options)


class Step:
    """Outputs of student and teacher for a batch, its targets, and what follows from them.

    Args:
        student: The student's outputs, with L_S layers and N queries; (B, N, ...) counts as one layer.
        teacher: The teacher's outputs, with L_T layers and M queries, of the same images.
        targets: Padded targets of the batch.
        heads: What the class logits of both mean.
        teacher_matching: How the teacher is matched to the targets.
        student_matching: How the student is matched to the targets.

    Raises:
        ValueError: If shapes or devices do not fit.
        TypeError: If an argument is not the record that it should be, or a dtype does not fit.

    Examples:
        >>> targets = Targets(torch.tensor([[1]]), torch.rand(1, 1, 4), torch.tensor([[True]]))
        >>> teacher = DetectorOutput(torch.randn(6, 1, 9, 3), torch.rand(6, 1, 9, 4))
        >>> student = DetectorOutput(torch.randn(3, 1, 5, 3), torch.rand(3, 1, 5, 4))
        >>> step = Step(student, teacher, targets)
        >>> step.teacher_assignment.shape, step.student_assignment.shape
        (torch.Size([6, 1, 9]), torch.Size([3, 1, 5]))
    """

    def __init__(
        self,
        student: DetectorOutput,
        teacher: DetectorOutput,
        targets: Targets,
        *,
        heads: Heads | None = None,
        teacher_matching: TargetMatching | None = None,
        student_matching: TargetMatching | None = None,
    ) -> None:
        self.student = with_stages("student", student)
        self.teacher = with_stages("teacher", teacher)
        self.targets = targets
        validate_step(self.student, self.teacher, targets)
        self.heads = Heads() if heads is None else heads
        if self.student.query_mask is not None:
            msg = "`student.query_mask` must be None, for all queries of a student learn, got a tensor"
            raise ValueError(msg)
        self.teacher = _without_padding(self.teacher, self.heads.teacher)
        num_classes = num_classes_of(self.student.logits, self.heads.student)
        self._labels_fit = labels_fit(targets.labels, targets.mask, num_classes)
        self._teacher_matching = TargetMatching() if teacher_matching is None else teacher_matching
        self._student_matching = TargetMatching() if student_matching is None else student_matching
        self._teacher_logits: Tensor | None = None
        self._known_targets: Targets | None = None
        self._teacher_assignment: Tensor | None = None
        self._student_assignment: Tensor | None = None

    @property
    def teacher_logits(self) -> Tensor:
        """The teacher's logits (L_T, B, M, C') in the student's classes and the teacher's own head."""
        if self._teacher_logits is None:
            with torch.no_grad():
                self._teacher_logits = self.heads.in_student_classes(self.teacher.logits, self.student.logits)
        return self._teacher_logits

    @property
    def known_targets(self) -> Targets:
        """The targets of classes that the teacher knows: the others have no part in what it teaches."""
        if self._known_targets is None:
            known = self.heads.known_classes(self.teacher.logits, self.student.logits)
            labels, boxes, mask = self.targets
            if known is not None:
                known_labels = known[labels.where(mask, 0).clamp(0, len(known) - 1)]
                mask = mask & known_labels
            self._known_targets = Targets(labels, boxes, mask)  # the compiler of PyTorch 2.6 cannot trace `_replace`
        return self._known_targets

    @property
    def teacher_assignment(self) -> Tensor:
        """The target (L_T, B, M) of each teacher query, -1 = none."""
        if self._teacher_assignment is None:
            teacher = Predictions(self.teacher_logits, self.teacher.boxes)
            self._teacher_assignment = self._teacher_matching(
                teacher, self.known_targets, self.heads.teacher, self.teacher.query_mask
            )
        return self._teacher_assignment

    @property
    def student_assignment(self) -> Tensor:
        """The target (L_S, B, N) of each student query, -1 = none: that of the student's own detection loss."""
        if self._student_assignment is None:
            student = Predictions(self.student.logits, self.student.boxes)
            self._student_assignment = self._student_matching(student, self.targets, self.heads.student)
        return self._student_assignment

    def features(self) -> tuple[Levels, Levels, Levels | None, Levels | None]:
        """Features of student and teacher, which must be given together, and the padding masks of either's sizes."""
        student, teacher = self.student, self.teacher
        if student.features is None or teacher.features is None:
            missing, given = ("student", "teacher") if student.features is None else ("teacher", "student")
            msg = (
                f"`{missing}.features` must be given where `{given}.features` is "
                "(or set the weight of the feature term to 0), got None"
            )
            raise ValueError(msg)
        own = teacher.padding_mask if student.padding_mask is None else student.padding_mask
        mask = own if teacher.padding_mask is None else teacher.padding_mask
        return student.features, teacher.features, own, None if mask is None else _of_size(mask, teacher.features)

    def given_by_both(self, field: str) -> tuple[Any, Any]:
        """A field of the outputs of student and teacher, which must give it together."""
        given = getattr(self.student, field), getattr(self.teacher, field)
        for missing, other, value in zip(("student", "teacher"), ("teacher", "student"), given, strict=True):
            if value is None:
                msg = f"`{missing}.{field}` must be given where `{other}.{field}` is, got None"
                raise ValueError(msg)
        return given

    def of_group(self, teacher: Tensor) -> Tensor:
        """What of the teacher's (L_T, B, M, ...) belongs to the queries of the student's group."""
        index = self.student.group_index
        return teacher if index is None else gather_partners(teacher, index.expand(len(teacher), -1, -1))

    def group_mask(self) -> Tensor | None:
        """Which queries (B, K) of the student's group are queries of the teacher; None: all."""
        mask, index = self.teacher.query_mask, self.student.group_index
        return mask if mask is None or index is None else gather_partners(mask, index)

    def or_nan(self, loss: Tensor) -> Tensor:
        """`loss`; NaN where a target has a label that is no class, and nobody could look without stalling a GPU."""
        return nan_unless(self._labels_fit, loss)

    def zero(self, *fields: str) -> Tensor:
        """A scalar 0 on the student's device, with a graph to its logits, its boxes and the `fields` that it gives."""
        said = [self.student.logits, self.student.boxes]
        for field in fields:
            value = getattr(self.student, field)
            each = () if value is None else [value] if isinstance(value, Tensor) else value
            said += [tensor for tensor in each if isinstance(tensor, Tensor) and tensor.ndim]
        return torch.stack([full_precision(tensor[..., :0]).sum() for tensor in said]).sum()


def _without_padding(teacher: DetectorOutput, activation: Activation) -> DetectorOutput:
    """The teacher's outputs, with stages, where padded queries are certain of nothing, whatever they held."""
    mask = teacher.query_mask
    if mask is None:
        return teacher
    validate_dtype("teacher.query_mask", mask, torch.bool)
    shape = teacher.logits.shape[1:3]
    validate_same_shape("teacher.query_mask", mask.shape, "teacher.logits", shape, "(B, M)")
    validate_same_device("teacher.logits", teacher.logits, **{"teacher.query_mask": mask})
    column = mask.unsqueeze(-1)
    logits = torch.where(column, teacher.logits, nothing(teacher.logits, activation))
    queries = None if teacher.queries is None else teacher.queries.where(column, 0.0)
    boxes = teacher.boxes.where(column, 0.0)
    said = teacher.features, teacher.padding_mask, teacher.group, teacher.group_index, mask
    return DetectorOutput(logits, boxes, queries, *said, teacher.distributions, teacher.masks)


def _of_size(masks: Levels, features: Levels) -> list[Tensor]:
    """Masks of one model at the size of the features (B, D, H, W) of the other."""
    each, levels = as_levels("padding_mask", masks), as_levels("teacher.features", features)
    fit = len(each) == len(levels) and all(mask.ndim == 3 for mask in each)
    return [resized_mask(mask, level.shape[-2:]) for mask, level in zip(each, levels, strict=True)] if fit else each
