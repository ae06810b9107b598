"""Plain distances of features, cell by cell, and which cells boxes touch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from .autodiff import Scalar, log_softmax, sqrt, value
from .geometry import corners

__all__ = ["box_mask", "feature_distillation_loss"]

Levels = np.ndarray | Sequence[np.ndarray]


def _cosine_distance(student: Sequence[Scalar], teacher: Sequence[float]) -> Scalar:
    """Return 1 - cosine; of a zero vector 1 from any other, 0 from another zero vector."""
    empty = [all(value(x) == 0.0 for x in vector) for vector in (student, teacher)]
    if any(empty):
        return 0.0 if all(empty) else 1.0
    dot = sum(s * t for s, t in zip(student, teacher, strict=True))
    return 1.0 - dot / (sqrt(sum(s * s for s in student)) * math.sqrt(sum(t * t for t in teacher)))


def _standardised(features: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Return the features (B, D, H, W) with mean 0 and biased variance 1 per channel; 0 where all are the same."""
    result = np.zeros(features.shape, dtype=object)
    cells = list(zip(*np.nonzero(valid), strict=True))
    for d in range(features.shape[1]):
        values = [features[b, d, y, x] for b, y, x in cells]
        if len({value(v) for v in values}) > 1:
            mean = sum(values) / len(values)
            deviation = sqrt(sum((v - mean) ** 2 for v in values) / len(values))
            for (b, y, x), v in zip(cells, values, strict=True):
                result[b, d, y, x] = (v - mean) / deviation
    return result


def _cell_distance(student: Sequence[Scalar], teacher: Sequence[float], distance: str) -> Scalar:
    if distance == "cosine":
        return _cosine_distance(student, teacher)
    squares = sum((s - t) ** 2 for s, t in zip(student, teacher, strict=True)) / len(student)
    return squares / 2.0 if distance == "pearson" else squares


def _channel_loss(student: np.ndarray, teacher: np.ndarray, valid: np.ndarray, temperature: float) -> Scalar:
    """Return the mean over images and channels of T^2 KL(softmax of the teacher || softmax of the student)."""
    total: Scalar = 0.0
    images, channels = student.shape[:2]
    for b, d in np.ndindex(images, channels):
        log_q, log_p = (
            log_softmax(z / temperature for z in features[b, d][valid[b]]) if valid[b].any() else []
            for features in (student, teacher)
        )
        total += temperature**2 * sum(math.exp(p) * (p - q) for p, q in zip(log_p, log_q, strict=True))
    return total / (images * channels)


def feature_distillation_loss(
    student_features: Levels,
    teacher_features: Levels,
    *,
    distance: str = "mse",
    weight: Levels | None = None,
    padding_mask: Levels | None = None,
    temperature: float = 1.0,
) -> Scalar:
    """Return sum over valid cells of w * distance / number of valid cells, levels (B, D, H, W) added."""
    if isinstance(student_features, np.ndarray):
        student_features, teacher_features = [student_features], [teacher_features]
        weight = None if weight is None else [weight]
        padding_mask = None if padding_mask is None else [padding_mask]
    total: Scalar = 0.0
    for level, (student, teacher) in enumerate(zip(student_features, teacher_features, strict=True)):
        cells = (student.shape[0], *student.shape[2:])
        valid = np.ones(cells, dtype=bool) if padding_mask is None else padding_mask[level]
        if distance == "channel":
            total += _channel_loss(student, teacher, valid, temperature)
            continue
        pair = student, teacher
        if distance == "pearson":
            pair = _standardised(student, valid), _standardised(teacher, valid)
        for b, y, x in zip(*np.nonzero(valid), strict=True):
            w = 1.0 if weight is None else weight[level][b, y, x]
            total += w * _cell_distance(*(features[b, :, y, x] for features in pair), distance) / valid.sum()
    return total


def box_mask(boxes: np.ndarray, mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return (B, H, W), 1 where a valid box has more than an edge in common with the cell."""
    height, width = size
    touched = np.zeros((len(boxes), height, width))
    for b, y, x in np.ndindex(*touched.shape):
        for box in boxes[b][mask[b]]:
            left, top, right, bottom = corners(box)
            in_row = top * height < y + 1 and bottom * height > y
            touched[b, y, x] = max(touched[b, y, x], in_row and left * width < x + 1 and right * width > x)
    return touched
