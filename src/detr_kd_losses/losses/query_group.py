"""The teacher's queries as an extra group of the student's decoder, under the teacher's own assignment."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from detr_kd_losses.heads import DetectionClassLoss
from detr_kd_losses.losses.detection import DetectionLoss, detection_loss, validate_supervision

__all__ = ["TeacherAssignedQueryLoss", "query_group_attention_mask", "teacher_assigned_query_loss"]


def teacher_assigned_query_loss(
    group_logits: Tensor,
    group_boxes: Tensor,
    target_labels: Tensor,
    target_boxes: Tensor,
    target_mask: Tensor,
    teacher_assignment: Tensor,
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
    r"""Supervise the student's predictions for the teacher's queries with the teacher's assignment.

    The teacher's queries run through the student's decoder as a separate group (see
    :func:`query_group_attention_mask`). Query `m` of the group learns the target that the teacher's matching gave
    to query `m` of the teacher, layer by layer; nothing is matched afresh. The terms are those of
    :func:`detection_loss`.

    Args:
        group_logits: (L, B, M, C) or (B, M, C), the student's raw class predictions for the teacher's queries.
        group_boxes: (L, B, M, 4) or (B, M, 4), cxcywh in [0, 1].
        target_labels: (B, T) int64, padded.
        target_boxes: (B, T, 4), cxcywh in [0, 1].
        target_mask: (B, T) bool, True = a target, False = padding.
        teacher_assignment: (L, B, M) or (B, M) int64: the target of each teacher query, -1 = none; from
            :func:`match_targets` on the teacher's predictions, in the student's depth (:func:`select_stages`).
        query_mask: (B, M) or (L, B, M) bool, True = a query, False = padding, which has no part. None: all are queries.
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
        >>> teacher_assignment = torch.tensor([[0, -1]])
        >>> losses = teacher_assigned_query_loss(logits, boxes, labels, boxes[:, :1], mask, teacher_assignment)
        >>> round(abs(sum(losses.values()).item()), 4)
        0.0

    References:
        Chang et al., "DETRDistill", ICCV 2023, arXiv:2211.10156, Eq. 10.
    """
    validate_supervision(
        "group_",
        group_logits,
        group_boxes,
        target_labels,
        target_boxes,
        target_mask,
        "teacher_assignment",
        teacher_assignment,
    )
    return detection_loss(
        group_logits,
        group_boxes,
        target_labels,
        target_boxes,
        target_mask,
        teacher_assignment,
        query_mask=query_mask,
        class_loss=class_loss,
        alpha=alpha,
        gamma=gamma,
        no_object_weight=no_object_weight,
        weight_class=weight_class,
        weight_bbox=weight_bbox,
        weight_giou=weight_giou,
        sync_normalizer=sync_normalizer,
    )


class TeacherAssignedQueryLoss(DetectionLoss):
    """Module form of :func:`teacher_assigned_query_loss`, with the same options and defaults.

    Examples:
        >>> TeacherAssignedQueryLoss().class_loss
        'focal'
    """

    def forward(
        self,
        group_logits: Tensor,
        group_boxes: Tensor,
        target_labels: Tensor,
        target_boxes: Tensor,
        target_mask: Tensor,
        teacher_assignment: Tensor,
        *,
        query_mask: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """See :func:`teacher_assigned_query_loss`."""
        return teacher_assigned_query_loss(
            group_logits,
            group_boxes,
            target_labels,
            target_boxes,
            target_mask,
            teacher_assignment,
            query_mask=query_mask,
            **self.call_options,
        )


def query_group_attention_mask(group_sizes: Sequence[int], *, device: torch.device | str | None = None) -> Tensor:
    """Self-attention mask that keeps groups of queries apart, as `attn_mask` of `nn.MultiheadAttention`.

    Args:
        group_sizes: Number of queries of each group, in the order of concatenation.
        device: Device of the mask.

    Returns:
        (Q, Q) bool with Q the sum of the sizes, True = must not attend.

    Raises:
        ValueError: If a size is negative.
        TypeError: If it is no whole number.

    Examples:
        >>> query_group_attention_mask([1, 2]).int().tolist()
        [[0, 1, 1], [1, 0, 0], [1, 0, 0]]
    """
    sizes = list(group_sizes)
    if not all(isinstance(size, int | np.integer) for size in sizes):
        msg = f"`group_sizes` must be whole numbers, at least 0, got {sizes}"
        raise TypeError(msg)
    if any(size < 0 for size in sizes):
        msg = f"`group_sizes` must not be negative, got {sizes}"
        raise ValueError(msg)
    blocks = [torch.full((size,), group, device=device) for group, size in enumerate(sizes)]
    group = torch.cat(blocks) if blocks else torch.empty(0, device=device)
    return group.unsqueeze(1) != group.unsqueeze(0)
