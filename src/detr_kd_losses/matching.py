"""Matching: costs, then assignment, without gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from detr_kd_losses._blocks import COSTS_BUILT, COSTS_SOLVED, in_blocks, slices
from detr_kd_losses._labels import labels_fit
from detr_kd_losses._validation import (
    validate_both_predictions,
    validate_predictions,
    validate_targets_shape,
)
from detr_kd_losses.assignment import linear_sum_assignment
from detr_kd_losses.costs import box_cost, detection_cost, distillation_cost, distillation_costs
from detr_kd_losses.heads import Activation, ClassCost, ClassMap
from detr_kd_losses.pairs import validate_teacher_positive, validated_mask

__all__ = ["match_targets", "match_teacher"]


@torch.no_grad()
def match_targets(
    logits: Tensor,
    boxes: Tensor,
    target_labels: Tensor,
    target_boxes: Tensor,
    target_mask: Tensor,
    *,
    class_cost: ClassCost = "focal",
    weight_class: float = 2.0,
    weight_bbox: float = 5.0,
    weight_giou: float = 2.0,
    alpha: float = 0.25,
    gamma: float = 2.0,
    query_mask: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Match queries one-to-one to targets at the least :func:`detection_cost`.

    Args:
        logits: (..., N, C), raw. All leading dimensions, stages included, are solved in one batched call.
        boxes: (..., N, 4), cxcywh in [0, 1].
        target_labels: (..., T) int64, padded; (B, T) goes with (L, B, N, C).
        target_boxes: (..., T, 4), cxcywh in [0, 1].
        target_mask: (..., T) bool, True = a target, False = padding.
        class_cost: ``"focal"`` for sigmoid heads, ``"softmax"`` for softmax heads with "no object" last.
        weight_class: Weight of the class cost.
        weight_bbox: Weight of the L1 distance of the boxes.
        weight_giou: Weight of the negative GIoU.
        alpha: Balance of the focal cost.
        gamma: Focus of the focal cost.
        query_mask: (..., N) bool, True = a query, False = padding, which gets no target. None: all are queries.
        backend: Solver, by name (:func:`linear_sum_assignment`).

    Returns:
        (..., N) int64: the target of each query, -1 = none.

    Raises:
        ValueError: If shapes, devices or options do not fit, or (on a CPU) a label is no class.
        TypeError: If a dtype does not fit.

    Examples:
        >>> logits, boxes = torch.zeros(1, 3, 2), torch.tensor([[[0.1] * 4, [0.5] * 4, [0.9] * 4]])
        >>> labels, mask = torch.tensor([[0, 1]]), torch.tensor([[True, False]])
        >>> match_targets(logits, boxes, labels, boxes[:, 1:], mask).tolist()
        [[-1, 0, -1]]

    References:
        Carion et al., "End-to-End Object Detection with Transformers", ECCV 2020, arXiv:2005.12872.
    """
    validate_predictions("", logits, boxes)
    validate_targets_shape(
        target_labels,
        target_boxes,
        target_mask,
        batch_shape=logits.shape[:-2],
        like=logits,
        like_name="logits",
    )
    cost = partial(
        detection_cost,
        class_cost=class_cost,
        weight_class=weight_class,
        weight_bbox=weight_bbox,
        weight_giou=weight_giou,
        alpha=alpha,
        gamma=gamma,
    )
    batch = logits.shape[:-2]
    num_classes = logits.shape[-1] - (class_cost == "softmax")
    labels_fit(target_labels, target_mask, num_classes)
    # What is written in padding does not matter, an index out of range included; a target's is no class, not class 0.
    labels = target_labels.where(target_labels >= 0, num_classes).where(target_mask, 0)
    targets = (labels.expand(*batch, -1), target_boxes.expand(*batch, -1, -1))
    mask = target_mask.expand(*batch, -1)
    masks = {"column_mask": mask}
    if query_mask is not None:
        masks["row_mask"] = validated_mask("query_mask", query_mask, "logits", logits)
    solve = partial(linear_sum_assignment, backend=backend)
    return _in_parts(solve, lambda *tensors: [cost(*tensors)], (logits, boxes, *targets), **masks)


