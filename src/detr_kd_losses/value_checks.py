"""Explicit checks of values. They wait for the device: for a data loader or a debug flag, not for every step."""

from __future__ import annotations

import torch
from torch import Tensor

from detr_kd_losses._checks import check_dtype, check_floating, check_targets_shape

__all__ = ["check_finite", "check_targets"]


def check_finite(**tensors: Tensor) -> None:
    """Raise if a tensor has an entry that is NaN or infinite; the message has its name and the first index.

    Args:
        **tensors: Floating-point tensors by name.

    Raises:
        ValueError: Naming the tensor, the index of the first such entry, its value, and how many there are.
        TypeError: If a value is not a floating-point tensor.

    Examples:
        >>> check_finite(boxes=torch.zeros(2, 4))
        >>> check_finite(boxes=torch.tensor([[0.5, float("nan")]]))
        Traceback (most recent call last):
        ValueError: `boxes` must be finite, got nan at index (0, 1), the first of 1
    """
    for name, tensor in tensors.items():
        check_floating(name, tensor)
        wrong = (~torch.isfinite(tensor)).nonzero()
        if len(wrong):
            index = tuple(wrong[0].tolist())
            msg = f"`{name}` must be finite, got {tensor[index].item()} at index {index}, the first of {len(wrong)}"
            raise ValueError(msg)


def check_targets(target_labels: Tensor, target_boxes: Tensor, target_mask: Tensor, *, num_classes: int) -> None:
    """Raise if a target's label is out of range or its box is not one in cxcywh in [0, 1].

    Padding may hold anything.

    Args:
        target_labels: (..., T) int64.
        target_boxes: (..., T, 4), cxcywh in [0, 1].
        target_mask: (..., T) bool, True = a target.
        num_classes: C, the number of classes without "no object".

    Raises:
        ValueError: Naming the argument, the rule, the first value against it and its index.
        TypeError: If a dtype does not fit.

    Examples:
        >>> check_targets(torch.tensor([[80]]), torch.rand(1, 1, 4), torch.tensor([[True]]), num_classes=80)
        Traceback (most recent call last):
        ValueError: `target_labels` must be in [0, 80), got 80 at index (0, 0)
    """
    check_dtype("target_labels", target_labels, torch.int64)
    check_targets_shape(
        target_labels,
        target_boxes,
        target_mask,
        batch_shape=target_labels.shape[:-1],
        like=target_labels,
        like_name="target_labels",
    )
    size = target_boxes[..., 2:]
    rules = (
        (
            "target_labels",
            target_labels,
            f"be in [0, {num_classes})",
            (target_labels < 0) | (target_labels >= num_classes),
        ),
        ("target_boxes", target_boxes, "be finite", ~torch.isfinite(target_boxes).all(-1)),
        ("target_boxes", target_boxes, "have a positive width and height", (size <= 0).any(-1)),
        (
            "target_boxes",
            target_boxes,
            "be cxcywh in [0, 1]",
            ((target_boxes < 0) | (target_boxes > 1)).any(-1),
        ),
    )
    for name, tensor, rule, broken in rules:
        wrong = (broken & target_mask).nonzero()
        if len(wrong):
            index = tuple(wrong[0].tolist())
            msg = f"`{name}` must {rule}, got {tensor[index].tolist()} at index {index}"
            raise ValueError(msg)
