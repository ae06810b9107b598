"""What every assignment backend must do, backend by backend; for the Triton backend see `test_triton.py`."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import detr_kd_losses as dkl

from support import oracles
from support.backends import CPU_BACKENDS

pytestmark = pytest.mark.parametrize("backend", CPU_BACKENDS)


def assert_optimal(cost, backend, row_mask=None, column_mask=None):
    """Solve a batch and check every problem of it in float64."""
    cost = torch.as_tensor(cost)
    assignment = dkl.linear_sum_assignment(cost, row_mask=row_mask, column_mask=column_mask, backend=backend)
    assert assignment.dtype == torch.int64
    assert assignment.shape == cost.shape[:-1]
    for problem in np.ndindex(cost.shape[:-2]):
        oracles.check_assignment(
            assignment[problem].numpy(),
            cost[problem].double().numpy(),
            None if row_mask is None else row_mask[problem].numpy(),
            None if column_mask is None else column_mask[problem].numpy(),
            rtol=1e-6 if cost.dtype == torch.float32 else 1e-12,
        )
    return assignment


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("columns", [0, 1, 2, 7, 40, 100])
@pytest.mark.parametrize("rows", [0, 1, 2, 7, 40, 100])
def test_every_size_in_both_directions(rows, columns, dtype, backend):
    rng = np.random.default_rng(rows * 1000 + columns)
    assert_optimal(torch.from_numpy(rng.normal(size=(2, rows, columns))).to(dtype), backend)


def test_many_small_problems(backend):
    rng = np.random.default_rng(0)
    for rows, columns in [(3, 3), (2, 5), (5, 2), (4, 4)]:
        assert_optimal(rng.integers(-3, 4, size=(500, rows, columns)).astype(np.float64), backend)


@pytest.mark.parametrize("seed", range(5))
def test_ragged_problems(seed, backend):
    rng = np.random.default_rng(seed)
    cost = rng.normal(size=(2, 3, 9, 12))
    rows, columns = torch.from_numpy(rng.random((2, 3, 9)) < 0.6), torch.from_numpy(rng.random((2, 3, 12)) < 0.5)
    columns[0, 0] = False
    assert_optimal(cost, backend, rows, columns)
    assert_optimal(cost, backend, column_mask=columns)
    assert_optimal(cost, backend, row_mask=rows)


def test_a_masked_entry_does_not_matter(backend):
    rng = np.random.default_rng(1)
    cost = torch.from_numpy(rng.normal(size=(5, 8)))
    columns = torch.arange(8) < 6
    expected = dkl.linear_sum_assignment(cost, column_mask=columns, backend=backend)
    for value in (float("nan"), float("-inf"), -1e30):
        polluted = cost.masked_fill(~columns, value)
        assert dkl.linear_sum_assignment(polluted, column_mask=columns, backend=backend).equal(expected)


def test_identical_rows_beside_identical_columns(backend):
    rng = np.random.default_rng(2)
    cost = rng.random((150, 150))
    cost[:40] = cost[0]
    cost[:, 100:] = cost[:, :1]
    assert_optimal(cost, backend)


@pytest.mark.parametrize(
    "cost",
    [
        np.multiply.outer(np.arange(60.0), np.arange(60.0)),
        np.zeros((20, 20)),
        10.0 ** np.random.default_rng(3).uniform(-6, 3, (30, 30)),
        -(10.0 ** np.random.default_rng(4).uniform(-2, 2, (30, 20))),
    ],
    ids=["i*j", "constant", "nine decades", "negative"],
)
def test_hard_costs(cost, backend):
    assert_optimal(cost, backend)
    assert_optimal(cost.T.copy(), backend)


def test_planted_optimum_with_large_duals(backend):
    """The optimum is unique by construction, so here indices may be compared."""
    rng = np.random.default_rng(5)
    permutation = rng.permutation(30)
    duals = rng.integers(0, 2**18, 30), rng.integers(0, 2**18, 30)
    slack = rng.integers(1, 50, (30, 30))
    slack[np.arange(30), permutation] = 0
    cost = duals[0][:, None] + duals[1][None] + slack
    for dtype in (torch.float32, torch.float64):
        assignment = dkl.linear_sum_assignment(torch.from_numpy(cost).to(dtype), backend=backend)
        assert assignment.tolist() == permutation.tolist()


@pytest.mark.parametrize("shape", [(9, 9), (6, 11), (11, 6)])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 1.0])
def test_an_entry_that_is_not_finite_is_used_only_if_nothing_else_is_left(share, shape, backend):
    rng = np.random.default_rng(int(share * 10) + shape[0])
    cost = rng.normal(size=(20, *shape))
    values = rng.choice([np.nan, np.inf, -np.inf], size=cost.shape)
    assert_optimal(np.where(rng.random(cost.shape) < share, values, cost), backend)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_bad_image_leaves_the_others_alone(value, backend):
    cost = torch.from_numpy(np.random.default_rng(6).normal(size=(16, 12, 8)))
    alone = torch.stack([dkl.linear_sum_assignment(one, backend=backend) for one in cost])
    cost[7] = value
    together = dkl.linear_sum_assignment(cost, backend=backend)
    others = torch.arange(16) != 7
    assert together[others].equal(alone[others])
    assert (together[7] >= 0).sum() == 8


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, backend):
    cost = torch.rand(3, 6, 6).to(dtype)
    assert_optimal(cost.float(), backend)
    assert dkl.linear_sum_assignment(cost, backend=backend).equal(
        dkl.linear_sum_assignment(cost.float(), backend=backend)
    )


def test_the_input_is_left_as_it_is(backend):
    cost = torch.rand(3, 6, 4, requires_grad=True)
    before = cost.detach().clone()
    assignment = dkl.linear_sum_assignment(cost, backend=backend)
    assert cost.detach().equal(before)
    assert not assignment.requires_grad
    transposed = cost.detach().mT
    assert_optimal(transposed, backend)
    assert_optimal(before[:1].expand(3, 6, 4), backend)


def test_deterministic(backend):
    cost = torch.randint(0, 3, (4, 30, 30)).float()
    one, other = (dkl.linear_sum_assignment(cost, backend=backend) for _ in range(2))
    assert one.equal(other)