@torch.no_grad()
def match_teacher(
    student_logits: Tensor,
    student_boxes: Tensor,
    teacher_logits: Tensor,
    teacher_boxes: Tensor,
    *,
    teacher_positive: Tensor | None = None,
    teacher_mask: Tensor | None = None,
    student_activation: Activation = "sigmoid",
    teacher_activation: Activation = "sigmoid",
    class_map: ClassMap | None = None,
    weight_class: float = 1.0,
    weight_bbox: float = 5.0,
    weight_giou: float = 2.0,
    backend: str = "auto",
) -> Tensor:
    """Match student queries one-to-one to teacher queries at the least :func:`distillation_cost`.

    Without `teacher_positive`, all teacher queries are matched jointly, as in the paper's public code. With it, the
    positive ones choose first among all student queries; the negative ones, whose class is background, share the
    student queries that are left, by boxes alone.

    Args:
        student_logits: (..., N, C), raw.
        student_boxes: (..., N, 4), cxcywh in [0, 1].
        teacher_logits: (..., M, C'), raw.
        teacher_boxes: (..., M, 4), cxcywh in [0, 1].
        teacher_positive: (..., M) bool, True = the teacher's own matching gives the query a target.
        teacher_mask: (..., M) bool, True = a query, False = padding, which is no partner. None: all are queries.
        student_activation: ``"sigmoid"``, or ``"softmax"`` for a head with "no object" as its last channel.
        teacher_activation: Head of the teacher, ``"sigmoid"`` or ``"softmax"``.
        class_map: Student class of each teacher class, -1 = dropped. None: both have the same classes.
        weight_class: Weight of the class cost.
        weight_bbox: Weight of the L1 distance of the boxes.
        weight_giou: Weight of the negative GIoU.
        backend: Solver, by name (:func:`linear_sum_assignment`).

    Returns:
        (..., N) int64: the teacher query of each student query, -1 = none (when N > M).

    Raises:
        ValueError: If shapes, devices or options do not fit.
        TypeError: If a dtype does not fit.

    Examples:
        >>> logits, boxes = torch.zeros(3, 2), torch.tensor([[0.1] * 4, [0.5] * 4, [0.9] * 4])
        >>> match_teacher(logits, boxes, logits[:2], boxes[1:]).tolist()
        [-1, 0, 1]

    References:
        Chang et al., "DETRDistill", ICCV 2023, arXiv:2211.10156, Eq. 3-5.
    """
    validate_both_predictions(student_logits, student_boxes, teacher_logits, teacher_boxes)
    options: dict[str, Any] = {
        "student_activation": student_activation,
        "teacher_activation": teacher_activation,
        "class_map": class_map,
        "weight_class": weight_class,
        "weight_bbox": weight_bbox,
        "weight_giou": weight_giou,
    }
    predictions = (student_logits, student_boxes, teacher_logits, teacher_boxes)
    masks: dict[str, Tensor] = {}
    if teacher_mask is not None:
        name = "column_mask" if teacher_positive is None else "is_query"
        masks[name] = validated_mask("teacher_mask", teacher_mask, "teacher_logits", teacher_logits)
    if teacher_positive is None:
        solve = partial(linear_sum_assignment, backend=backend)
        return _in_parts(solve, lambda *tensors: [distillation_cost(*tensors, **options)], predictions, **masks)
    validate_teacher_positive(teacher_positive, teacher_logits)
    solve = partial(_positives_first, backend=backend)
    masks["column_mask"] = teacher_positive
    return _in_parts(solve, partial(distillation_costs, **options), predictions, **masks)


@torch.no_grad()
def match_rest(
    assignment: Tensor,
    student_boxes: Tensor,
    teacher_boxes: Tensor,
    teacher_positive: Tensor,
    *,
    teacher_mask: Tensor | None = None,
    weight_bbox: float = 5.0,
    weight_giou: float = 2.0,
    backend: str = "auto",
) -> Tensor:
    """`assignment` (..., N), where the negative teacher queries share the student queries that it leaves, by boxes."""
    solve = partial(_share_rest, backend=backend)
    cost = partial(box_cost, weight_bbox=weight_bbox, weight_giou=weight_giou)
    boxes = (student_boxes, teacher_boxes)
    masks = {"assignment": assignment, "column_mask": teacher_positive}
    if teacher_mask is not None:
        masks["is_query"] = validated_mask("teacher_mask", teacher_mask, "teacher_boxes", teacher_boxes)
    return _in_parts(solve, lambda *tensors: [cost(*tensors)], boxes, **masks)


def _positives_first(
    cost: Tensor, by_box: Tensor, *, column_mask: Tensor, is_query: Tensor | None = None, backend: str
) -> Tensor:
    """Match the columns in the mask by class and box, then the others by box, with the rows that are left."""
    positive = column_mask if is_query is None else column_mask & is_query
    positives = linear_sum_assignment(cost, column_mask=positive, backend=backend)
    return _share_rest(by_box, positives, column_mask, is_query, backend=backend)


def _share_rest(
    by_box: Tensor, assignment: Tensor, column_mask: Tensor, is_query: Tensor | None = None, *, backend: str
) -> Tensor:
    """Match the columns outside the mask with the rows that are left."""
    others = ~column_mask if is_query is None else ~column_mask & is_query
    rest = linear_sum_assignment(by_box, row_mask=assignment < 0, column_mask=others, backend=backend)
    return torch.where(assignment >= 0, assignment, rest)


def _in_parts(
    solve: Callable[..., Tensor],
    costs: Callable[..., Sequence[Tensor]],
    tensors: tuple[Tensor, ...],
    **masks: Tensor,
) -> Tensor:
    """``solve(*costs(*tensors), **masks)``, all with the same leading dimensions, as many problems at a time as fit."""
    *batch, rows, _ = tensors[0].shape
    entries = rows * tensors[-1].shape[-2]
    problems = math.prod(batch)
    if problems * entries <= COSTS_BUILT or not in_blocks(tensors[0]):
        return solve(*costs(*tensors), **masks)
    flat = [tensor.reshape(problems, *tensor.shape[len(batch) :]) for tensor in tensors]
    assignments = []
    for solved in slices(problems, COSTS_SOLVED // entries):
        blocks = slices(solved.stop, COSTS_BUILT // entries, solved.start)
        parts = [costs(*(tensor[block] for tensor in flat)) for block in blocks]
        masked = {name: mask.reshape(problems, -1)[solved] for name, mask in masks.items()}
        assignments.append(solve(*map(torch.cat, zip(*parts, strict=True)), **masked))
    return torch.cat(assignments).reshape(*batch, rows)
