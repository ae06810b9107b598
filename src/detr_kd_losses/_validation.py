"""Validation of arguments by what they say about themselves (type, shape, dtype, device), never by their values.

Values are on the device; reading them would stall the training step. `check_finite` and `check_targets` check values,
and wait for the device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

__all__: list[str] = []


def validate_tensor(name: str, value: object) -> None:
    """Raise unless `value` is a tensor."""
    if not isinstance(value, Tensor):
        msg = f"`{name}` must be a torch.Tensor, got {type(value).__name__}"
        raise TypeError(msg)


def validate_floating(name: str, tensor: Tensor) -> None:
    """Raise unless `tensor` is a floating-point tensor."""
    validate_tensor(name, tensor)
    if not tensor.is_floating_point():
        msg = f"`{name}` must have a floating-point dtype, got {tensor.dtype}"
        raise TypeError(msg)


def validate_dtype(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """Raise unless `tensor` has exactly `dtype`."""
    validate_tensor(name, tensor)
    if tensor.dtype != dtype:
        msg = f"`{name}` must have dtype {dtype}, got {tensor.dtype}"
        raise TypeError(msg)


def validate_ndim(name: str, tensor: Tensor, at_least: int, layout: str) -> None:
    """Raise unless `tensor` has at least `at_least` dimensions; `layout` says which, for the reader."""
    if tensor.ndim < at_least:
        msg = f"`{name}` must have shape {layout}, got {tuple(tensor.shape)}"
        raise ValueError(msg)


def validate_logits(name: str, logits: Tensor) -> None:
    """Raise unless `logits` are floating and of shape (..., N, C) with at least one class."""
    validate_floating(name, logits)
    validate_ndim(name, logits, 2, "(..., N, C)")
    if logits.shape[-1] < 1:
        msg = f"`{name}` must have at least one class channel, got shape {tuple(logits.shape)}"
        raise ValueError(msg)


def validate_boxes(name: str, boxes: Tensor) -> None:
    """Raise unless `boxes` are floating and of shape (..., N, 4)."""
    validate_floating(name, boxes)
    if boxes.ndim < 2 or boxes.shape[-1] != 4:
        msg = f"`{name}` must have shape (..., N, 4), got {tuple(boxes.shape)}"
        raise ValueError(msg)


def validate_coordinates(name: str, boxes: Tensor) -> None:
    """Raise unless `boxes` are floating and of shape (..., 4): integers would wrap around, without a word."""
    validate_floating(name, boxes)
    if boxes.ndim < 1 or boxes.shape[-1] != 4:
        msg = f"`{name}` must have shape (..., 4), got {tuple(boxes.shape)}"
        raise ValueError(msg)


def validate_predictions(prefix: str, logits: Tensor, boxes: Tensor) -> None:
    """Raise unless `<prefix>logits` (..., N, C) and `<prefix>boxes` (..., N, 4) belong together."""
    validate_logits(f"{prefix}logits", logits)
    validate_boxes(f"{prefix}boxes", boxes)
    validate_same_shape(f"{prefix}logits", logits.shape[:-1], f"{prefix}boxes", boxes.shape[:-1], "(..., N)")
    validate_same_device(f"{prefix}logits", logits, **{f"{prefix}boxes": boxes})


def validate_both_predictions(
    student_logits: Tensor,
    student_boxes: Tensor,
    teacher_logits: Tensor,
    teacher_boxes: Tensor,
    *,
    leading: str = "(...)",
) -> None:
    """Raise unless the predictions of student (..., N, C) and teacher (..., M, C') belong together."""
    validate_predictions("student_", student_logits, student_boxes)
    validate_predictions("teacher_", teacher_logits, teacher_boxes)
    shapes = student_logits.shape[:-2], "teacher_logits", teacher_logits.shape[:-2]
    validate_same_shape("student_logits", *shapes, leading)
    validate_same_device("student_logits", student_logits, teacher_logits=teacher_logits)


def validate_targets_shape(
    labels: Tensor, boxes: Tensor, mask: Tensor, *, batch_shape: Sequence[int], like: Tensor, like_name: str
) -> None:
    """Raise unless the padded targets are (..., T), (..., T, 4), (..., T) and fit the predictions' batch."""
    validate_dtype("target_labels", labels, torch.int64)
    validate_boxes("target_boxes", boxes)
    validate_dtype("target_mask", mask, torch.bool)
    validate_ndim("target_labels", labels, 1, "(..., T)")
    validate_same_shape("target_labels", labels.shape, "target_boxes", boxes.shape[:-1], "(..., T)")
    validate_same_shape("target_labels", labels.shape, "target_mask", mask.shape, "(..., T)")
    validate_same_device(like_name, like, target_labels=labels, target_boxes=boxes, target_mask=mask)
    validate_batch("target_labels", labels.shape[:-1], like_name, batch_shape)


def validate_batch(name: str, batch: Sequence[int], other: str, other_batch: Sequence[int]) -> None:
    """Raise unless `batch` equals the trailing batch dimensions of `other` (which may have stages in front)."""
    batch, other_batch = tuple(batch), tuple(other_batch)
    if len(batch) > len(other_batch) or batch != other_batch[len(other_batch) - len(batch) :]:
        msg = f"`{name}` must have the batch dimensions of `{other}` {other_batch}, got {batch}"
        raise ValueError(msg)


def validate_same_shape(name: str, shape: Sequence[int], other: str, other_shape: Sequence[int], which: str) -> None:
    """Raise unless two shapes agree; `which` names the dimensions compared."""
    if tuple(shape) != tuple(other_shape):
        msg = (
            f"`{name}` and `{other}` must have the same dimensions {which}, got {tuple(shape)} and {tuple(other_shape)}"
        )
        raise ValueError(msg)


def validate_same_device(name: str, tensor: Tensor, **others: Tensor | None) -> None:
    """Raise unless every tensor of `others` is on the device of `tensor`."""
    for other_name, other in others.items():
        if other is not None and other.device != tensor.device:
            msg = f"`{other_name}` must be on the device of `{name}` {tensor.device}, got {other.device}"
            raise ValueError(msg)


def validate_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Raise unless `value` is one of `choices`."""
    if value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        msg = f"`{name}` must be one of {listed}, got {value!r}"
        raise ValueError(msg)


def validate_type(name: str, value: object, types: type | tuple[type, ...], what: str) -> None:
    """Raise unless `value` is of one of the `types`; True is no number."""
    if not isinstance(value, types) or (isinstance(value, bool) and types is not bool):
        msg = f"`{name}` must be {what}, got {value!r} of type {type(value).__name__}"
        raise TypeError(msg)


def validate_number(name: str, value: object) -> None:
    """Raise unless `value` is a number."""
    validate_type(name, value, (int, float, np.number), "a number")


def validate_positive(name: str, value: float) -> None:
    """Raise unless `value` is a finite number above 0."""
    validate_number(name, value)
    if not 0 < value < float("inf"):
        msg = f"`{name}` must be greater than 0{'' if value != float('inf') else ' and finite'}, got {value!r}"
        raise ValueError(msg)


def validate_count(name: str, value: int) -> None:
    """Raise unless `value` is a whole number above 0."""
    validate_type(name, value, (int, np.integer), "a whole number")
    validate_positive(name, value)


def validate_not_negative(name: str, value: float) -> None:
    """Raise unless `value` is a finite number, at least 0."""
    validate_number(name, value)
    if not 0 <= value < float("inf"):
        msg = f"`{name}` must be finite and at least 0, got {value!r}"
        raise ValueError(msg)


def validate_in_unit_interval(name: str, value: float) -> None:
    """Raise unless `value` is a number in [0, 1]."""
    validate_number(name, value)
    if not 0 <= value <= 1:
        msg = f"`{name}` must be in [0, 1], got {value!r}"
        raise ValueError(msg)


def validate_record(name: str, value: object, record: type, remedy: str) -> None:
    """Raise unless `value` is a `record`; the message says what it is and how to make one of it."""
    if not isinstance(value, record):
        keys = f" with keys {sorted(map(str, value))}" if isinstance(value, Mapping) else ""
        msg = f"`{name}` must be a {record.__name__}, got {type(value).__name__}{keys}: pass {remedy}"
        raise TypeError(msg)


def validate_terms(criterion: object) -> Mapping[str, Any]:
    """Return the terms of a criterion, whose weights may be moved, or raise."""
    terms = getattr(criterion, "terms", None)
    if not isinstance(terms, nn.ModuleDict):
        msg = f"`criterion` must be a DETRDistillationLoss with terms, got {type(criterion).__name__}"
        raise TypeError(msg)
    return cast("Mapping[str, Any]", terms)
