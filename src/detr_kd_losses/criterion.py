"""The whole of DETRDistill in one Module: predictions of student and teacher in, a dict of losses out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from detr_kd_losses._checks import (
    check_boxes,
    check_choice,
    check_dtype,
    check_predictions,
    check_same_device,
    check_same_shape,
)
from detr_kd_losses.assignment import invert_assignment
from detr_kd_losses.class_scores import Activation, ClassMap, in_student_classes, known_classes
from detr_kd_losses.losses._pairs import gather_partners
from detr_kd_losses.losses.features import TargetAwareFeatureLoss
from detr_kd_losses.losses.logits import HungarianDistillationLoss
from detr_kd_losses.losses.query_group import TeacherAssignedQueryLoss
from detr_kd_losses.losses.query_quality import Variant, query_quality
from detr_kd_losses.losses.target_aware_mask import Normalize
from detr_kd_losses.matching import match_targets, match_teacher
from detr_kd_losses.stages import StageMap, select_stages

__all__ = ["DETRDistillationLoss", "DetectorOutput", "Targets", "pad_targets"]

Preset = Literal["paper", "official"]


class DetectorOutput(NamedTuple):
    """What a detector says about a batch, decoder layer by decoder layer.

    Attributes:
        logits: (L, B, N, C), raw. A softmax head has "no object" as its last channel.
        boxes: (L, B, N, 4), cxcywh in [0, 1].
        queries: (L, B, N, D), the decoder's outputs; needed of a teacher for the feature loss.
        features: (B, D, H, W) or a sequence of levels, for the feature loss.
        padding_mask: (B, H, W) bool, True = a valid cell, or one per level of `features`. None: all valid.
        group_logits: (L, B, M, C), a student's raw predictions for the teacher's queries.
        group_boxes: (L, B, M, 4), their boxes.

    Examples:
        >>> DetectorOutput(torch.zeros(6, 2, 300, 80), torch.rand(6, 2, 300, 4)).features is None
        True
    """

    logits: Tensor
    boxes: Tensor
    queries: Tensor | None = None
    features: Tensor | Sequence[Tensor] | None = None
    padding_mask: Tensor | Sequence[Tensor] | None = None
    group_logits: Tensor | None = None
    group_boxes: Tensor | None = None


class Targets(NamedTuple):
    """Ground truths of a batch, padded to the same number.

    Attributes:
        labels: (B, T) int64, in the student's classes.
        boxes: (B, T, 4), cxcywh in [0, 1].
        mask: (B, T) bool, True = a target, False = padding.

    Examples:
        >>> Targets(torch.tensor([[1]]), torch.rand(1, 1, 4), torch.tensor([[True]])).labels.tolist()
        [[1]]
    """

    labels: Tensor
    boxes: Tensor
    mask: Tensor


def pad_targets(targets: Iterable[Mapping[str, Tensor]]) -> Targets:
    """Pad the targets of each image to the largest number in the batch.

    Args:
        targets: For each image a mapping with ``"labels"`` (T_i,) int64 (or ``"class_labels"``, as transformers calls
            them) and ``"boxes"`` (T_i, 4) cxcywh in [0, 1].

    Returns:
        :class:`Targets` with T = max T_i.

    Raises:
        ValueError: If there is no image, labels are missing, or labels and boxes of an image differ in number.
        TypeError: If a dtype does not fit.

    Examples:
        >>> images = [{"labels": torch.tensor([3]), "boxes": torch.rand(1, 4)},
        ...           {"labels": torch.tensor([], dtype=torch.int64), "boxes": torch.rand(0, 4)}]
        >>> pad_targets(images).mask.tolist()
        [[True], [False]]
    """
    labels, boxes = [], []
    for index, image in enumerate(targets):
        key = next((name for name in ("labels", "class_labels") if name in image), None)
        if key is None or "boxes" not in image:
            msg = f"`targets[{index}]` must have 'labels' (or 'class_labels') and 'boxes', got {sorted(image)}"
            raise ValueError(msg)
        check_dtype(f"targets[{index}][{key!r}]", image[key], torch.int64)
        check_boxes(f"targets[{index}]['boxes']", image["boxes"])
        check_same_shape(f"targets[{index}][{key!r}]", image[key].shape, "boxes", image["boxes"].shape[:-1], "(T,)")
        labels.append(image[key])
        boxes.append(image["boxes"])
    if not labels:
        msg = "`targets` must have at least one image, got none"
        raise ValueError(msg)
    pad = nn.utils.rnn.pad_sequence
    valid = [torch.ones_like(image, dtype=torch.bool) for image in labels]
    return Targets(pad(labels, batch_first=True), pad(boxes, batch_first=True), pad(valid, batch_first=True))


class DETRDistillationLoss(nn.Module):
    r"""Distil a large DETR into a small one by logits and boxes, features, and query assignment.

    .. math:: L = w_{logits} L_{logits} + w_{feature} L_{feature} + w_{group} L_{group}

    to be added to the student's own detection loss. The teacher is matched to the targets once, layer by layer, and
    that assignment says which of its queries are positive, how good they are, and what the query group learns. A term
    is computed where its weight is not 0 and the outputs carry what it needs: ``features`` of both and ``queries`` of
    the teacher for the feature loss, ``group_logits`` and ``group_boxes`` of the student for the query group. One
    side without the other is an error.

    Two presets set how. ``"paper"`` follows the equations: positive teacher queries are matched first and distilled by
    class and box, negative ones by box alone; features are weighted by quality times squared similarity. ``"official"``
    follows the paper's public code, but with the teacher's real assignment: all queries are matched jointly and
    distilled by class and box, features weighted by the squared mask of the top-scored queries. Prefer ``"paper"``
    where the teacher has more queries than the student: a joint matching then leaves most positive queries out.

    Args:
        preset: ``"paper"`` or ``"official"``.
        weight_logits: Weight of :func:`hungarian_distillation_loss`.
        weight_feature: Weight of :func:`target_aware_feature_loss`.
        weight_query_group: Weight of :func:`teacher_assigned_query_loss`.
        student_channels: Channels of the student's feature map, or one number per level, where they differ from the
            teacher's: the learned projection is part of this Module.
        teacher_channels: Channels of the teacher's, likewise.
        student_activation: Head of the student: ``"sigmoid"``, or ``"softmax"`` with "no object" last.
        teacher_activation: Head of the teacher.
        class_map: Student class of each teacher class, -1 = dropped (:func:`map_class_logits`). Targets of a class
            that the teacher does not know have no part in what it teaches.
        temperature: Temperature of the class term.
        normalize: See :func:`target_aware_mask`. ``"max"`` keeps the feature loss of the order of the others; None is
            the variant's own, for ``"paper"`` the 1 / M of Eq. 9, at which a weight of 20 does next to nothing.
        stage_map: Which teacher layer teaches which student layer (:func:`select_stages`).
        sync_normalizer: Whether normalisers are averaged over replicas when torch.distributed is initialised.
        backend: Solver of the matching (:func:`linear_sum_assignment`).

    Examples:
        >>> targets = Targets(torch.tensor([[1], [0]]), torch.rand(2, 1, 4), torch.tensor([[True], [False]]))
        >>> teacher = DetectorOutput(torch.randn(6, 2, 9, 3), torch.rand(6, 2, 9, 4))
        >>> student = DetectorOutput(torch.randn(3, 2, 5, 3, requires_grad=True), torch.rand(3, 2, 5, 4))
        >>> losses = DETRDistillationLoss()(student, teacher, targets)
        >>> sorted(losses)
        ['loss_kd_bbox', 'loss_kd_class', 'loss_kd_giou']
        >>> sum(losses.values()).backward()

    References:
        Chang et al., "DETRDistill: A Universal Knowledge Distillation Framework for DETR-families", ICCV 2023,
        arXiv:2211.10156.
    """

    def __init__(
        self,
        preset: Preset = "paper",
        *,
        weight_logits: float = 1.0,
        weight_feature: float = 20.0,
        weight_query_group: float = 1.0,
        student_channels: int | Sequence[int] | None = None,
        teacher_channels: int | Sequence[int] | None = None,
        student_activation: Activation = "sigmoid",
        teacher_activation: Activation = "sigmoid",
        class_map: ClassMap | None = None,
        temperature: float = 1.0,
        normalize: Normalize | None = "max",
        stage_map: StageMap = "even",
        sync_normalizer: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_choice("preset", preset, ("paper", "official"))
        self.variant: Variant = preset
        self.weight_logits = weight_logits
        self.weight_feature = weight_feature
        self.weight_query_group = weight_query_group
        self.stage_map = stage_map
        self.backend = backend
        self.logits = HungarianDistillationLoss(
            student_activation=student_activation,
            teacher_activation=teacher_activation,
            class_map=class_map,
            temperature=temperature,
            sync_normalizer=sync_normalizer,
        )
        self.feature = TargetAwareFeatureLoss(
            student_channels,
            teacher_channels,
            variant=preset,
            normalize=normalize,
            sync_normalizer=sync_normalizer,
        )
        self.query_group = TeacherAssignedQueryLoss(
            class_loss="focal" if student_activation == "sigmoid" else "cross_entropy",
            sync_normalizer=sync_normalizer,
        )

    def forward(self, student: DetectorOutput, teacher: DetectorOutput, targets: Targets) -> dict[str, Tensor]:
        """Compute the distillation terms, already weighted.

        Args:
            student: The student's outputs, with L_S layers and N queries.
            teacher: The teacher's outputs, with L_T layers and M queries, of the same images.
            targets: Padded targets of the batch.

        Returns:
            Scalars: ``loss_kd_class``, ``loss_kd_bbox``, ``loss_kd_giou``, and where they apply ``loss_kd_feature``,
            ``loss_kd_group_class``, ``loss_kd_group_bbox``, ``loss_kd_group_giou``.

        Raises:
            ValueError: If shapes or devices do not fit, or one side lacks what the other has.
            TypeError: If a dtype does not fit.
        """
        student, teacher = _with_stages("student", student), _with_stages("teacher", teacher)
        check_same_shape(
            "student.logits", student.logits.shape[1:2], "teacher.logits", teacher.logits.shape[1:2], "(B,)"
        )
        check_same_device("student.logits", student.logits, **{"teacher.logits": teacher.logits})
        with torch.no_grad():
            teacher_logits, targets_known = self._in_student_classes(teacher.logits, student.logits, targets)
            teacher_assignment = match_targets(
                teacher_logits,
                teacher.boxes,
                *targets_known,
                class_cost="focal" if self.logits.teacher_activation == "sigmoid" else "softmax",
                backend=self.backend,
            )
        losses: dict[str, Tensor] = {}
        if self.weight_logits != 0:
            terms = self._logits_loss(student, teacher, teacher_assignment)
            losses |= _scaled(terms, self.weight_logits, "kd_")
        if self.weight_feature != 0:
            terms = self._feature_loss(student, teacher, teacher_logits, targets_known, teacher_assignment)
            losses |= _scaled(terms, self.weight_feature, "kd_")
        if self.weight_query_group != 0:
            terms = self._query_group_loss(student, targets_known, teacher_assignment)
            losses |= _scaled(terms, self.weight_query_group, "kd_group_")
        return losses

    def _logits_loss(
        self, student: DetectorOutput, teacher: DetectorOutput, teacher_assignment: Tensor
    ) -> dict[str, Tensor]:
        """Match student to teacher queries and distil, each student layer from its teacher layer."""
        depth = len(student.logits)
        logits, boxes, assigned = (
            select_stages(tensor, depth, stage_map=self.stage_map)
            for tensor in (teacher.logits, teacher.boxes, teacher_assignment)
        )
        positive = None if self.variant == "official" else assigned >= 0
        assignment = match_teacher(
            student.logits,
            student.boxes,
            logits,
            boxes,
            teacher_positive=positive,
            student_activation=self.logits.student_activation,
            teacher_activation=self.logits.teacher_activation,
            class_map=self.logits.class_map,
            backend=self.backend,
        )
        loss: dict[str, Tensor] = self.logits(
            student.logits, student.boxes, logits, boxes, assignment, teacher_positive=positive
        )
        return loss

    def _feature_loss(
        self,
        student: DetectorOutput,
        teacher: DetectorOutput,
        teacher_logits: Tensor,
        targets: Targets,
        teacher_assignment: Tensor,
    ) -> dict[str, Tensor]:
        """Distil features where good teacher queries look, by the queries of all teacher layers."""
        _check_together("student.features", student.features, "teacher.features", teacher.features)
        if student.features is None or teacher.features is None:
            return {}
        if teacher.queries is None:
            msg = "`teacher.queries` must be given for the feature loss (or set weight_feature=0), got None"
            raise ValueError(msg)
        check_same_shape(
            "teacher.queries", teacher.queries.shape[:-1], "teacher.logits", teacher.logits.shape[:-1], "(L, B, M)"
        )
        quality = query_quality(
            teacher_logits,
            teacher.boxes,
            *targets,
            teacher_assignment,
            activation=self.logits.teacher_activation,
            variant=self.variant,
        )
        queries = teacher.queries
        if self.variant == "paper" and self.feature.normalize in ("max", "mean"):
            # Only queries with a target have quality: no more than T of M, and nothing here depends on M.
            queries, quality = _with_target(queries, quality, teacher_assignment, targets.mask.shape[-1])
        padding_mask = student.padding_mask if teacher.padding_mask is None else teacher.padding_mask
        loss = self.feature(student.features, teacher.features, queries, quality, padding_mask=padding_mask)
        return {"loss_feature": loss}

    def _query_group_loss(
        self, student: DetectorOutput, targets: Targets, teacher_assignment: Tensor
    ) -> dict[str, Tensor]:
        """Supervise the student's predictions for the teacher's queries with the teacher's assignment."""
        logits, boxes = student.group_logits, student.group_boxes
        _check_together("student.group_logits", logits, "student.group_boxes", boxes)
        if logits is None or boxes is None:
            return {}
        assignment = select_stages(teacher_assignment, len(logits), stage_map=self.stage_map)
        loss: dict[str, Tensor] = self.query_group(logits, boxes, *targets, assignment)
        return loss

    def _in_student_classes(
        self, teacher_logits: Tensor, student_logits: Tensor, targets: Targets
    ) -> tuple[Tensor, Targets]:
        """The teacher's logits in the student's classes, and the targets of the classes that it knows."""
        heads = self.logits
        num_classes = student_logits.shape[-1] - (heads.student_activation == "softmax")
        logits = in_student_classes(teacher_logits, num_classes, heads.teacher_activation, heads.class_map)
        if heads.class_map is None:
            return logits, targets
        teacher_classes = teacher_logits.shape[-1] - (heads.teacher_activation == "softmax")
        known = known_classes(heads.class_map, teacher_classes, num_classes, device=logits.device)
        labels = targets.labels.where(targets.mask, 0)
        return logits, targets._replace(mask=targets.mask & known[labels])

    def extra_repr(self) -> str:
        """Show the weights."""
        return (
            f"preset={self.variant!r}, weight_logits={self.weight_logits}, weight_feature={self.weight_feature}, "
            f"weight_query_group={self.weight_query_group}, stage_map={self.stage_map!r}, backend={self.backend!r}"
        )


