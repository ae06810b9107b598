"""What every loss over matched pairs needs: partners gathered into the order of the queries, and box terms."""

from __future__ import annotations

import torch
from torch import Tensor

from detr_kd_losses._checks import check_dtype, check_same_device, check_same_shape
from detr_kd_losses.boxes import box_cxcywh_to_xyxy, paired_generalized_box_iou

__all__: list[str] = []


def check_assignment(name: str, assignment: Tensor, predictions_name: str, predictions: Tensor) -> None:
    """Raise unless `assignment` is int64 and has the dimensions (..., N) of `predictions` (..., N, C)."""
    check_dtype(name, assignment, torch.int64)
    check_same_shape(name, assignment.shape, predictions_name, predictions.shape[:-1], "(..., N)")
    check_same_device(predictions_name, predictions, **{name: assignment})


def check_batched(name: str, logits: Tensor) -> None:
    """Raise unless `logits` have a batch dimension, and perhaps stages before it."""
    if logits.ndim not in (3, 4):
        msg = f"`{name}` must have shape (L, B, N, C) or (B, N, C), got {tuple(logits.shape)}"
        raise ValueError(msg)


def gather_partners(values: Tensor, assignment: Tensor) -> Tensor:
    """`values` (..., M) or (..., M, K) in the order of `assignment` (..., N); unmatched queries get entry 0.

    Without partners at all (M = 0) they get zeros.
    """
    trailing = values.shape[assignment.ndim :]
    if values.shape[assignment.ndim - 1] == 0:
        return values.new_zeros((*assignment.shape, *trailing))
    index = assignment.clamp(min=0)
    if trailing:
        index = index.unsqueeze(-1).expand(*assignment.shape, *trailing)
    return values.gather(assignment.ndim - 1, index)


def box_terms(boxes: Tensor, partners: Tensor) -> tuple[Tensor, Tensor]:
    """L1 distance and 1 - GIoU of each box (..., N, 4) and its partner, cxcywh -> two tensors (..., N)."""
    giou = paired_generalized_box_iou(box_cxcywh_to_xyxy(boxes), box_cxcywh_to_xyxy(partners))
    return (boxes - partners).abs().sum(-1), 1 - giou
