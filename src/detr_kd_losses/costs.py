"""Matching costs: how badly each student query fits each target or each teacher query."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from detr_kd_losses._labels import labels_fit
from detr_kd_losses._options import WEIGHTS, Rules, one_of, validate_options
from detr_kd_losses._precision import full_precision, full_precision_matmul, shared_precision
from detr_kd_losses._validation import (
    validate_batch,
    validate_both_predictions,
    validate_boxes,
    validate_dtype,
    validate_in_unit_interval,
    validate_not_negative,
    validate_predictions,
    validate_same_device,
    validate_same_shape,
)
from detr_kd_losses.boxes import box_cxcywh_to_xyxy, generalized_box_iou
from detr_kd_losses.heads import Activation, ClassCost, ClassMap, Heads

__all__ = ["detection_cost", "distillation_cost"]

# A logit beyond all that a cost could tell apart, far from overflow.
_LARGE = 1e30

COST_RULES: Rules = {
    "class_cost": one_of("focal", "softmax"),
    **WEIGHTS,
    "alpha": validate_in_unit_interval,
    "gamma": validate_not_negative,
}


def detection_cost(
    logits: Tensor,
    boxes: Tensor,
    target_labels: Tensor,
    target_boxes: Tensor,
    *,
    class_cost: ClassCost = "focal",
    weight_class: float = 2.0,
    weight_bbox: float = 5.0,
    weight_giou: float = 2.0,
    alpha: float = 0.25,
    gamma: float = 2.0,
) -> Tensor:
    r"""Cost of assigning each target to each query: class, L1 and GIoU.

    .. math:: C_{nt} = w_{class} D(z_n, c_t) + w_{bbox} |b_n - b_t|_1 - w_{giou} GIoU(b_n, b_t)

    With ``"focal"`` and :math:`p = σ(z_{n,c_t})`,
    :math:`D = α (1-p)^γ (-\log p) - (1-α) p^γ (-\log(1-p))`; with ``"softmax"``,
    :math:`D = -softmax(z_n)_{c_t}`. Half-precision inputs are computed in float32.

    Args:
        logits: (..., N, C), raw. A softmax head has "no object" as its last channel.
        boxes: (..., N, 4), cxcywh in [0, 1].
        target_labels: (..., T) int64. Leading dimensions may be fewer than those of `logits`: with stages,
            (L, B, N, C) and (B, T) go together. A negative label, as padding may have, counts as class 0.
        target_boxes: (..., T, 4), cxcywh in [0, 1].
        class_cost: ``"focal"`` for sigmoid heads, ``"softmax"`` for softmax heads.
        weight_class: Weight of the class cost.
        weight_bbox: Weight of the L1 distance of the boxes.
        weight_giou: Weight of the negative GIoU.
        alpha: Balance of the focal cost.
        gamma: Focus of the focal cost.

    Returns:
        (..., N, T).

    Raises:
        ValueError: If shapes, devices or `class_cost` do not fit.
        TypeError: If a dtype does not fit.

    Examples:
        >>> logits = torch.tensor([[4.0, -4.0], [-4.0, 4.0]])
        >>> boxes = torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.2, 0.2, 0.1, 0.1]])
        >>> detection_cost(logits, boxes, torch.tensor([1]), boxes[1:]).argmin(0).tolist()
        [1]

    References:
        Carion et al., "End-to-End Object Detection with Transformers", ECCV 2020, arXiv:2005.12872.
        Zhu et al., "Deformable DETR", ICLR 2021, arXiv:2010.04159.
    """
    validate_predictions("", logits, boxes)
    validate_options(
        COST_RULES,
        class_cost=class_cost,
        weight_class=weight_class,
        weight_bbox=weight_bbox,
        weight_giou=weight_giou,
        alpha=alpha,
        gamma=gamma,
    )
    validate_dtype("target_labels", target_labels, torch.int64)
    validate_boxes("target_boxes", target_boxes)
    validate_same_shape("target_labels", target_labels.shape, "target_boxes", target_boxes.shape[:-1], "(..., T)")
    validate_batch("target_labels", target_labels.shape[:-1], "logits", logits.shape[:-2])
    validate_same_device("logits", logits, target_labels=target_labels, target_boxes=target_boxes)
    logits = full_precision(logits)
    if class_cost == "focal":
        log_p, log_not_p = F.logsigmoid(logits), F.logsigmoid(-logits)
        positive = -alpha * (log_not_p * gamma).exp() * log_p
        negative = -(1 - alpha) * (log_p * gamma).exp() * log_not_p
        by_class = positive - negative
    else:
        by_class = -logits.softmax(-1)
    # (..., N, C) -> (..., N, T)
    num_classes = logits.shape[-1] - (class_cost == "softmax")
    known = target_labels < num_classes
    labels = target_labels.clamp(0, max(num_classes - 1, 0)).unsqueeze(-2)
    labels = labels.expand(*logits.shape[:-1], labels.shape[-1])
    by_label = by_class.gather(-1, labels)
    if labels_fit(target_labels, target_labels >= 0, num_classes) is not None:
        by_label = by_label.where(known.unsqueeze(-2), torch.nan)
    return weight_class * by_label + box_cost(boxes, target_boxes, weight_bbox=weight_bbox, weight_giou=weight_giou)


def distillation_cost(
    student_logits: Tensor,
    student_boxes: Tensor,
    teacher_logits: Tensor,
    teacher_boxes: Tensor,
    *,
    student_activation: Activation = "sigmoid",
    teacher_activation: Activation = "sigmoid",
    class_map: ClassMap | None = None,
    weight_class: float = 1.0,
    weight_bbox: float = 5.0,
    weight_giou: float = 2.0,
) -> Tensor:
    r"""Cost of pairing each teacher query with each student query: class, L1 and GIoU.

    .. math:: C_{nm} = w_{class} H(p_m, z_n) + w_{bbox} |b_n - b_m|_1 - w_{giou} GIoU(b_n, b_m)

    with `H` the cross-entropy of the student's logits against the teacher's scores `p`:
    :math:`\sum_c softplus(z_c) - z_c p_c` for a sigmoid student, :math:`-\sum_c p_c \log softmax(z)_c` for a
    softmax student. It is one matrix product; no (..., N, M, C) tensor is formed.

    Args:
        student_logits: (..., N, C), raw.
        student_boxes: (..., N, 4), cxcywh in [0, 1].
        teacher_logits: (..., M, C'), raw.
        teacher_boxes: (..., M, 4), cxcywh in [0, 1].
        student_activation: ``"sigmoid"``, or ``"softmax"`` for a head with "no object" as its last channel.
        teacher_activation: Head of the teacher, ``"sigmoid"`` or ``"softmax"``.
        class_map: Student class of each teacher class, -1 = dropped. None: both have the same classes.
        weight_class: Weight of the class cost.
        weight_bbox: Weight of the L1 distance of the boxes.
        weight_giou: Weight of the negative GIoU.

    Returns:
        (..., N, M).

    Raises:
        ValueError: If shapes, devices or options do not fit.
        TypeError: If a dtype does not fit.

    Examples:
        >>> logits = torch.tensor([[4.0, -4.0], [-4.0, 4.0]])
        >>> boxes = torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.2, 0.2, 0.1, 0.1]])
        >>> distillation_cost(logits, boxes, logits.flip(0), boxes.flip(0)).argmin(-1).tolist()
        [1, 0]

    References:
        Chang et al., "DETRDistill", ICCV 2023, arXiv:2211.10156, Eq. 3-4.
    """
    cost, _ = distillation_costs(
        student_logits,
        student_boxes,
        teacher_logits,
        teacher_boxes,
        student_activation=student_activation,
        teacher_activation=teacher_activation,
        class_map=class_map,
        weight_class=weight_class,
        weight_bbox=weight_bbox,
        weight_giou=weight_giou,
    )
    return cost


def distillation_costs(
    student_logits: Tensor,
    student_boxes: Tensor,
    teacher_logits: Tensor,
    teacher_boxes: Tensor,
    *,
    student_activation: Activation,
    teacher_activation: Activation,
    class_map: ClassMap | None,
    weight_class: float,
    weight_bbox: float,
    weight_giou: float,
) -> tuple[Tensor, Tensor]:
    """:func:`distillation_cost`, and the part of it that boxes alone have, each (..., N, M)."""
    validate_both_predictions(student_logits, student_boxes, teacher_logits, teacher_boxes)
    validate_options(WEIGHTS, weight_class=weight_class, weight_bbox=weight_bbox, weight_giou=weight_giou)
    by_box = box_cost(student_boxes, teacher_boxes, weight_bbox=weight_bbox, weight_giou=weight_giou)
    logits, teacher_logits = shared_precision(student_logits, teacher_logits)
    heads = Heads(student_activation, teacher_activation, class_map)
    heads.validate()
    scores = heads.teacher_log_scores(teacher_logits, logits).log_p.exp()
    logits = heads.forget_unknown_classes(logits, teacher_logits)
    # A product with a score of 0 must stay 0.
    logits = logits.clamp(-_LARGE, _LARGE)
    with full_precision_matmul(logits):
        if student_activation == "softmax":
            likelihood = logits.log_softmax(-1) @ scores.mT
        else:
            likelihood = F.logsigmoid(-logits).sum(-1, keepdim=True) + logits @ scores.mT
    return by_box - weight_class * likelihood, by_box


def box_cost(boxes: Tensor, other_boxes: Tensor, *, weight_bbox: float, weight_giou: float) -> Tensor:
    """L1 distance minus GIoU, weighted, of every box (..., N, 4) with every other box (..., M, 4), cxcywh."""
    boxes, other_boxes = shared_precision(boxes, other_boxes)
    giou = generalized_box_iou(box_cxcywh_to_xyxy(boxes), box_cxcywh_to_xyxy(other_boxes))
    distance = torch.zeros_like(giou)
    for one, other in zip(boxes.unbind(-1), other_boxes.unbind(-1), strict=True):
        distance = distance + (one.unsqueeze(-1) - other.unsqueeze(-2)).abs()
    return weight_bbox * distance - weight_giou * giou
