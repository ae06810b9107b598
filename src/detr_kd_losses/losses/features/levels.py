"""Levels of feature maps: those of a student beside those of its teacher, and which of their cells count."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from detr_kd_losses._precision import shared_precision
from detr_kd_losses._validation import (
    validate_boxes,
    validate_dtype,
    validate_floating,
    validate_positive,
    validate_same_device,
    validate_same_shape,
    validate_type,
)
from detr_kd_losses.boxes import box_cxcywh_to_xyxy, touched_cells
from detr_kd_losses.losses.features.mask import validate_features, validate_padding_mask
from detr_kd_losses.losses.features.projection import Levels, as_levels

__all__ = ["box_mask"]


class Level(NamedTuple):
    """One level: features (B, D, H, W) of both, the weight (B, H, W) of its cells, which of them are valid."""

    student: Tensor
    teacher: Tensor
    weight: Tensor | None
    valid: Tensor | None


def pair_levels(
    student_features: Levels, teacher_features: Levels, *, weight: Levels | None = None, padding_mask: Levels | None
) -> list[Level]:
    """The levels of both, validated; a single map is one level."""
    students = as_levels("student_features", student_features)
    nothing: Sequence[None] = [None] * len(students)
    others: dict[str, Sequence[Tensor | None]] = {
        "teacher_features": as_levels("teacher_features", teacher_features),
        "weight": nothing if weight is None else as_levels("weight", weight),
        "padding_mask": nothing if padding_mask is None else as_levels("padding_mask", padding_mask),
    }
    for name, levels in others.items():
        if len(levels) != len(students) or not students:
            msg = (
                f"`{name}` must have as many levels as `student_features`, at least 1; "
                f"got {len(levels)} and {len(students)}"
            )
            raise ValueError(msg)
    paired = [Level(*level) for level in zip(students, *others.values(), strict=True)]
    for student, teacher, weights, valid in paired:
        validate_features("student_features", student)
        validate_features("teacher_features", teacher)
        validate_same_shape("student_features", student.shape, "teacher_features", teacher.shape, "(B, D, H, W)")
        validate_same_device("student_features", student, teacher_features=teacher)
        validate_padding_mask(valid, "teacher_features", teacher)
        if weights is not None:
            validate_floating("weight", weights)
            shape = (teacher.shape[0], *teacher.shape[-2:])
            validate_same_shape("weight", weights.shape, "teacher_features", shape, "(B, H, W)")
            validate_same_device("teacher_features", teacher, weight=weights)
    return paired


@torch.no_grad()
def box_mask(boxes: Tensor, mask: Tensor, size: Sequence[int]) -> Tensor:
    """Which cells of a feature map the boxes of an image touch: a weight of cells.

    Args:
        boxes: (..., T, 4), cxcywh in [0, 1], padded.
        mask: (..., T) bool, True = a target, False = padding.
        size: H and W of the map.

    Returns:
        (..., H, W), 1 where a valid box covers a part of the cell, else 0. Has no gradient.

    Raises:
        ValueError: If shapes or devices do not fit, or `size` is not two positive whole numbers.
        TypeError: If a dtype does not fit.

    Examples:
        >>> box_mask(torch.tensor([[0.5, 0.25, 0.6, 0.1]]), torch.tensor([True]), (2, 4))
        tensor([[1., 1., 1., 1.],
                [0., 0., 0., 0.]])
    """
    validate_boxes("boxes", boxes)
    validate_dtype("mask", mask, torch.bool)
    validate_same_shape("boxes", boxes.shape[:-1], "mask", mask.shape, "(..., T)")
    validate_same_device("boxes", boxes, mask=mask)
    if len(size) != 2:
        msg = f"`size` must be H and W, got {tuple(size)}"
        raise ValueError(msg)
    for length in size:
        validate_type("size", length, (int, torch.SymInt), "two whole numbers")
        validate_positive("size", length)
    (boxes,) = shared_precision(boxes)
    left, top, right, bottom = box_cxcywh_to_xyxy(boxes).unbind(-1)
    rows, columns = touched_cells(top, bottom, size[0]), touched_cells(left, right, size[1])
    # A product of rows and columns for each box, added: no tensor of boxes and cells.
    rows = (rows & mask.unsqueeze(-1)).to(boxes.dtype)
    return (rows.mT @ columns.to(boxes.dtype) > 0).to(boxes.dtype)
