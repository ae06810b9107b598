"""The reference backend: SciPy's shortest augmenting paths in float64, on the CPU."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

__all__: list[str] = []

# A problem of this many rows and columns takes SciPy about 0.1 ms: less, and handing it to a thread costs more
# than it saves (measured by examples/benchmarks/assignment.py).
_THREADED_SIZE = 50


class SciPyBackend:
    """Solves problem by problem; problems that are large enough go to a pool of threads.

    SciPy releases the interpreter lock while it solves. A cost on another device is copied to the host.
    """

    def unsupported_reasons(self, cost: Tensor) -> list[str]:  # noqa: ARG002
        """SciPy solves everything."""
        return []

    def solve(self, cost: Tensor, row_mask: Tensor | None, column_mask: Tensor | None) -> Tensor:
        """Solve each problem of the batch."""
        assignment = np.full(cost.shape[:2], -1, dtype=np.int64)
        costs = cost.cpu().numpy()
        rows = _valid_indices(row_mask, cost.shape[0])
        columns = _valid_indices(column_mask, cost.shape[0])

        def solve_one(problem: int) -> None:
            assignment[problem] = _solve(costs[problem], rows[problem], columns[problem])

        problems = range(len(costs))
        threads = min(_available_cpus(), len(costs))
        if threads > 1 and min(cost.shape[1:]) >= _THREADED_SIZE:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(solve_one, problems))
        else:
            for problem in problems:
                solve_one(problem)
        return torch.from_numpy(assignment).to(cost.device)


def _available_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _valid_indices(mask: Tensor | None, problems: int) -> list[npt.NDArray[np.intp] | None]:
    """Indices of the valid rows (columns) of each problem; None where all are valid."""
    if mask is None:
        return [None] * problems
    valid = mask.cpu().numpy()
    return [None if one.all() else np.flatnonzero(one) for one in valid]


def _solve(
    cost: npt.NDArray[np.floating], rows: npt.NDArray[np.intp] | None, columns: npt.NDArray[np.intp] | None
) -> npt.NDArray[np.int64]:
    assignment = np.full(cost.shape[0], -1, dtype=np.int64)
    if rows is not None:
        cost = cost[rows]
    if columns is not None:
        cost = cost[:, columns]
    matched_rows, matched_columns = linear_sum_assignment(_replace_non_finite(cost))
    if rows is not None:
        matched_rows = rows[matched_rows]
    if columns is not None:
        matched_columns = columns[matched_columns]
    assignment[matched_rows] = matched_columns
    return assignment


def _replace_non_finite(cost: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
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
    scale = high - low or 1.0
    scaled: npt.NDArray[np.float64] = (np.where(finite, cost, 0.0).astype(np.float64) / 2 - low) / scale
    scaled[~finite] = min(cost.shape) + 1.0
    return scaled
