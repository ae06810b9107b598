"""Matching costs, Hungarian-matching logits distillation (Eq. 3-5) and the detection loss (Eq. 10's as well).

Only what a gradient flows to (student logits and boxes) may be `Var`; a stage axis may be left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from .autodiff import Scalar, log_softmax, sigmoid, softmax, softplus
from .geometry import generalized_box_iou, l1_distance, over_images, pairwise

__all__ = [
    "class_cross_entropy",
    "class_entropy",
    "detection_cost",
    "detection_loss",
    "distillation_cost",
    "focal_class_cost",
    "hungarian_distillation_loss",
    "location_cost",
    "official_logits_loss",
    "softmax_class_cost",
    "teacher_assigned_query_loss",
    "teacher_scores",
]


Terms = dict[str, Scalar]


def _stages(*arrays: np.ndarray | None) -> list[np.ndarray | None]:
    """Give (B, N, C) logits and all that goes with them a stage axis of one."""
    staged = arrays[0].ndim == 4
    return [array if staged or array is None else array[None] for array in arrays]


# The teacher's scores in the student's class space


def teacher_scores(
    logits: Sequence[float],
    num_student_channels: int,
    *,
    student_activation: str = "sigmoid",
    teacher_activation: str = "sigmoid",
    class_map: Sequence[int] | None = None,
    temperature: float = 1.0,
) -> tuple[list[float], list[bool]]:
    """Return one teacher query's score p of each student channel, and which channels the teacher knows.

    Softmax heads have the no-object class as their last channel. `class_map` gives each teacher class its
    student class, or -1: dropped.
    """
    logits = [z / temperature for z in logits]
    scores = [sigmoid(z) for z in logits] if teacher_activation == "sigmoid" else softmax(logits)
    no_object = scores.pop() if teacher_activation == "softmax" else 0.0
    num_classes = num_student_channels - (student_activation == "softmax")
    targets = range(num_classes) if class_map is None else class_map
    p = [0.0] * num_classes
    known = [False] * num_classes
    for score, c in zip(scores, targets, strict=True):
        if c == -1:
            no_object += score  # the mass of a softmax teacher must stay 1
        else:
            known[c] = True
            p[c] = max(p[c], score) if teacher_activation == "sigmoid" else p[c] + score
    if student_activation == "sigmoid":
        return p, known
    if teacher_activation == "sigmoid":
        mass = sum(p)
        p = [score / max(1.0, mass) for score in p]
        no_object = max(0.0, 1.0 - mass)
    return [*p, no_object], [*known, True]


def class_cross_entropy(logits: Sequence[Scalar], p: Sequence[float], known: Sequence[bool], activation: str) -> Scalar:
    """Return D_class of Eq. 3 between one student query and the teacher's scores, over the known channels.

    sigmoid: sum_c softplus(z_c) - z_c p_c = sum_c p_c softplus(-z_c) + (1 - p_c) softplus(z_c).
    softmax: -sum_c p_c log_softmax(z)_c.
    """
    pairs = [(z, p_c) for z, p_c, is_known in zip(logits, p, known, strict=True) if is_known]
    if activation == "sigmoid":
        return sum(p_c * softplus(-z) + (1.0 - p_c) * softplus(z) for z, p_c in pairs)
    return -sum(p_c * log_q for log_q, (_, p_c) in zip(log_softmax(z for z, _ in pairs), pairs, strict=True))


def class_entropy(p: Sequence[float], known: Sequence[bool], activation: str) -> float:
    """Return the teacher's part of D_class: what the student cannot get below."""

    def plogp(x: float) -> float:
        return x * math.log(x) if x > 0.0 else 0.0

    p = [p_c for p_c, is_known in zip(p, known, strict=True) if is_known]
    if activation == "sigmoid":
        return -sum(plogp(p_c) + plogp(1.0 - p_c) for p_c in p)
    return -sum(plogp(p_c) for p_c in p)


# Matching costs: no gradients, leading dimensions broadcast


def focal_class_cost(logits: Sequence[float], label: int, alpha: float = 0.25, gamma: float = 2.0) -> float:
    """Return alpha (1-p)^gamma (-log p) - (1-alpha) p^gamma (-log(1-p)), p = sigmoid of the label's logit."""
    z = logits[label]
    positive = alpha * sigmoid(-z) ** gamma * softplus(-z)
    negative = (1.0 - alpha) * sigmoid(z) ** gamma * softplus(z)
    return positive - negative


def softmax_class_cost(logits: Sequence[float], label: int) -> float:
    """Return -softmax(z)[label]."""
    return -softmax(logits)[label]


