"""Linear assignment of batches of problems, by the first backend that can."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from detr_kd_losses._checks import (
    check_dtype,
    check_floating,
    check_ndim,
    check_same_device,
    check_same_shape,
    full_precision,
)
from detr_kd_losses.assignment._cpu import lapx_backend, scipy_backend
from detr_kd_losses.assignment._triton import TritonBackend

if TYPE_CHECKING:
    from detr_kd_losses.assignment._backend import Backend

__all__ = ["assignment_to_indices", "invert_assignment", "linear_sum_assignment", "select_backend"]

# In order of preference on the device that each computes on; whoever has another solver may insert it.
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
        backend: ``"auto"`` takes the first that can (see :func:`select_backend`), or the name of one.

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
    check_floating("cost", cost)
    check_ndim("cost", cost, 2, "(..., N, T)")
    for name, mask, shape in (
        ("row_mask", row_mask, cost.shape[:-1]),
        ("column_mask", column_mask, (*cost.shape[:-2], cost.shape[-1])),
    ):
        if mask is not None:
            check_dtype(name, mask, torch.bool)
            check_same_shape(name, mask.shape, "cost", shape, name.replace("_mask", "s"))
    check_same_device("cost", cost, row_mask=row_mask, column_mask=column_mask)
    if backend != "auto" and backend not in BACKENDS:
        msg = f"`backend` must be 'auto' or one of {list(BACKENDS)}, got {backend!r}"
        raise ValueError(msg)
    solve = torch.ops.detr_kd_losses.linear_sum_assignment
    assignment: Tensor = solve(full_precision(cost.detach()), row_mask, column_mask, backend)
    return assignment


def _dispatch(cost: Tensor, row_mask: Tensor | None, column_mask: Tensor | None, backend: str) -> Tensor:
    """Solve with the backend of that name, or the first that can."""
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
    at_home_first = sorted(BACKENDS.items(), key=lambda item: item[1].device_type != cost.device.type)
    reasons = {name: solver.unsupported_reasons(cost) for name, solver in at_home_first}
    for name, against in reasons.items():
        if not against:
            return name
    raise RuntimeError(_unsupported_message(cost, reasons))


def _unsupported_message(cost: Tensor, reasons: dict[str, list[str]]) -> str:
    lines = [f"  {name}: {'; '.join(against)}" for name, against in reasons.items()]
    what = f"cost of shape {tuple(cost.shape)}, dtype {cost.dtype}, device {cost.device}"
    return "\n".join([f"no assignment backend supports a {what}", *lines])


def invert_assignment(assignment: Tensor, num_columns: int) -> Tensor:
    """Row of each column, from the column of each row.

    Args:
        assignment: (..., N) int64, entries in [-1, `num_columns`), none twice but -1.
        num_columns: T, the number of columns.

    Returns:
        (..., T) int64: the row of each column, -1 = none.

    Raises:
        TypeError: If `assignment` is not int64.

    Examples:
        >>> invert_assignment(torch.tensor([2, -1, 0]), 4).tolist()
        [2, -1, 0, -1]
    """
    check_dtype("assignment", assignment, torch.int64)
    check_ndim("assignment", assignment, 1, "(..., N)")
    rows = torch.arange(assignment.shape[-1], device=assignment.device).expand(assignment.shape)
    # Unassigned rows write to a slot of their own, which is cut off.
    slots = torch.where(assignment < 0, num_columns, assignment)
    inverse = assignment.new_full((*assignment.shape[:-1], num_columns + 1), -1)
    return inverse.scatter(-1, slots, rows)[..., :-1]


def assignment_to_indices(assignment: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The index lists that DETR criterions take, image by image. Reads the device: for adapters.

    Args:
        assignment: (B, N) int64, -1 = none.

    Returns:
        For each image the matched rows in ascending order and their columns, both int64.

    Raises:
        ValueError: If `assignment` is not (B, N).
        TypeError: If it is not int64.

    Examples:
        >>> rows, columns = assignment_to_indices(torch.tensor([[2, -1, 0]]))[0]
        >>> rows.tolist(), columns.tolist()
        ([0, 2], [2, 0])
    """
    check_dtype("assignment", assignment, torch.int64)
    if assignment.ndim != 2:
        msg = f"`assignment` must have shape (B, N), got {tuple(assignment.shape)}"
        raise ValueError(msg)
    pairs = []
    for image in assignment:
        rows = (image >= 0).nonzero().squeeze(-1)
        pairs.append((rows, image[rows]))
    return pairs
