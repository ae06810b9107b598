"""The detection loss of DETR and Deformable DETR, under a given assignment."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from detr_kd_losses._labels import labels_fit, nan_unless
from detr_kd_losses._options import WEIGHTS, OptionModule, Rules, boolean, one_of, validate_options
from detr_kd_losses._precision import shared_precision
from detr_kd_losses._reduction import masked_sum, replica_means, sum_last
from detr_kd_losses._validation import (
    validate_in_unit_interval,
    validate_not_negative,
    validate_predictions,
    validate_targets_shape,
)
from detr_kd_losses.heads import DetectionClassLoss
from detr_kd_losses.pairs import box_terms, gather_partners, validate_assignment, validate_batched, validated_mask

__all__ = ["DetectionLoss", "detection_loss"]

RULES: Rules = {
    "class_loss": one_of("focal", "cross_entropy"),
    "alpha": validate_in_unit_interval,
    "gamma": validate_not_negative,
    "no_object_weight": validate_not_negative,
    **WEIGHTS,
    "sync_normalizer": boolean,
}


def detection_loss(
    logits: Tensor,
    boxes: Tensor,
    target_labels: Tensor,
    target_boxes: Tensor,
    target_mask: Tensor,
    assignment: Tensor,
    *,
    query_mask: Tensor | None = None,
    class_loss: DetectionClassLoss = "focal",
    alpha: float = 0.25,
    gamma: float = 2.0,
    no_object_weight: float = 0.1,
    weight_class: float = 1.0,
    weight_bbox: float = 5.0,
    weight_giou: float = 2.0,
    sync_normalizer: bool = True,
) -> dict[str, Tensor]:
    r"""Supervise queries with the targets that an assignment gives them: class, L1 and GIoU.

    .. math::
        L = \sum_l w_{class} L_{class} + \frac{1}{T} \sum_{(n,t)} w_{bbox} |b_n - b_t|_1
            + w_{giou} (1 - GIoU(b_n, b_t))

    over the decoder layers `l`, with `T` the number of targets in the batch, at least 1. ``"focal"``:
    :math:`L_{class} = \frac{1}{T} \sum -α_t (1 - p_t)^γ \log p_t` over all images, queries and classes.
    ``"cross_entropy"``: DETR's mean over all queries, weighted by `no_object_weight` where there is no target. Equal
    to the criterions of Deformable DETR and DETR in one process; in several, both normalisers are averaged over
    replicas. Half-precision inputs are computed in float32.

    Args:
        logits: (L, B, N, C) or (B, N, C), raw. A softmax head has "no object" as its last channel.
        boxes: (L, B, N, 4) or (B, N, 4), cxcywh in [0, 1].
        target_labels: (B, T) int64, padded.
        target_boxes: (B, T, 4), cxcywh in [0, 1].
        target_mask: (B, T) bool, True = a target, False = padding.
        assignment: (L, B, N) or (B, N) int64: the target of each query, -1 = none; from :func:`match_targets`.
        query_mask: (B, N) or (L, B, N) bool, True = a query, False = padding, which has no part. None: all are queries.
        class_loss: ``"focal"`` for sigmoid heads, ``"cross_entropy"`` for softmax heads.
        alpha: Balance of the focal loss.
        gamma: Focus of the focal loss.
        no_object_weight: Weight of a query without target in the cross-entropy.
        weight_class: Weight of the class term.
        weight_bbox: Weight of the L1 distance.
        weight_giou: Weight of 1 - GIoU.
        sync_normalizer: Whether the normalisers are averaged over replicas when torch.distributed is initialised
            and gradients are enabled.

    Returns:
        ``{"loss_class", "loss_bbox", "loss_giou"}``, scalars, already weighted: the loss is their sum.

    Raises:
        ValueError: If shapes, devices or options do not fit, or (on a CPU) a label is no class.
        TypeError: If a dtype does not fit.

    Examples:
        >>> logits, boxes = torch.tensor([[[9.0, -9.0], [-9.0, -9.0]]]), torch.rand(1, 2, 4)
        >>> labels, mask = torch.tensor([[0]]), torch.tensor([[True]])
        >>> losses = detection_loss(logits, boxes, labels, boxes[:, :1], mask, torch.tensor([[0, -1]]))
        >>> round(abs(sum(losses.values()).item()), 4)
        0.0

    References:
        Carion et al., "End-to-End Object Detection with Transformers", ECCV 2020, arXiv:2005.12872.
        Zhu et al., "Deformable DETR", ICLR 2021, arXiv:2010.04159.
    """
    validate_supervision("", logits, boxes, target_labels, target_boxes, target_mask, "assignment", assignment)
    validate_options(
        RULES,
        class_loss=class_loss,
        alpha=alpha,
        gamma=gamma,
        no_object_weight=no_object_weight,
        weight_class=weight_class,
        weight_bbox=weight_bbox,
        weight_giou=weight_giou,
        sync_normalizer=sync_normalizer,
    )
    logits, boxes, target_boxes = shared_precision(logits, boxes, target_boxes)

    stages_and_batch = assignment.shape[:-1]
    num_classes = logits.shape[-1] - (class_loss == "cross_entropy")
    fit = labels_fit(target_labels, target_mask, num_classes)
    target_boxes = target_boxes.detach().expand(*stages_and_batch, -1, -1)
    # What the mask excludes is no target, whatever the assignment says.
    matched = (assignment >= 0) & gather_partners(target_mask.expand(*stages_and_batch, -1), assignment)
    if query_mask is not None:
        query_mask = validated_mask("query_mask", query_mask, "logits", logits)
        matched, logits = matched & query_mask, logits.where(query_mask.unsqueeze(-1), 0.0)
    labels = gather_partners(target_labels.expand(*stages_and_batch, -1), assignment)
    num_targets = target_mask.sum().to(logits.dtype)

    if class_loss == "focal":
        (num_targets,) = replica_means(num_targets, sync=sync_normalizer)
        is_class = (torch.arange(logits.shape[-1], device=logits.device) == labels.unsqueeze(-1)) & matched.unsqueeze(
            -1
        )
        focal = _focal(logits, is_class, alpha, gamma).sum(-1)
        loss_class = sum_last(focal if query_mask is None else focal.where(query_mask, 0.0), 2) / num_targets
    else:
        weight = torch.full_like(boxes[..., 0], no_object_weight).masked_fill(matched, 1.0)
        weight = weight if query_mask is None else weight.where(query_mask, 0.0)
        floors = 1.0, torch.finfo(logits.dtype).tiny
        num_targets, total = replica_means(num_targets, sum_last(weight, 2), sync=sync_normalizer, at_least=floors)
        loss_class = sum_last(_cross_entropy(logits, labels, matched, weight), 2) / total

    box_mask = matched.unsqueeze(-1)
    distance, overlap = box_terms(
        boxes.where(box_mask, 0.0), gather_partners(target_boxes, assignment).where(box_mask, 0.0)
    )
    return {
        "loss_class": weight_class * nan_unless(fit, loss_class.sum()),
        "loss_bbox": weight_bbox * (masked_sum(distance, matched, 2) / num_targets).sum(),
        "loss_giou": weight_giou * (masked_sum(overlap, matched, 2) / num_targets).sum(),
    }


def validate_supervision(
    prefix: str,
    logits: Tensor,
    boxes: Tensor,
    target_labels: Tensor,
    target_boxes: Tensor,
    target_mask: Tensor,
    assignment_name: str,
    assignment: Tensor,
) -> None:
    """Raise unless predictions, targets and assignment fit; `prefix` is that of the predictions' names."""
    name = f"{prefix}logits"
    validate_predictions(prefix, logits, boxes)
    validate_batched(name, logits)
    validate_targets_shape(
        target_labels,
        target_boxes,
        target_mask,
        batch_shape=logits.shape[:-2],
        like=logits,
        like_name=name,
    )
    # One set of targets for all stages: their number is what the terms are divided by.
    if target_labels.shape[:-1] != logits.shape[-3:-2]:
        msg = (
            f"`target_labels` must have shape (B, T) with the batch of `{name}` {tuple(logits.shape)}, "
            f"got {tuple(target_labels.shape)}"
        )
        raise ValueError(msg)
    validate_assignment(assignment_name, assignment, name, logits, target_labels.shape[-1])


