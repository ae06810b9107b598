"""The CPU backends: a solver of one problem, applied to each problem of a batch, in threads where that pays."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["CpuBackend", "replace_non_finite"]

Indices = npt.NDArray[np.integer]
Costs = npt.NDArray[np.floating]
Valid = slice | npt.NDArray[np.intp]

# Problems with fewer rows or columns take a solver little more than handing them to a thread does.
_THREADED_SIZE = 128
# With fewer, looking for non-finite entries takes longer than lapx saves.
_LAPX_SIZE = 8


class CpuBackend:
    """Solves problem by problem on the host; problems that are large enough go to a pool of threads.

    A cost on another device is copied to the host, which waits for that device.

    Args:
        solve_one: Takes one cost matrix (n, t) of NumPy, returns rows and columns of its pairs, as SciPy does; it
            should release the interpreter lock. Entries may be NaN or infinite: :func:`replace_non_finite`.
        reasons: Returns why the solver cannot run at all, none if it can.

    Examples:
        >>> from scipy.optimize import linear_sum_assignment as solve_one
        >>> from detr_kd_losses.assignment import BACKENDS, linear_sum_assignment
        >>> BACKENDS["mine"] = CpuBackend(lambda cost: solve_one(replace_non_finite(cost)))
        >>> linear_sum_assignment(torch.tensor([[4.0, 1.0], [2.0, 0.0]]), backend="mine").tolist()
        [1, 0]
        >>> del BACKENDS["mine"]
    """

    device_type = "cpu"

    def __init__(
        self,
        solve_one: Callable[[Costs], tuple[Indices, Indices]],
        reasons: Callable[[], list[str]] = list,
    ) -> None:
        """Take a solver of one cost matrix that releases the interpreter lock."""
        self._solve_one = solve_one
        self._reasons = reasons

    def unsupported_reasons(self, cost: Tensor) -> list[str]:  # noqa: ARG002
        """Whatever keeps the solver from running at all."""
        return self._reasons()

    def solve(self, cost: Tensor, row_mask: Tensor | None, column_mask: Tensor | None) -> Tensor:
        """Solve each problem of the batch."""
        assignment = np.full(cost.shape[:2], -1, dtype=np.int64)
        rows = _valid(row_mask, len(cost))
        columns = _valid(column_mask, len(cost))
        problems = list(zip(assignment, cost.cpu().numpy(), rows, columns, strict=True))
        threads = min(_available_cpus(), len(problems))
        if threads > 1 and min(cost.shape[1:]) >= _THREADED_SIZE:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(lambda problem: self._solve_valid(*problem), problems))
        else:
            for problem in problems:
                self._solve_valid(*problem)
        return torch.from_numpy(assignment).to(cost.device)

    def _solve_valid(self, assignment: npt.NDArray[np.int64], cost: Costs, rows: Valid, columns: Valid) -> None:
        """Write the solution of one problem, among its valid rows and columns, into `assignment` (N,)."""
        matched_rows, matched_columns = self._solve_one(cost[rows][:, columns])
        if not isinstance(rows, slice):
            matched_rows = rows[matched_rows]
        if not isinstance(columns, slice):
            matched_columns = columns[matched_columns]
        assignment[matched_rows] = matched_columns


def scipy_backend() -> CpuBackend:
    """SciPy's shortest augmenting paths in float64: the reference."""
    return CpuBackend(_solve_by_scipy)


def lapx_backend() -> CpuBackend:
    """The bounded Jonker-Volgenant of lapx in float64: about twice as fast as SciPy, where it is installed."""
    return CpuBackend(_solve_by_lapx, _lapx_reasons)


def _solve_by_scipy(cost: Costs) -> tuple[Indices, Indices]:
    from scipy.optimize import linear_sum_assignment  # noqa: PLC0415  # its import takes longer than all of ours

    try:
        return linear_sum_assignment(cost)
    except ValueError:  # it has NaN or -inf, or no matching without inf
        return linear_sum_assignment(replace_non_finite(cost))


def _solve_by_lapx(cost: Costs) -> tuple[Indices, Indices]:
    import lap  # noqa: PLC0415  # optional, and only loaded where it is used

    if min(cost.shape) < _LAPX_SIZE:
        return _solve_by_scipy(cost)
    cost = replace_non_finite(cost)
    rows, columns = lap.lapjvr(cost, extend_cost=True, return_cost=False, precision="float64")
    return rows, columns


def _lapx_reasons() -> list[str]:
    try:
        import lap  # noqa: PLC0415
    except ImportError as error:
        return [f"lapx cannot be imported ({error}): pip install 'detr-kd-losses[fast]'"]
    return [] if hasattr(lap, "lapjvr") else ["the installed `lap` has no lapjvr: lapx 0.11.1 or later is needed"]


def _available_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _valid(mask: Tensor | None, problems: int) -> list[Valid]:
    """Valid rows (columns) of each problem: a slice where they come first, as behind them is padding, else indices."""
    if mask is None:
        return [slice(None)] * problems
    valid = mask.cpu().numpy()
    counts = valid.sum(1)
    first = (valid == (np.arange(valid.shape[1]) < counts[:, None])).all(1)
    return [
        slice(0, count) if is_first else np.flatnonzero(one)
        for one, count, is_first in zip(valid, counts.tolist(), first.tolist(), strict=True)
    ]


def replace_non_finite(cost: Costs) -> Costs:
    """Give NaN and infinite entries a cost at which one of them is dearer than any set of finite ones.

    With finite entries scaled to [0, 1] and k pairs, a matching with f non-finite entries of cost k + 1 costs at most
    f (k + 1) + (k - f), less than the (f + 1) (k + 1) that one more of them would cost at least.
    """
    finite = np.isfinite(cost)
    if finite.all():
        return cost
    values = cost[finite].astype(np.float64)
    if values.size == 0:
        return np.zeros_like(cost)
    # Halved first, because the range of float64 costs may not be a float64.
    low, high = values.min() / 2, values.max() / 2
    scaled = np.full(cost.shape, min(cost.shape) + 1.0)
    scaled[finite] = (values / 2 - low) / (high - low or 1.0)
    return scaled
