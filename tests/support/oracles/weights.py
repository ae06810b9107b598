"""How much each teacher query counts: published weights, query by query."""

from __future__ import annotations

import numpy as np

from .features import class_scores
from .geometry import box_iou, generalized_box_iou, over_images

__all__ = ["confidence_weight", "localization_weight", "overlap_weight"]


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
