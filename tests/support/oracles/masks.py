"""Masks: the binary divergence of matched queries, cell by cell, and a bilinear resize."""

from __future__ import annotations

import math

import numpy as np

from .autodiff import Scalar, sigmoid, softplus
from .geometry import corners

__all__ = ["mask_distillation_loss"]


def _resize(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return the mask at another size, bilinear between the centres of cells, which the border repeats."""

    def neighbours(cell: int, number: int, old: int) -> tuple[int, int, float]:
        place = min(max((cell + 0.5) * old / number - 0.5, 0.0), old - 1.0)
        first = math.floor(place)
        return first, min(first + 1, old - 1), place - first

    result = np.zeros(size)
    for y, x in np.ndindex(*size):
        top, bottom, down = neighbours(y, size[0], mask.shape[0])
        left, right, along = neighbours(x, size[1], mask.shape[1])
        upper = mask[top, left] * (1 - along) + mask[top, right] * along
        lower = mask[bottom, left] * (1 - along) + mask[bottom, right] * along
        result[y, x] = upper * (1 - down) + lower * down
    return result


def _divergence(z_s: Scalar, z_t: float) -> Scalar:
    p = sigmoid(z_t)
    return p * (softplus(-z_s) - softplus(-z_t)) + (1.0 - p) * (softplus(z_s) - softplus(z_t))


def _pair(student: np.ndarray, teacher: np.ndarray, box: np.ndarray | None, t: float) -> Scalar:
    """Return the mean of T^2 KL over the cells of the box."""
    height, width = student.shape
    taught = _resize(teacher, (height, width))
    cells = list(np.ndindex(height, width))
    if box is not None:
        left, top, right, bottom = corners(box)
        cells = [
            (y, x)
            for y, x in cells
            if top * height < y + 1 and bottom * height > y and left * width < x + 1 and right * width > x
        ]
    total = sum((_divergence(student[cell] / t, taught[cell] / t) for cell in cells), 0.0)
    return t**2 * total / max(len(cells), 1)


def mask_distillation_loss(
    student_masks: np.ndarray,
    teacher_masks: np.ndarray,
    assignment: np.ndarray,
    *,
    boxes: np.ndarray | None = None,
    teacher_weight: np.ndarray | None = None,
    temperature: float = 1.0,
) -> Scalar:
    """Return sum over layers of the weighted mean over pairs of the mean over cells."""
    total: Scalar = 0.0
    for stage in np.ndindex(*assignment.shape[:-2]):
        loss: Scalar = 0.0
        weights = 0.0
        for image, n in np.ndindex(*assignment.shape[-2:]):
            at, m = (*stage, image), assignment[(*stage, image, n)]
            if m < 0:
                continue
            w = 1.0 if teacher_weight is None else teacher_weight[(*at[-(teacher_weight.ndim - 1) :], m)]
            if w > 0.0:
                box = None if boxes is None else boxes[(*at, m)]
                weights += w
                loss += w * _pair(student_masks[(*at, n)], teacher_masks[(*at, m)], box, temperature)
        total += loss / weights if weights > 0.0 else loss
    return total
