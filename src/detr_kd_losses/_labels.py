"""Labels and assignments out of range: an error by name where values are at hand, and never a number that looks right.

Reading values of a GPU would stall the step, and a compiler or a transform of torch.func has none. There a loss whose
targets have a label out of range is NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from detr_kd_losses._gpu import is_wrapped

__all__: list[str] = []


def at_hand(*tensors: Tensor) -> bool:
    """Whether the values of all tensors can be read without waiting for a device."""
    return not torch.compiler.is_compiling() and all(
        tensor.device.type == "cpu" and not is_wrapped(tensor) for tensor in tensors
    )


def labels_fit(labels: Tensor, mask: Tensor, num_classes: int) -> Tensor | None:
    """Raise for a target (..., T) in the `mask` whose label is no class, if values are at hand; else answer.

    None: all labels are classes. A scalar: whether they are, for :func:`nan_unless`.
    """
    wrong = ((labels < 0) | (labels >= num_classes)) & mask
    if not at_hand(labels, mask):
        return ~wrong.any()
    if wrong.any():
        index, label = _first(wrong, labels)
        hint = ": classes count from 0" if label == num_classes else ""
        msg = f"`target_labels` must be in [0, {num_classes}), got {label} at {_place(index, 'target')}{hint}"
        raise ValueError(msg)
    return None


def nan_unless(fit: Tensor | None, value: Tensor) -> Tensor:
    """`value`, or NaN where the labels do not fit."""
    return value if fit is None else torch.where(fit, value, torch.nan)


def validate_partners(name: str, assignment: Tensor, num_partners: int) -> None:
    """Raise for a partner of an `assignment` (..., N) that is not in [-1, `num_partners`), where values are at hand."""
    if at_hand(assignment):
        wrong = (assignment < -1) | (assignment >= num_partners)
        if wrong.any():
            index, partner = _first(wrong, assignment)
            msg = f"`{name}` must be in [-1, {num_partners}), got {partner} at {_place(index, 'query')}"
            raise ValueError(msg)


def _first(wrong: Tensor, values: Tensor) -> tuple[tuple[int, ...], int]:
    index = tuple(wrong.nonzero()[0].tolist())
    return index, int(values[index])


def _place(index: tuple[int, ...], last: str) -> str:
    """``stage 0, image 1, target 2``, counted from the last."""
    axes = ("stage", "image", last)[-len(index) :] if index else ()
    named = ", ".join(f"{axis} {entry}" for axis, entry in zip(axes, index[-3:], strict=True))
    return named if len(index) <= 3 else f"index {index} ({named})"