def _with_stages(name: str, output: DetectorOutput) -> DetectorOutput:
    """`output` with a dimension of decoder layers, checked; (B, N, ...) counts as one layer."""
    check_predictions(f"{name}.", output.logits, output.boxes)
    if output.logits.ndim == 3:
        fields = ("logits", "boxes", "queries", "group_logits", "group_boxes")
        single = {field: getattr(output, field) for field in fields}
        staged: dict[str, Any] = {k: None if v is None else v.unsqueeze(0) for k, v in single.items()}
        output = output._replace(**staged)
    if output.logits.ndim != 4:
        msg = f"`{name}.logits` must have shape (L, B, N, C) or (B, N, C), got {tuple(output.logits.shape)}"
        raise ValueError(msg)
    return output


def _check_together(name: str, value: object, other: str, other_value: object) -> None:
    """Raise if only one of two fields is given."""
    if (value is None) != (other_value is None):
        missing, given = (name, other) if value is None else (other, name)
        msg = f"`{missing}` must be given where `{given}` is (or set the weight of that loss to 0), got None"
        raise ValueError(msg)


def _with_target(
    queries: Tensor, quality: Tensor, teacher_assignment: Tensor, num_targets: int
) -> tuple[Tensor, Tensor]:
    """Queries (L, B, T, D) and quality (L, B, T) of the query of each target; quality 0 for a target without one."""
    query = invert_assignment(teacher_assignment, num_targets)
    return gather_partners(queries, query), gather_partners(quality, query).where(query >= 0, 0.0)


def _scaled(losses: dict[str, Tensor], weight: float, prefix: str) -> dict[str, Tensor]:
    """``loss_x`` -> ``loss_<prefix>x``, times `weight`."""
    return {f"loss_{prefix}{key.removeprefix('loss_')}": weight * loss for key, loss in losses.items()}
