"""How much each teacher query counts: published weights, functions of what the teacher predicts."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from detr_kd_losses._precision import full_precision, shared_precision
from detr_kd_losses._validation import (
    validate_batch,
    validate_boxes,
    validate_choice,
    validate_dtype,
    validate_in_unit_interval,
    validate_logits,
    validate_number,
    validate_positive,
    validate_predictions,
    validate_same_device,
    validate_same_shape,
)
from detr_kd_losses.boxes import box_cxcywh_to_xyxy, generalized_box_iou, paired_box_iou
from detr_kd_losses.heads import ACTIVATIONS, Activation
from detr_kd_losses.pairs import gather_partners, validate_assignment

__all__ = ["best_queries", "confidence_weight", "localization_weight", "overlap_weight"]


@torch.no_grad()
def confidence_weight(teacher_logits: Tensor, *, activation: Activation = "sigmoid") -> Tensor:
    r"""The highest class score of each teacher query, "no object" apart: KD-DETR's weight of foreground.

    .. math:: w_m = \max_c p_{mc}

    Args:
        teacher_logits: (..., M, C), raw.
        activation: Head of the teacher: ``"sigmoid"``, or ``"softmax"`` with "no object" as its last channel.

    Returns:
        (..., M) in [0, 1]. Has no gradient.

    Raises:
        ValueError: If `teacher_logits` have no class, or `activation` is unknown.
        TypeError: If a dtype does not fit.

    Examples:
        >>> confidence_weight(torch.tensor([[2.0, -1.0], [-3.0, 0.0]])).round(decimals=2)
        tensor([0.8800, 0.5000])

    References:
        Wang et al., "KD-DETR: Knowledge Distillation for Detection Transformer with Consistent Distillation Points
        Sampling", CVPR 2024, arXiv:2211.08071.
    """
    validate_logits("teacher_logits", teacher_logits)
    validate_choice("activation", activation, ACTIVATIONS)
    logits = full_precision(teacher_logits)
    if activation == "sigmoid":
        return logits.amax(-1).sigmoid()
    scores = logits.softmax(-1)[..., :-1]
    return scores.amax(-1) if scores.shape[-1] else scores.sum(-1)


@torch.no_grad()
def best_queries(teacher_logits: Tensor, share: float, *, activation: Activation = "sigmoid") -> Tensor:
    """The queries of which a teacher is surest, by :func:`confidence_weight`: the ``group_index`` of a smaller group.

    Args:
        teacher_logits: (..., M, C), raw; mostly of the last decoder layer, (B, M, C).
        share: How many of the M, above 0 and at most 1; rounded up.
        activation: Head of the teacher: ``"sigmoid"``, or ``"softmax"`` with "no object" as its last channel.

    Returns:
        (..., K) int64, the surest first, with K = ceil(`share` M).

    Raises:
        ValueError: If `teacher_logits` have no class, or an option does not fit.
        TypeError: If a dtype does not fit.

    Examples:
        >>> best_queries(torch.tensor([[[2.0], [-1.0], [3.0]]]), 0.5)
        tensor([[2, 0]])
    """
    validate_in_unit_interval("share", share)
    validate_positive("share", share)
    confidence = confidence_weight(teacher_logits, activation=activation)
    # Rounded first: a third of 300 is 100, however the third is written.
    number = math.ceil(round(share * confidence.shape[-1], 6))
    return confidence.topk(number, dim=-1).indices


@torch.no_grad()
def overlap_weight(
    teacher_boxes: Tensor, target_boxes: Tensor, target_mask: Tensor, *, threshold: float = 0.0
) -> Tensor:
    r"""1 + GIoU with the closest target: QSKD's weight, which finds hard negatives beside the positives.

    .. math:: w_m = 1 + g_m \text{ where } g_m = \max_t GIoU(b_m, b_t) > threshold, \text{ else } 0

    Args:
        teacher_boxes: (..., M, 4), cxcywh in [0, 1]; leading dimensions may have stages in front of those of targets.
        target_boxes: (..., T, 4), cxcywh in [0, 1], padded.
        target_mask: (..., T) bool, True = a target, False = padding.
        threshold: GIoU in [-1, 1) above which a query counts; -1: all of images with targets.

    Returns:
        (..., M) in [0, 2]; 0 in an image without targets. Has no gradient.

    Raises:
        ValueError: If shapes, devices or `threshold` do not fit.
        TypeError: If a dtype does not fit.

    Examples:
        >>> boxes = torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.5, 0.5, 0.2, 0.4], [0.1, 0.1, 0.1, 0.1]])
        >>> overlap_weight(boxes, boxes[:1], torch.tensor([True])).round(decimals=4)
        tensor([2.0000, 1.5000, 0.0000])

    References:
        Liu et al., "Knowledge Distillation via Query Selection for Detection Transformer", 2024, arXiv:2409.06443.
    """
    validate_boxes("teacher_boxes", teacher_boxes)
    _validate_target_boxes(target_boxes, "teacher_boxes", teacher_boxes)
    validate_dtype("target_mask", target_mask, torch.bool)
    validate_same_shape("target_boxes", target_boxes.shape[:-1], "target_mask", target_mask.shape, "(..., T)")
    validate_same_device("teacher_boxes", teacher_boxes, target_mask=target_mask)
    validate_number("threshold", threshold)
    if not -1 <= threshold < 1:
        msg = f"`threshold` must be in [-1, 1), got {threshold!r}"
        raise ValueError(msg)
    boxes, targets = shared_precision(teacher_boxes, target_boxes)
    giou = generalized_box_iou(box_cxcywh_to_xyxy(boxes), box_cxcywh_to_xyxy(targets))
    giou = giou.where(target_mask.unsqueeze(-2), -1.0)
    # A column of its own for an image without targets, which a maximum needs.
    best = torch.cat((giou, giou.new_full((*giou.shape[:-1], 1), -1.0)), dim=-1).amax(-1)
    return torch.where(best > threshold, 1 + best, 0.0)


@torch.no_grad()
def localization_weight(
    teacher_logits: Tensor,
    teacher_boxes: Tensor,
    target_boxes: Tensor,
    teacher_assignment: Tensor,
    *,
    activation: Activation = "sigmoid",
) -> Tensor:
    r"""How well a teacher query locates: its IoU with its target or, without one, its :func:`confidence_weight`.

    .. math:: w_m = IoU(b_m, b_{t(m)}) \text{ where } m \text{ has a target, else } \max_c p_{mc}

    D-FINE weighs its self-distillation of box distributions by it.

    Args:
        teacher_logits: (..., M, C), raw; leading dimensions may have stages in front of those of the targets.
        teacher_boxes: (..., M, 4), cxcywh in [0, 1].
        target_boxes: (..., T, 4), cxcywh in [0, 1], padded.
        teacher_assignment: (..., M) int64: the target of each teacher query, -1 = none; from :func:`match_targets`.
        activation: Head of the teacher: ``"sigmoid"``, or ``"softmax"`` with "no object" as its last channel.

    Returns:
        (..., M) in [0, 1]. Has no gradient.

    Raises:
        ValueError: If shapes, devices or options do not fit.
        TypeError: If a dtype does not fit.

    Examples:
        >>> logits, boxes = torch.tensor([[2.0], [0.0]]), torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.5, 0.5, 0.2, 0.4]])
        >>> localization_weight(logits, boxes, boxes[1:], torch.tensor([0, -1])).round(decimals=4)
        tensor([0.5000, 0.5000])

    References:
        Peng et al., "D-FINE: Redefine Regression Task in DETRs as Fine-grained Distribution Refinement", ICLR 2025,
        arXiv:2410.13842.
    """
    validate_predictions("teacher_", teacher_logits, teacher_boxes)
    validate_assignment(
        "teacher_assignment", teacher_assignment, "teacher_logits", teacher_logits, target_boxes.shape[-2]
    )
    _validate_target_boxes(target_boxes, "teacher_boxes", teacher_boxes)
    confidence = confidence_weight(teacher_logits, activation=activation)
    boxes, target_boxes, confidence = shared_precision(teacher_boxes, target_boxes, confidence)
    matched = teacher_assignment >= 0
    targets = gather_partners(target_boxes.expand(*boxes.shape[:-2], -1, -1), teacher_assignment)
    iou = paired_box_iou(box_cxcywh_to_xyxy(boxes), box_cxcywh_to_xyxy(targets.where(matched.unsqueeze(-1), 0.0)))
    return torch.where(matched, iou, confidence)


def _validate_target_boxes(target_boxes: Tensor, predictions_name: str, predictions: Tensor) -> None:
    """Raise unless `target_boxes` (..., T, 4) are of the images of the predictions (..., M, 4)."""
    validate_boxes("target_boxes", target_boxes)
    validate_batch("target_boxes", target_boxes.shape[:-2], predictions_name, predictions.shape[:-2])
    validate_same_device(predictions_name, predictions, target_boxes=target_boxes)