@over_images("(n,c),(n,k),(t),(t,k)->(n,t)")
def detection_cost(
    logits: np.ndarray,
    boxes: np.ndarray,
    target_labels: np.ndarray,
    target_boxes: np.ndarray,
    *,
    class_cost: str = "focal",
    weight_class: float = 2.0,
    weight_bbox: float = 5.0,
    weight_giou: float = 2.0,
    alpha: float = 0.25,
    gamma: float = 2.0,
) -> np.ndarray:
    """Return w_class * D_class + w_bbox * L1 - w_giou * GIoU of each query with each target."""

    def d_class(z: np.ndarray, label: int) -> float:
        if class_cost == "focal":
            return focal_class_cost(z, label, alpha, gamma)
        return softmax_class_cost(z, label)

    return weight_class * pairwise(d_class, logits, target_labels) + location_cost(
        boxes, target_boxes, weight_bbox=weight_bbox, weight_giou=weight_giou
    )


@over_images("(n,c),(n,k),(m,d),(m,k)->(n,m)")
def distillation_cost(
    student_logits: np.ndarray,
    student_boxes: np.ndarray,
    teacher_logits: np.ndarray,
    teacher_boxes: np.ndarray,
    *,
    student_activation: str = "sigmoid",
    teacher_activation: str = "sigmoid",
    class_map: Sequence[int] | None = None,
    weight_class: float = 1.0,
    weight_bbox: float = 5.0,
    weight_giou: float = 2.0,
) -> np.ndarray:
    """Return the matching cost of Eq. 3: w_class * D_class + w_bbox * L1 - w_giou * GIoU."""

    def d_class(student: np.ndarray, teacher: np.ndarray) -> float:
        p, known = teacher_scores(
            teacher,
            len(student),
            student_activation=student_activation,
            teacher_activation=teacher_activation,
            class_map=class_map,
        )
        return class_cross_entropy(student, p, known, student_activation)

    return weight_class * pairwise(d_class, student_logits, teacher_logits) + location_cost(
        student_boxes, teacher_boxes, weight_bbox=weight_bbox, weight_giou=weight_giou
    )


@over_images("(n,k),(m,k)->(n,m)")
def location_cost(
    student_boxes: np.ndarray,
    teacher_boxes: np.ndarray,
    *,
    weight_bbox: float = 5.0,
    weight_giou: float = 2.0,
) -> np.ndarray:
    """Return w_bbox * L1 - w_giou * GIoU, under which negative teacher queries are matched (Eq. 4)."""
    l1 = pairwise(l1_distance, student_boxes, teacher_boxes)
    giou = pairwise(generalized_box_iou, student_boxes, teacher_boxes)
    return weight_bbox * l1 - weight_giou * giou


# Losses


def hungarian_distillation_loss(
    student_logits: np.ndarray,
    student_boxes: np.ndarray,
    teacher_logits: np.ndarray,
    teacher_boxes: np.ndarray,
    assignment: np.ndarray,
    *,
    teacher_positive: np.ndarray | None = None,
    teacher_weight: np.ndarray | None = None,
    class_loss: str = "kl",
    student_activation: str = "sigmoid",
    teacher_activation: str = "sigmoid",
    class_map: Sequence[int] | None = None,
    temperature: float = 1.0,
    weight_class: float = 1.0,
    weight_bbox: float = 5.0,
    weight_giou: float = 2.0,
    weight_negative: float = 1.0,
    weight_negative_class: float = 0.0,
) -> Terms:
    """Return the three terms of Eq. 3 (positives) and Eq. 4 (negatives), summed over the stages (Eq. 5).

    With weights of the teacher queries, (L, B, M) or (B, M), a mean is sum(w term) / sum(w), 0 without weight.
    """
    if teacher_weight is not None:
        teacher_weight = np.broadcast_to(teacher_weight, teacher_logits.shape[:-1])
    _, teacher_weight = _stages(student_logits, teacher_weight)
    student_logits, student_boxes, teacher_logits, teacher_boxes, assignment, teacher_positive = _stages(
        student_logits, student_boxes, teacher_logits, teacher_boxes, assignment, teacher_positive
    )

    def d_class(z: np.ndarray, teacher: np.ndarray) -> Scalar:
        p, known = teacher_scores(
            teacher,
            len(z),
            student_activation=student_activation,
            teacher_activation=teacher_activation,
            class_map=class_map,
            temperature=temperature,
        )
        divergence = class_cross_entropy([z_c / temperature for z_c in z], p, known, student_activation)
        if class_loss == "kl":
            divergence = divergence - class_entropy(p, known, student_activation)
        return temperature**2 * divergence

    terms: Terms = {"loss_class": 0.0, "loss_bbox": 0.0, "loss_giou": 0.0}
    num_stages, num_images, num_queries = assignment.shape
    for k in range(num_stages):
        positives, negatives = [], []
        for b in range(num_images):
            for n in range(num_queries):
                m = assignment[k, b, n]
                if m != -1:
                    is_positive = teacher_positive is None or teacher_positive[k, b, m]
                    (positives if is_positive else negatives).append(((k, b, n), (k, b, m)))
        for pairs, class_share, box_share in (
            (positives, 1.0, 1.0),
            (negatives, weight_negative_class, weight_negative),
        ):
            weights = [1.0 if teacher_weight is None else teacher_weight[t] for _, t in pairs]
            count = sum(weights) or 1.0
            for (s, t), weight in zip(pairs, weights, strict=True):
                divergence = d_class(student_logits[s], teacher_logits[t])
                l1 = l1_distance(student_boxes[s], teacher_boxes[t])
                giou = generalized_box_iou(student_boxes[s], teacher_boxes[t])
                terms["loss_class"] += weight_class * class_share * weight * divergence / count
                terms["loss_bbox"] += weight_bbox * box_share * weight * l1 / count
                terms["loss_giou"] += weight_giou * box_share * weight * (1.0 - giou) / count
    return terms


