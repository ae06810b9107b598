"""How good each teacher query is: the weights of target-aware feature distillation."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from detr_kd_losses._labels import labels_fit, nan_unless
from detr_kd_losses._options import Rules, validate_options
from detr_kd_losses._precision import shared_precision
from detr_kd_losses._validation import (
    validate_choice,
    validate_count,
    validate_in_unit_interval,
    validate_predictions,
    validate_targets_shape,
)
from detr_kd_losses.boxes import box_cxcywh_to_xyxy, box_iou
from detr_kd_losses.heads import ACTIVATIONS, Activation, log_scores
from detr_kd_losses.pairs import gather_partners, validate_assignment

__all__ = ["VARIANTS", "Variant", "query_quality"]

Variant = Literal["paper", "official"]

VARIANTS = ("paper", "official")
QUALITY_RULES: Rules = {"gamma": validate_in_unit_interval, "topk": validate_count}


@torch.no_grad()
def query_quality(
    teacher_logits: Tensor,
    teacher_boxes: Tensor,
    target_labels: Tensor,
    target_boxes: Tensor,
    target_mask: Tensor,
    teacher_assignment: Tensor,
    *,
    gamma: float = 0.5,
    activation: Activation = "sigmoid",
    variant: Variant = "paper",
    topk: int = 100,
) -> Tensor:
    r"""How well each teacher query detects its target: a weight for what it attends to.

    ``"paper"``: :math:`q_m = c_m^γ IoU_m^{1-γ}` with the score of the class of the target that the teacher's matching
    gives to the query, and the IoU with it; 0 for a query without target. ``"official"``, the public code's: the sum
    of the query's scores among the `topk` (query, class) scores of the image, times the best IoU with any target of
    the image (1 without targets).

    Args:
        teacher_logits: (..., M, C), raw; leading dimensions may have stages in front of those of the targets.
        teacher_boxes: (..., M, 4), cxcywh in [0, 1].
        target_labels: (..., T) int64, padded, in the classes of the teacher (:func:`map_class_logits`).
        target_boxes: (..., T, 4), cxcywh in [0, 1].
        target_mask: (..., T) bool, True = a target, False = padding.
        teacher_assignment: (..., M) int64: the target of each teacher query, -1 = none; from :func:`match_targets`.
        gamma: Balance of score and IoU in [0, 1], for ``"paper"``.
        activation: Head of the teacher: ``"sigmoid"``, or ``"softmax"`` with "no object" as its last channel.
        variant: ``"paper"`` or ``"official"``.
        topk: Number of (query, class) scores that count, for ``"official"``.

    Returns:
        (..., M), at least 0. Has no gradient.

    Raises:
        ValueError: If shapes, devices or options do not fit, or (on a CPU) a label is no class.
        TypeError: If a dtype does not fit.

    Examples:
        >>> logits, boxes = torch.tensor([[[8.0], [0.0]]]), torch.tensor([[[0.5] * 4, [0.2] * 4]])
        >>> labels, mask = torch.tensor([[0]]), torch.tensor([[True]])
        >>> query_quality(logits, boxes, labels, boxes[:, :1], mask, torch.tensor([[0, -1]])).round(decimals=2)
        tensor([[1., 0.]])

    References:
        Chang et al., "DETRDistill", ICCV 2023, arXiv:2211.10156, Eq. 8.
    """
    validate_predictions("teacher_", teacher_logits, teacher_boxes)
    validate_targets_shape(
        target_labels,
        target_boxes,
        target_mask,
        batch_shape=teacher_logits.shape[:-2],
        like=teacher_logits,
        like_name="teacher_logits",
    )
    validate_assignment(
        "teacher_assignment", teacher_assignment, "teacher_logits", teacher_logits, target_labels.shape[-1]
    )
    validate_options(QUALITY_RULES, gamma=gamma, topk=topk)
    validate_choice("activation", activation, ACTIVATIONS)
    validate_choice("variant", variant, VARIANTS)
    logits, boxes, target_boxes = shared_precision(teacher_logits, teacher_boxes, target_boxes)
    scores = log_scores(logits, activation).log_p.exp()
    if activation == "softmax":
        scores = scores[..., :-1]
    fit = labels_fit(target_labels, target_mask, scores.shape[-1])
    batch = logits.shape[:-2]
    iou = box_iou(box_cxcywh_to_xyxy(boxes), box_cxcywh_to_xyxy(target_boxes.expand(*batch, -1, -1)))
    mask = target_mask.expand(*batch, -1)
    if variant == "official":
        return nan_unless(fit, _top_scores(scores, topk) * _best_iou(iou, mask))
    # What the mask excludes is no target, whatever the assignment says.
    matched = (teacher_assignment >= 0) & gather_partners(mask, teacher_assignment)
    labels = gather_partners(target_labels.expand(*batch, -1), teacher_assignment).where(matched, 0)
    labels = labels.clamp(0, scores.shape[-1] - 1)
    score = scores.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    matched_iou = gather_partners(iou, teacher_assignment.unsqueeze(-1)).squeeze(-1)
    return nan_unless(fit, torch.where(matched, score**gamma * matched_iou ** (1 - gamma), 0.0))


def _top_scores(scores: Tensor, topk: int) -> Tensor:
    """Sum over classes of the scores (..., M, C) that are among the image's `topk`."""
    flat = scores.flatten(-2)
    top = flat.topk(min(topk, flat.shape[-1]), dim=-1)
    return torch.zeros_like(flat).scatter(-1, top.indices, top.values).view_as(scores).sum(-1)


def _best_iou(iou: Tensor, target_mask: Tensor) -> Tensor:
    """Best IoU (..., M) of each query with a valid target; 1 in an image without targets."""
    if iou.shape[-1] == 0:
        return iou.new_ones(iou.shape[:-1])
    valid = target_mask.unsqueeze(-2)
    return torch.where(valid.any(-1), torch.where(valid, iou, 0.0).amax(-1), 1.0)
