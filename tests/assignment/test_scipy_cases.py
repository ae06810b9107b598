"""What SciPy documents of `linear_sum_assignment`, as a table of cases, backend by backend; and where we differ.

On purpose we do not raise: a training step with a bad number goes on (docs/explanation/numerics.md). So what SciPy
calls infeasible or invalid gets its least bad answer here, and `check_finite` is there for those who want to know.
"""

from __future__ import annotations

import numpy as np
import pytest
import scipy.optimize
import torch

import detr_kd_losses as dkl

from support.backends import RUNNABLE

INF, NAN = float("inf"), float("nan")

pytestmark = [
    pytest.mark.parametrize("backend", RUNNABLE),
    pytest.mark.usefixtures("lapx_takes_small_problems"),
]


def solve(cost, backend, dtype=torch.float64):
    """Matched rows and columns in SciPy's form, and the assignment."""
    assignment = dkl.linear_sum_assignment(torch.tensor(cost, dtype=dtype), backend=backend)
    rows = (assignment >= 0).nonzero().squeeze(-1).numpy()
    return rows, assignment[rows].numpy()


# Name, cost, and the costs of the matched pairs, in the order of the rows.
SOLVED = [
    ("square", [[8, 4, 7], [5, 2, 3], [9, 4, 8]], [8, 3, 4]),
    ("more rows than columns", [[8, 4], [5, 2], [9, 1]], [5, 1]),
    ("more columns than rows", [[8, 4, 7, 1], [5, 2, 3, 1]], [1, 2]),
    ("one entry", [[7]], [7]),
    ("one row", [[4, 2, 9]], [2]),
    ("one column", [[4], [2], [9]], [2]),
    ("greedy is wrong", [[1, 2], [2, 100]], [2, 2]),
    ("negative costs", [[-8, -4], [-5, -9]], [-8, -9]),
    ("all equal", [[3, 3], [3, 3]], [3, 3]),
    ("a forbidden pair, +inf", [[1, 2, INF], [INF, 1, 5], [3, INF, 4]], [1, 1, 4]),
    ("forbidden pairs leave one way only", [[INF, 1], [2, INF]], [1, 2]),
    ("a forbidden row beside too few columns", [[INF, INF], [1, 5], [4, 2]], [1, 2]),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize(("cost", "pairs"), [case[1:] for case in SOLVED], ids=[case[0] for case in SOLVED])
def test_as_scipy(cost, pairs, dtype, backend):
    rows, columns = solve(cost, backend, dtype)
    cost = np.array(cost, dtype=np.float64)
    scipy_rows, scipy_columns = scipy.optimize.linear_sum_assignment(cost)
    # Rows come in ascending order; the optimum is compared, not which of several optima it is.
    assert len(rows) == len(scipy_rows)
    assert cost[rows, columns].sum() == cost[scipy_rows, scipy_columns].sum() == sum(pairs)


def test_maximising_is_minimising_the_negation(backend):
    profit = np.array([[7.0, 4.0, 1.0], [6.0, 5.0, 9.0], [8.0, 2.0, 3.0]])
    rows, columns = solve(-profit, backend)
    best = scipy.optimize.linear_sum_assignment(profit, maximize=True)
    assert profit[rows, columns].sum() == profit[best].sum() == 4 + 9 + 8


def test_transposing_swaps_rows_and_columns(backend):
    cost = torch.from_numpy(np.random.default_rng(0).normal(size=(5, 8)))
    assignment = dkl.linear_sum_assignment(cost, backend=backend)
    transposed = dkl.linear_sum_assignment(cost.mT, backend=backend)
    # The optimum of generic costs is the only one.
    assert torch.equal(dkl.invert_assignment(assignment, 8), transposed)


@pytest.mark.parametrize("shape", [(0, 0), (0, 3), (3, 0)])
def test_an_empty_matrix_has_no_pairs(shape, backend):
    assert dkl.linear_sum_assignment(torch.zeros(shape), backend=backend).tolist() == [-1] * shape[0]


@pytest.mark.parametrize("constant", [1e4, -1e4])
def test_a_constant_on_a_row_changes_nothing(constant, backend):
    cost = torch.from_numpy(np.random.default_rng(1).normal(size=(6, 6)))
    shifted = cost + constant * torch.tensor([1.0, 0, 0, 0, 0, 0]).unsqueeze(-1)
    assignments = [dkl.linear_sum_assignment(one, backend=backend) for one in (cost, shifted)]
    assert torch.equal(*assignments)


# Where we differ. Name, cost, SciPy's error, how many pairs are not finite, and the sum of the others.
INFEASIBLE, INVALID = "cost matrix is infeasible", "matrix contains invalid numeric entries"
DIFFERENT = [
    ("all forbidden", [[INF, INF], [INF, INF]], INFEASIBLE, 2, 0),
    ("a row is forbidden", [[INF, INF], [1, 2]], INFEASIBLE, 1, 1),
    ("two rows for one column", [[1, INF], [2, INF]], INFEASIBLE, 1, 1),
    ("not a number", [[NAN, 1], [2, 9]], INVALID, 0, 3),
    ("a row of NaN", [[NAN, NAN], [1, 2]], INVALID, 1, 1),
    ("minus infinity is no bargain", [[-INF, 1], [2, 9]], INVALID, 0, 3),
]


@pytest.mark.parametrize(
    ("cost", "error", "wrong", "total"), [case[1:] for case in DIFFERENT], ids=[case[0] for case in DIFFERENT]
)
def test_where_scipy_raises_we_answer(cost, error, wrong, total, backend):
    with pytest.raises(ValueError, match=error):
        scipy.optimize.linear_sum_assignment(cost)
    rows, columns = solve(cost, backend)
    pairs = np.array(cost)[rows, columns]
    assert (~np.isfinite(pairs)).sum() == wrong
    assert pairs[np.isfinite(pairs)].sum() == total


@pytest.mark.parametrize(
    ("cost", "error", "message"),
    [
        (torch.zeros(3), ValueError, r"`cost` must have shape \(\.\.\., N, T\)"),
        (torch.zeros(2, 2, dtype=torch.int64), TypeError, "`cost` must have a floating-point dtype"),
        (torch.zeros(2, 2, dtype=torch.bool), TypeError, "`cost` must have a floating-point dtype"),
        ([[1.0, 2.0]], TypeError, "`cost` must be a torch.Tensor, got list"),
    ],
)
def test_only_floating_matrices(cost, error, message, backend):
    with pytest.raises(error, match=message):
        dkl.linear_sum_assignment(cost, backend=backend)


def test_three_dimensions_are_a_batch(backend):
    """SciPy refuses them."""
    cost = torch.tensor([[[1.0, 2.0], [2.0, 9.0]], [[1.0, 9.0], [9.0, 1.0]]])
    assert dkl.linear_sum_assignment(cost, backend=backend).tolist() == [[1, 0], [0, 1]]
