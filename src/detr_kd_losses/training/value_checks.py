"""Explicit checks of values. They wait for the device: for a data loader or a debug flag, not for every step."""

from __future__ import annotations

import torch
from torch import Tensor

from detr_kd_losses._validation import validate_dtype, validate_floating, validate_targets_shape

__all__ = ["check_finite", "check_targets"]


# Dimensions of a tensor, counted from the last, by how its name ends; so messages can say which image it was.
_AXES = {
    "target_boxes": ("image", "target", "coordinate"),
    "logits": ("stage", "image", "query", "class"),
    "boxes": ("stage", "image", "query", "coordinate"),
    "queries": ("stage", "image", "query", "channel"),
    "quality": ("stage", "image", "query"),
    "features": ("image", "channel", "row", "column"),
    "cost": ("stage", "image", "row", "column"),
}


def check_finite(**tensors: Tensor) -> None:
    """Raise if a tensor has an entry that is NaN or infinite; the message has its name and where it is.

    Args:
        **tensors: Floating-point tensors by name. For names that end in ``logits``, ``boxes``, ``queries``,
            ``quality``, ``features`` or ``cost``, the message says which stage, image and query it was.

    Raises:
        ValueError: Naming the tensor, the first such entry, its index, and how many there are.
        TypeError: If a value is not a floating-point tensor.

    Examples:
        >>> student_boxes = torch.zeros(6, 2, 300, 4)
        >>> check_finite(student_boxes=student_boxes)
        >>> student_boxes[5, 1, 7] = float("nan")
        >>> check_finite(student_boxes=student_boxes)
        Traceback (most recent call last):
        ValueError: `student_boxes` must be finite, got nan at index (5, 1, 7, 0) \
(stage 5, image 1, query 7, coordinate 0), the first of 4
    """
    for name, tensor in tensors.items():
        validate_floating(name, tensor)
        wrong = (~torch.isfinite(tensor)).nonzero()
        if len(wrong):
            index = tuple(wrong[0].tolist())
            axes = next((axes for ending, axes in _AXES.items() if name.endswith(ending)), ())
            where = _describe(index, axes)
            msg = f"`{name}` must be finite, got {tensor[index].item()} at {where}, the first of {len(wrong)}"
            raise ValueError(msg)


def _describe(index: tuple[int, ...], axes: tuple[str, ...]) -> str:
    """``index (5, 1) (stage 5, image 1)``, without names where they do not reach."""
    if not index or len(index) > len(axes):
        return f"index {index}"
    named = zip(axes[len(axes) - len(index) :], index, strict=True)
    return f"index {index} ({', '.join(f'{axis} {entry}' for axis, entry in named)})"


def check_targets(target_labels: Tensor, target_boxes: Tensor, target_mask: Tensor, *, num_classes: int) -> None:
    """Raise if a target's label is out of range or its box is not one in cxcywh in [0, 1].

    Padding may hold anything.

    Args:
        target_labels: (..., T) int64.
        target_boxes: (..., T, 4), cxcywh in [0, 1], but for a rounding of 8 eps of their dtype, at least of float32.
        target_mask: (..., T) bool, True = a target.
        num_classes: C, the number of classes without "no object".

    Raises:
        ValueError: Naming the argument, the rule, the first value against it, its image and target.
        TypeError: If a dtype does not fit.

    Examples:
        >>> check_targets(torch.tensor([[80]]), torch.rand(1, 1, 4), torch.tensor([[True]]), num_classes=80)
        Traceback (most recent call last):
        ValueError: `target_labels` must be in [0, 80), got 80 at index (0, 0) (image 0, target 0)
    """
    validate_dtype("target_labels", target_labels, torch.int64)
    validate_targets_shape(
        target_labels,
        target_boxes,
        target_mask,
        batch_shape=target_labels.shape[:-1],
        like=target_labels,
        like_name="target_labels",
    )
    size = target_boxes[..., 2:]
    # A box over the whole image, resized and divided in float32, is a few units of rounding larger.
    rounding = 8 * max(torch.finfo(dtype).eps for dtype in (target_boxes.dtype, torch.float32))
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
            ((target_boxes < -rounding) | (target_boxes > 1 + rounding)).any(-1),
        ),
    )
    for name, tensor, rule, broken in rules:
        wrong = (broken & target_mask).nonzero()
        if len(wrong):
            index = tuple(wrong[0].tolist())
            msg = f"`{name}` must {rule}, got {tensor[index].tolist()} at {_describe(index, ('image', 'target'))}"
            raise ValueError(msg)
