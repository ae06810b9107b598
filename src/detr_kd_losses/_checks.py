"""Checks of what a tensor says about itself (shape, dtype, device), never of its values.

Values are on the device; reading them would stall the training step. The explicit, synchronising
checks of values are `check_finite` and `check_targets`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

__all__: list[str] = []


def check_tensor(name: str, value: object) -> None:
    """Raise unless `value` is a tensor."""
    if not isinstance(value, Tensor):
        msg = f"`{name}` must be a torch.Tensor, got {type(value).__name__}"
        raise TypeError(msg)


def check_floating(name: str, tensor: Tensor) -> None:
    """Raise unless `tensor` is a floating-point tensor."""
    check_tensor(name, tensor)
    if not tensor.is_floating_point():
        msg = f"`{name}` must have a floating-point dtype, got {tensor.dtype}"
        raise TypeError(msg)


def check_dtype(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """Raise unless `tensor` has exactly `dtype`."""
    check_tensor(name, tensor)
    if tensor.dtype != dtype:
        msg = f"`{name}` must have dtype {dtype}, got {tensor.dtype}"
        raise TypeError(msg)


def check_ndim(name: str, tensor: Tensor, at_least: int, layout: str) -> None:
    """Raise unless `tensor` has at least `at_least` dimensions; `layout` says which, for the reader."""
    if tensor.ndim < at_least:
        msg = f"`{name}` must have shape {layout}, got {tuple(tensor.shape)}"
        raise ValueError(msg)


def check_logits(name: str, logits: Tensor) -> None:
    """Raise unless `logits` are floating and of shape (..., N, C) with at least one class."""
    check_floating(name, logits)
    check_ndim(name, logits, 2, "(..., N, C)")
    if logits.shape[-1] < 1:
        msg = f"`{name}` must have at least one class channel, got shape {tuple(logits.shape)}"
        raise ValueError(msg)


def check_boxes(name: str, boxes: Tensor) -> None:
    """Raise unless `boxes` are floating and of shape (..., N, 4)."""
    check_floating(name, boxes)
    if boxes.ndim < 2 or boxes.shape[-1] != 4:
        msg = f"`{name}` must have shape (..., N, 4), got {tuple(boxes.shape)}"
        raise ValueError(msg)


def check_predictions(prefix: str, logits: Tensor, boxes: Tensor) -> None:
    """Raise unless `<prefix>logits` (..., N, C) and `<prefix>boxes` (..., N, 4) belong together."""
    check_logits(f"{prefix}logits", logits)
    check_boxes(f"{prefix}boxes", boxes)
    check_same_shape(f"{prefix}logits", logits.shape[:-1], f"{prefix}boxes", boxes.shape[:-1], "(..., N)")
    check_same_device(f"{prefix}logits", logits, **{f"{prefix}boxes": boxes})


def check_targets_shape(
    labels: Tensor, boxes: Tensor, mask: Tensor, *, batch_shape: Sequence[int], like: Tensor, like_name: str
) -> None:
    """Raise unless the padded targets are (..., T), (..., T, 4), (..., T) and fit the predictions' batch."""
    check_dtype("target_labels", labels, torch.int64)
    check_boxes("target_boxes", boxes)
    check_dtype("target_mask", mask, torch.bool)
    check_ndim("target_labels", labels, 1, "(..., T)")
    check_same_shape("target_labels", labels.shape, "target_boxes", boxes.shape[:-1], "(..., T)")
    check_same_shape("target_labels", labels.shape, "target_mask", mask.shape, "(..., T)")
    check_same_device(like_name, like, target_labels=labels, target_boxes=boxes, target_mask=mask)
    check_batch("target_labels", labels.shape[:-1], like_name, batch_shape)


def check_batch(name: str, batch: Sequence[int], other: str, other_batch: Sequence[int]) -> None:
    """Raise unless `batch` equals the trailing batch dimensions of `other` (which may have stages in front)."""
    batch, other_batch = tuple(batch), tuple(other_batch)
    if len(batch) > len(other_batch) or batch != other_batch[len(other_batch) - len(batch) :]:
        msg = f"`{name}` must have the batch dimensions of `{other}` {other_batch}, got {batch}"
        raise ValueError(msg)


def check_same_shape(name: str, shape: Sequence[int], other: str, other_shape: Sequence[int], which: str) -> None:
    """Raise unless two shapes agree; `which` names the dimensions compared."""
    if tuple(shape) != tuple(other_shape):
        msg = (
            f"`{name}` and `{other}` must have the same dimensions {which}, got {tuple(shape)} and {tuple(other_shape)}"
        )
        raise ValueError(msg)


def check_same_device(name: str, tensor: Tensor, **others: Tensor | None) -> None:
    """Raise unless every tensor of `others` is on the device of `tensor`."""
    for other_name, other in others.items():
        if other is not None and other.device != tensor.device:
            msg = f"`{other_name}` must be on the device of `{name}` {tensor.device}, got {other.device}"
            raise ValueError(msg)


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise unless `value` is one of `choices`."""
    if value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        msg = f"`{name}` must be one of {listed}, got {value!r}"
        raise ValueError(msg)


def check_positive(name: str, value: float) -> None:
    """Raise unless `value` is a number above 0."""
    if not value > 0:
        msg = f"`{name}` must be greater than 0, got {value!r}"
        raise ValueError(msg)


def check_in_unit_interval(name: str, value: float) -> None:
    """Raise unless `value` is a number in [0, 1]."""
    if not 0 <= value <= 1:
        msg = f"`{name}` must be in [0, 1], got {value!r}"
        raise ValueError(msg)


def full_precision(tensor: Tensor) -> Tensor:
    """`tensor` in float32 if it is in half precision, else as it is (float64 stays float64)."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def shared_precision(*tensors: Tensor) -> list[Tensor]:
    """All tensors in the widest of their floating dtypes, at least float32."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return [tensor.to(dtype) for tensor in tensors]


def full_precision_matmul(tensor: Tensor) -> AbstractContextManager[object]:
    """Context in which matrix products on the device of `tensor` keep the precision of their inputs."""
    if not torch.amp.is_autocast_available(tensor.device.type):
        return nullcontext()
    return torch.autocast(device_type=tensor.device.type, enabled=False)
