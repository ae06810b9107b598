"""The CPU backends: a solver of one problem, applied to each problem of a batch, in threads where that pays."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import scipy.optimize
import torch
from torch import Tensor

__all__: list[str] = []

Indices = npt.NDArray[np.integer]
Costs = npt.NDArray[np.floating]

# Problems with fewer rows or columns take a solver less than handing them to a thread does.
_THREADED_SIZE = 50


class CpuBackend:
    """Solves problem by problem on the host; problems that are large enough go to a pool of threads.

    A cost on another device is copied to the host, which waits for that device.
    """

    def __init__(
        self,
        solve_one: Callable[[Costs], tuple[Indices, Indices]],
        reasons: Callable[[], list[str]] = list,
    ) -> None:
        """Take a solver of one finite cost matrix that releases the interpreter lock."""
        self._solve_one = solve_one
        self._reasons = reasons

    def unsupported_reasons(self, cost: Tensor) -> list[str]:  # noqa: ARG002
        """Whatever keeps the solver from running at all."""
        return self._reasons()

    def solve(self, cost: Tensor, row_mask: Tensor | None, column_mask: Tensor | None) -> Tensor:
        """Solve each problem of the batch."""
        assignment = np.full(cost.shape[:2], -1, dtype=np.int64)
        costs = cost.cpu().numpy()
        rows = _valid_indices(row_mask, len(costs))
        columns = _valid_indices(column_mask, len(costs))

        def solve_into(problem: int) -> None:
            self._solve_valid(costs[problem], rows[problem], columns[problem], out=assignment[problem])

        threads = min(_available_cpus(), len(costs))
        if threads > 1 and min(cost.shape[1:]) >= _THREADED_SIZE:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(solve_into, range(len(costs))))
        else:
            for problem in range(len(costs)):
                solve_into(problem)
        return torch.from_numpy(assignment).to(cost.device)

    def _solve_valid(
        self, cost: Costs, rows: Indices | None, columns: Indices | None, *, out: npt.NDArray[np.int64]
    ) -> None:
        """Solve one problem among its valid rows and columns."""
        if rows is not None:
            cost = cost[rows]
        if columns is not None:
            cost = cost[:, columns]
        if cost.size == 0:
            return
        matched_rows, matched_columns = self._solve_one(_replace_non_finite(cost))
        if rows is not None:
            matched_rows = rows[matched_rows]
        if columns is not None:
            matched_columns = columns[matched_columns]
        out[matched_rows] = matched_columns


def scipy_backend() -> CpuBackend:
    """SciPy's shortest augmenting paths in float64: the reference."""
    return CpuBackend(scipy.optimize.linear_sum_assignment)


def lapx_backend() -> CpuBackend:
    """lapx's bounded Jonker-Volgenant in float64: about twice as fast as SciPy, where it is installed."""

    def solve_one(cost: Costs) -> tuple[Indices, Indices]:
        import lap  # noqa: PLC0415  # optional, and only loaded where it is used

        rows, columns = lap.lapjvr(cost, extend_cost=True, return_cost=False, precision="float64")
        return rows, columns

    return CpuBackend(solve_one, _lapx_reasons)


def _lapx_reasons() -> list[str]:
    try:
        import lap  # noqa: PLC0415
    except ImportError as error:
        return [f"lapx cannot be imported ({error}): pip install 'detr-kd-losses[fast]'"]
    return [] if hasattr(lap, "lapjvr") else ["the installed `lap` has no lapjvr: lapx 0.11.1 or later is needed"]


def _available_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _valid_indices(mask: Tensor | None, problems: int) -> list[Indices | None]:
    """Indices of the valid rows (columns) of each problem; None where all are valid."""
    if mask is None:
        return [None] * problems
    return [None if valid.all() else np.flatnonzero(valid) for valid in mask.cpu().numpy()]


def _replace_non_finite(cost: Costs) -> Costs:
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
