"""How much each teacher query counts: published weights, query by query; and shared queries, weighted by one."""

from __future__ import annotations

from typing import Any

import numpy as np

from .features import class_scores
from .geometry import box_iou, generalized_box_iou, over_images
from .losses import Terms, hungarian_distillation_loss

__all__ = ["confidence_weight", "localization_weight", "overlap_weight", "shared_query_distillation_loss"]


@over_images("(m,c)->(m)")
def confidence_weight(teacher_logits: np.ndarray, *, activation: str = "sigmoid") -> np.ndarray:
    """Return the highest class score of each query; 0 without classes."""
    return np.array([max(class_scores(logits, activation), default=0.0) for logits in teacher_logits])


@over_images("(m,k),(t,k),(t)->(m)")
def overlap_weight(
    teacher_boxes: np.ndarray, target_boxes: np.ndarray, target_mask: np.ndarray, *, threshold: float = 0.0
) -> np.ndarray:
    """Return 1 + GIoU with the closest target where that is above the threshold, else 0."""
    weight = np.zeros(len(teacher_boxes))
    for m, box in enumerate(teacher_boxes):
        best = max((generalized_box_iou(box, target) for target in target_boxes[target_mask]), default=-1.0)
        weight[m] = 1.0 + best if best > threshold else 0.0
    return weight


@over_images("(m,c),(m,k),(t,k),(m)->(m)")
def localization_weight(
    teacher_logits: np.ndarray,
    teacher_boxes: np.ndarray,
    target_boxes: np.ndarray,
    teacher_assignment: np.ndarray,
    *,
    activation: str = "sigmoid",
) -> np.ndarray:
    """Return the IoU of each query with its target, and without a target its highest class score."""
    weight = confidence_weight(teacher_logits, activation=activation)
    for m, t in enumerate(teacher_assignment):
        if t != -1:
            weight[m] = box_iou(teacher_boxes[m], target_boxes[t])
    return weight


def shared_query_distillation_loss(
    student_logits: np.ndarray,
    student_boxes: np.ndarray,
    teacher_logits: np.ndarray,
    teacher_boxes: np.ndarray,
    *,
    weighting: str = "confidence",
    **options: Any,
) -> Terms:
    """Return the terms of pairs (k, k), weighted by the teacher's highest score of a class that the student has."""
    weight = np.ones(teacher_logits.shape[:-1])
    if weighting == "confidence":
        activation, class_map = options.get("teacher_activation", "sigmoid"), options.get("class_map")
        for query in np.ndindex(*weight.shape):
            # Classes that become one: the highest score of a sigmoid head, the sum of a softmax head.
            merged: dict[int, float] = {}
            scores = class_scores(teacher_logits[query], activation)
            for score, c in zip(scores, range(len(scores)) if class_map is None else class_map, strict=True):
                known = merged.get(c, 0.0)
                merged[c] = max(known, score) if activation == "sigmoid" else known + score
            merged.pop(-1, None)
            weight[query] = max(merged.values(), default=0.0)
    pairs = np.broadcast_to(np.arange(weight.shape[-1]), weight.shape)
    return hungarian_distillation_loss(
        student_logits, student_boxes, teacher_logits, teacher_boxes, pairs, teacher_weight=weight, **options
    )