def official_logits_loss(
    student_logits: np.ndarray,
    student_boxes: np.ndarray,
    teacher_logits: np.ndarray,
    teacher_boxes: np.ndarray,
    assignment: np.ndarray,
) -> Terms:
    """Return the public code's logits distillation (sigmoid heads), all arrays with a stage axis.

    Per layer: the mean over all matched pairs of sum_c BCE(z, sigmoid(teacher)), 5 L1 and 2 (1 - GIoU).
    """
    terms: Terms = {"loss_class": 0.0, "loss_bbox": 0.0, "loss_giou": 0.0}
    for layer in range(len(assignment)):
        num_pairs = sum(1 for m in assignment[layer].flat if m != -1)
        for (b, n), m in np.ndenumerate(assignment[layer]):
            if m == -1:
                continue
            for z, teacher_z in zip(student_logits[layer, b, n], teacher_logits[layer, b, m], strict=True):
                terms["loss_class"] += (softplus(z) - z * sigmoid(teacher_z)) / num_pairs
            box_s, box_t = student_boxes[layer, b, n], teacher_boxes[layer, b, m]
            terms["loss_bbox"] += 5.0 * l1_distance(box_s, box_t) / num_pairs
            terms["loss_giou"] += 2.0 * (1.0 - generalized_box_iou(box_s, box_t)) / num_pairs
    return terms


def _focal_loss(z: Scalar, is_target: bool, alpha: float, gamma: float) -> Scalar:
    """Return alpha_t (1 - p_t)^gamma (-log p_t), p_t = p on the target's class and 1 - p elsewhere."""
    if is_target:
        return alpha * sigmoid(-z) ** gamma * softplus(-z)
    return (1.0 - alpha) * sigmoid(z) ** gamma * softplus(z)


def detection_loss(
    logits: np.ndarray,
    boxes: np.ndarray,
    target_labels: np.ndarray,
    target_boxes: np.ndarray,
    target_mask: np.ndarray,
    assignment: np.ndarray,
    *,
    class_loss: str = "focal",
    alpha: float = 0.25,
    gamma: float = 2.0,
    no_object_weight: float = 0.1,
    weight_class: float = 1.0,
    weight_bbox: float = 5.0,
    weight_giou: float = 2.0,
) -> Terms:
    """Return class, 5 L1 and 2 (1 - GIoU) terms under the given assignment to the targets, stages summed.

    focal, L1 and GIoU are divided by the number of targets; cross-entropy is DETR's weighted mean.
    """
    logits, boxes, assignment = _stages(logits, boxes, assignment)
    num_targets = max(int(target_mask.sum()), 1)
    terms: Terms = {"loss_class": 0.0, "loss_bbox": 0.0, "loss_giou": 0.0}
    for stage in range(len(assignment)):
        class_sum, class_normalizer = 0.0, 0.0 if class_loss == "cross_entropy" else num_targets
        for (b, n), t in np.ndenumerate(assignment[stage]):
            z = logits[stage, b, n]
            label = target_labels[b, t] if t != -1 else None
            if class_loss == "focal":
                class_sum += sum(_focal_loss(z_c, c == label, alpha, gamma) for c, z_c in enumerate(z))
            else:
                weight = no_object_weight if label is None else 1.0
                class_sum -= weight * log_softmax(z)[-1 if label is None else label]
                class_normalizer += weight
            if t != -1:
                box, target = boxes[stage, b, n], target_boxes[b, t]
                terms["loss_bbox"] += weight_bbox * l1_distance(box, target) / num_targets
                terms["loss_giou"] += weight_giou * (1.0 - generalized_box_iou(box, target)) / num_targets
        if class_normalizer:
            terms["loss_class"] += weight_class * class_sum / class_normalizer
    return terms


# Eq. 10: the detection loss of the teacher's group of queries, under the teacher's own assignment.
teacher_assigned_query_loss = detection_loss