def _focal(logits: Tensor, is_class: Tensor, alpha: float, gamma: float) -> Tensor:
    """Sigmoid focal loss of each channel, from log-probabilities alone."""
    signed = torch.where(is_class, logits, -logits)
    weight = torch.full_like(logits, 1 - alpha).masked_fill(is_class, alpha)
    focus = (gamma * F.logsigmoid(-signed)).exp() if gamma else 1.0  # 0 times the logarithm of 0 is 0
    return -weight * focus * F.logsigmoid(signed)


def _cross_entropy(logits: Tensor, labels: Tensor, matched: Tensor, weight: Tensor) -> Tensor:
    """Cross-entropy of each query (..., N) times its `weight`; the label of a query without target is "no object"."""
    no_object = logits.shape[-1] - 1
    labels = torch.where(matched, labels.clamp(0, max(no_object - 1, 0)), no_object)
    surprise = -logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return torch.where(weight == 0, 0.0, weight * surprise)


class DetectionLoss(OptionModule):
    """Module form of :func:`detection_loss`, with the same options and defaults.

    Examples:
        >>> DetectionLoss(class_loss="cross_entropy").no_object_weight
        0.1
    """

    rules = RULES

    def __init__(
        self,
        *,
        class_loss: DetectionClassLoss = "focal",
        alpha: float = 0.25,
        gamma: float = 2.0,
        no_object_weight: float = 0.1,
        weight_class: float = 1.0,
        weight_bbox: float = 5.0,
        weight_giou: float = 2.0,
        sync_normalizer: bool = True,
    ) -> None:
        super().__init__(
            class_loss=class_loss,
            alpha=alpha,
            gamma=gamma,
            no_object_weight=no_object_weight,
            weight_class=weight_class,
            weight_bbox=weight_bbox,
            weight_giou=weight_giou,
            sync_normalizer=sync_normalizer,
        )

    def forward(
        self,
        logits: Tensor,
        boxes: Tensor,
        target_labels: Tensor,
        target_boxes: Tensor,
        target_mask: Tensor,
        assignment: Tensor,
        *,
        query_mask: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """See :func:`detection_loss`."""
        targets = target_labels, target_boxes, target_mask
        return detection_loss(logits, boxes, *targets, assignment, query_mask=query_mask, **self.call_options)
