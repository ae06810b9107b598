"""Linear assignment of batches of problems, dispatched to the first backend that supports them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from detr_kd_losses._precision import full_precision
from detr_kd_losses._validation import (
    validate_dtype,
    validate_floating,
    validate_ndim,
    validate_same_device,
    validate_same_shape,
)
from detr_kd_losses.assignment._cpu import CpuBackend, lapx_backend, replace_non_finite, scipy_backend
from detr_kd_losses.assignment._triton import TritonBackend
from detr_kd_losses.assignment.backend import Backend

__all__ = ["BACKENDS", "Backend", "CpuBackend", "linear_sum_assignment", "replace_non_finite", "select_backend"]

# The registry, in order of preference on the device that each computes on: add your own here, under a name of its own.
BACKENDS: dict[str, Backend] = {"triton": TritonBackend(), "lapx": lapx_backend(), "scipy": scipy_backend()}


def linear_sum_assignment(
    cost: Tensor,
    *,
    row_mask: Tensor | None = None,
    column_mask: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""Assign rows to columns, one-to-one, at the least total cost, for every problem of a batch.

    .. math:: \min_σ \sum_n C_{n, σ(n)}

    As many pairs as min(valid rows, valid columns). An entry that is NaN or infinite is used only if nothing else is
    left, so one bad prediction costs its own pair and no other, and nothing raises in the middle of training. Which
    of several optima is returned is up to the backend, and the same in every run.

    Args:
        cost: (..., N, T), any floating dtype; rows and columns in any proportion, 0 included.
        row_mask: (..., N) bool, True = the row takes part. None: all.
        column_mask: (..., T) bool, True = the column takes part. None: all.
        backend: ``"auto"`` takes the first that supports the cost (:func:`select_backend`), or the name of one.

    Returns:
        (..., N) int64: the column of each row, -1 = none. Not differentiable.

    Raises:
        ValueError: If shapes or devices do not fit, or `backend` is unknown.
        TypeError: If `cost` is not floating or a mask is not bool.
        RuntimeError: If the named backend cannot run; the message has its reasons.

    Examples:
        >>> cost = torch.tensor([[4.0, 1.0, 3.0], [2.0, 0.0, 5.0], [3.0, 2.0, 2.0]])
        >>> assignment = linear_sum_assignment(cost)
        >>> cost.gather(-1, assignment.unsqueeze(-1)).sum().item()
        5.0
        >>> linear_sum_assignment(cost, column_mask=torch.tensor([True, False, False])).tolist()
        [-1, 0, -1]

    References:
        Crouse, "On implementing 2D rectangular assignment algorithms", IEEE TAES 2016.
    """
    validate_floating("cost", cost)
    validate_ndim("cost", cost, 2, "(..., N, T)")
    for name, mask, shape in (
        ("row_mask", row_mask, cost.shape[:-1]),
        ("column_mask", column_mask, (*cost.shape[:-2], cost.shape[-1])),
    ):
        if mask is not None:
            validate_dtype(name, mask, torch.bool)
            validate_same_shape(name, mask.shape, "cost", shape, name.replace("_mask", "s"))
    validate_same_device("cost", cost, row_mask=row_mask, column_mask=column_mask)
    validate_backend("backend", backend)
    solve = torch.ops.detr_kd_losses.linear_sum_assignment
    assignment: Tensor = solve(full_precision(cost.detach()), row_mask, column_mask, backend)
    return assignment


def validate_backend(name: str, value: object) -> None:
    """Raise unless `value` names a backend, or is ``"auto"``."""
    if value != "auto" and value not in BACKENDS:
        msg = f"`{name}` must be 'auto' or one of {list(BACKENDS)}, got {value!r}"
        raise ValueError(msg)


def _dispatch(cost: Tensor, row_mask: Tensor | None, column_mask: Tensor | None, backend: str) -> Tensor:
    """Solve with the backend of that name, or the first that supports the problems."""
    if cost.shape[:-2].numel() == 0 or 0 in cost.shape[-2:]:
        return cost.new_full(cost.shape[:-1], -1, dtype=torch.int64)
    problems = cost.reshape(-1, *cost.shape[-2:])
    solver = BACKENDS[select_backend(problems) if backend == "auto" else backend]
    reasons = solver.unsupported_reasons(problems)
    if reasons:
        raise RuntimeError(_unsupported_message(problems, {backend: reasons}))
    rows = None if row_mask is None else row_mask.reshape(len(problems), -1)
    columns = None if column_mask is None else column_mask.reshape(len(problems), -1)
    return solver.solve(problems, rows, columns).reshape(cost.shape[:-1])


def _dispatch_unseen(*arguments: Any) -> Tensor:
    """Dispatch where no compiler traces the solver. One that is not loaded does not: loading it takes a second."""
    loaded = "torch._dynamo" in sys.modules
    dispatch: Callable[..., Tensor] = torch.compiler.disable(_dispatch) if loaded else _dispatch  # type: ignore[no-untyped-call]
    return dispatch(*arguments)


def _shape_of_result(cost: Tensor, row_mask: Tensor | None, column_mask: Tensor | None, backend: str) -> Tensor:  # noqa: ARG001
    return cost.new_empty(cost.shape[:-1], dtype=torch.int64)


# An operator of its own, so that torch.compile takes a solver as it is.
_LIBRARY: Any = torch.library.Library("detr_kd_losses", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("linear_sum_assignment(Tensor cost, Tensor? row_mask, Tensor? column_mask, str backend) -> Tensor")
_LIBRARY.impl("linear_sum_assignment", _dispatch_unseen, "CompositeExplicitAutograd")
torch.library.register_fake("detr_kd_losses::linear_sum_assignment", _shape_of_result, lib=_LIBRARY)


def select_backend(cost: Tensor) -> str:
    """Name of the backend that ``backend="auto"`` uses for costs like this one.

    Args:
        cost: (..., N, T); only shape, dtype and device matter.

    Returns:
        The first backend without a reason against it: ``"triton"`` on CUDA, in one launch and without a copy to the
        host; else ``"lapx"`` where it is installed, else ``"scipy"``.

    Raises:
        RuntimeError: If none can run; the message has the reasons of each.

    Examples:
        >>> select_backend(torch.rand(2, 3, 3)) in ("scipy", "lapx")
        True
    """
    same_device_first = sorted(BACKENDS.items(), key=lambda item: item[1].device_type != cost.device.type)
    reasons = {name: solver.unsupported_reasons(cost) for name, solver in same_device_first}
    for name, against in reasons.items():
        if not against:
            return name
    raise RuntimeError(_unsupported_message(cost, reasons))


def _unsupported_message(cost: Tensor, reasons: dict[str, list[str]]) -> str:
    lines = [f"  {name}: {'; '.join(against)}" for name, against in reasons.items()]
    what = f"cost of shape {tuple(cost.shape)}, dtype {cost.dtype}, device {cost.device}"
    return "\n".join([f"no assignment backend supports a {what}", *lines])
