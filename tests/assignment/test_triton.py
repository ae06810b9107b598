"""The Triton backend: its contract in Triton's interpreter, its compilation for sm_90, and its behaviour on CUDA."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from detr_kd_losses import _gpu, linear_sum_assignment, select_backend
from detr_kd_losses.assignment._triton import _MIN_TRITON, TritonBackend

from support import oracles
from support.scratch_races import find_races

needs_triton = pytest.mark.skipif(_gpu.triton_version() is None, reason="Triton is not installed")
# What the kernel is written in; without it the package leaves the problems to another backend.
TOO_OLD = (_gpu.triton_version() or (0, 0)) < _MIN_TRITON
needs_cuda = pytest.mark.skipif(TOO_OLD or not torch.cuda.is_available(), reason="needs Triton 3.3 and a CUDA device")


@pytest.fixture
def kernel_runs():
    if TOO_OLD:
        pytest.skip("needs Triton 3.3, whose language has tl.gather")


@pytest.fixture
def solve(kernel_runs, interpreter):
    def solve(cost, row_mask=None, column_mask=None, backend=None):
        """Assignment of a batch of problems, checked in every problem."""
        cost = torch.as_tensor(cost)
        backend = backend or TritonBackend()
        assignment = interpreter.submit(backend.solve, cost, row_mask, column_mask).result(timeout=300)
        assert_optimal(assignment, cost, row_mask, column_mask)
        return assignment

    return solve


def assert_optimal(assignment, cost, row_mask=None, column_mask=None):
    """The optimum of the oracle, but for n 2^-26 of the range of the finite costs of each problem."""
    assert assignment.dtype == torch.int64
    assert assignment.shape == cost.shape[:2]
    for problem in range(len(cost)):
        rows = np.ones(cost.shape[1], dtype=bool) if row_mask is None else row_mask[problem].numpy()
        columns = np.ones(cost.shape[2], dtype=bool) if column_mask is None else column_mask[problem].numpy()
        valid = np.ix_(rows, columns)
        relative = np.full(cost.shape[1:], np.nan)
        relative[valid] = in_units_of_the_range(cost[problem].double().numpy()[valid])
        oracles.check_assignment(assignment[problem], relative, rows, columns, rtol=0.0, resolution=2.0**-26)


def in_units_of_the_range(cost):
    """Finite entries moved to [0, 1], all others NaN."""
    finite = cost[np.isfinite(cost)]
    if finite.size == 0 or finite.min() == finite.max():
        return np.where(np.isfinite(cost), 0.0, np.nan)
    low, high = finite.min() / 4, finite.max() / 4  # the range of the largest float64 is none
    if high - low < 1e-300:
        low, high, cost = low * 2.0**600, high * 2.0**600, cost * 2.0**600
    return (np.where(np.isfinite(cost), cost, np.nan) / 4 - low) / (high - low)


def detection_like_cost(problems, rows, columns, seed=0):
    """L1 distances of points in clusters: near ties, as between queries of two detectors."""
    rng = np.random.default_rng(seed)
    centers = rng.random((problems, 8, 4))
    student, teacher = (
        np.stack([one[rng.integers(8, size=size)] for one in centers]) + 0.1 * rng.normal(size=(problems, size, 4))
        for size in (rows, columns)
    )
    return np.abs(student[:, :, None] - teacher[:, None]).sum(-1)


def polluted(cost, share, seed=0):
    rng = np.random.default_rng(seed)
    return np.where(rng.random(cost.shape) < share, rng.choice([np.nan, np.inf, -np.inf], size=cost.shape), cost)


@pytest.mark.parametrize("columns", [0, 1, 2, 7, 40, 100, 300])
@pytest.mark.parametrize("rows", [0, 1, 2, 7, 40, 100, 300])
def test_every_size_in_both_directions(rows, columns, solve):
    dtype = torch.float32 if (rows + columns) % 2 else torch.float64
    solve(torch.from_numpy(detection_like_cost(1, rows, columns)).to(dtype))


@pytest.mark.parametrize("shape", [(2, 2), (2, 4), (3, 2), (3, 3), (4, 4)])
def test_many_small_problems(shape, solve):
    rng = np.random.default_rng(shape)
    costs = [
        rng.normal(size=(40, *shape)),
        rng.integers(-3, 4, size=(40, *shape)).astype(float),
        10.0 ** rng.uniform(-9, 0, (40, *shape)),
        polluted(rng.integers(0, 5, size=(40, *shape)).astype(float), rng.random((40, 1, 1))),
    ]
    solve(np.concatenate(costs))


@pytest.mark.parametrize("steps_per_column", [0, 1, 32])
def test_ragged_problems_with_or_without_the_fast_phase(steps_per_column, solve):
    rng = np.random.default_rng(1)
    backend = TritonBackend(steps_per_column=steps_per_column)
    cost = detection_like_cost(8, 20, 16)
    cost[4:] = polluted(cost[4:], 0.3)
    rows, columns = (torch.from_numpy(rng.random((8, size)) < rng.random((8, 1))) for size in (20, 16))
    rows[0], columns[1], rows[2], columns[2], rows[3] = False, False, True, True, torch.arange(20) < 16
    solve(cost, rows, columns, backend)
    solve(cost[:3], rows[:3], None, backend)
    solve(cost[:3], None, columns[:3], backend)
    solve(np.multiply.outer(np.arange(12.0), np.arange(12.0))[None], backend=backend)


def test_identical_rows_beside_identical_columns(solve):
    cost = np.random.default_rng(2).random((1, 150, 150))
    cost[:, :40] = cost[:, :1]
    cost[:, :, 100:] = cost[:, :, :1]
    solve(cost)


@pytest.mark.parametrize(
    "cost",
    [
        np.multiply.outer(np.arange(20.0), np.arange(20.0)),
        np.zeros((70, 70)),
        np.random.default_rng(3).integers(0, 3, (60, 66)).astype(float),
        10.0 ** np.random.default_rng(4).uniform(-6, 3, (50, 50)),
        -(10.0 ** np.random.default_rng(5).uniform(-2, 2, (50, 20))),
        np.random.default_rng(6).uniform(-1, 1, (20, 20)) * 1.7e308,
        np.random.default_rng(7).uniform(0, 1, (20, 20)) * 1e-310,
    ],
    ids=["i*j", "constant", "integer ties", "nine decades", "negative", "largest", "smallest"],
)
def test_hard_costs(cost, solve):
    solve(cost[None])
    solve(cost.T[None])


@pytest.mark.parametrize("shape", [(9, 9), (6, 11), (11, 6), (40, 40)])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 1.0])
def test_an_entry_that_is_not_finite_is_used_only_if_nothing_else_is_left(share, shape, solve):
    solve(polluted(np.random.default_rng(8).normal(size=(6, *shape)), share))


@pytest.mark.parametrize("shape", [(20, 20), (12, 20)])
def test_rows_and_columns_without_a_finite_entry(shape, solve):
    cost = np.random.default_rng(9).normal(size=(4, *shape))
    cost[0, :5] = np.nan
    cost[1, :, :15] = np.inf
    cost[2, :5] = cost[2, :, :15] = -np.inf
    cost[3, 0] = cost[3, :, 0] = np.nan
    solve(cost)
    solve(cost.swapaxes(1, 2))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_bad_image_leaves_the_others_alone(value, solve):
    cost = torch.from_numpy(detection_like_cost(5, 12, 8))
    alone = torch.cat([solve(one[None]) for one in cost])
    cost[3] = value
    others = torch.arange(5) != 3
    assert solve(cost)[others].equal(alone[others])


def test_the_result_depends_neither_on_strides_nor_on_the_run(solve):
    cost = torch.from_numpy(detection_like_cost(3, 8, 11)).float()
    before = cost.clone()
    expected = solve(cost)
    assert solve(cost).equal(expected)
    assert cost.equal(before)
    assert solve(cost.mT.contiguous().mT).equal(expected)
    assert solve(torch.nn.functional.pad(cost, (1, 2, 3, 1))[:, 3:-1, 1:-2]).equal(expected)
    assert solve(cost[:1].expand(3, -1, -1)).equal(expected[:1].expand(3, -1))
    assert solve(cost.flip(0)).equal(expected.flip(0))


def test_a_masked_entry_does_not_matter(solve):
    cost = torch.from_numpy(detection_like_cost(1, 6, 9))
    columns = torch.arange(9)[None] < 6
    expected = solve(cost, column_mask=columns)
    for value in (float("nan"), float("-inf"), -1e30):
        assert solve(cost.masked_fill(~columns[:, None], value), column_mask=columns).equal(expected)


@pytest.mark.parametrize("steps_per_column", [0, 1, 32])
def test_no_address_is_handed_over_without_a_barrier(steps_per_column, kernel_runs, interpreter):
    backend = TritonBackend(steps_per_column=steps_per_column)
    square = detection_like_cost(3, 24, 24)
    square[1] = polluted(square[1], 0.3)
    square[2, :, :9] = np.nan
    square = torch.from_numpy(square)
    mask = torch.arange(24).expand(3, -1) < 15
    for arguments in [(square, None, None), (square, mask, None)]:
        assert interpreter.submit(find_races, backend.solve, *arguments).result(timeout=300) == []
    without_barriers = interpreter.submit(partial(find_races, barriers=False), backend.solve, square, None, None)
    assert "read of what was written" in without_barriers.result(timeout=300)


def test_the_package_does_not_import_triton():
    code = "import sys, detr_kd_losses, detr_kd_losses.assignment._triton; print('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout.split() == [b"False"]


def test_reasons(monkeypatch):
    backend = TritonBackend()
    monkeypatch.setattr(_gpu, "triton_version", lambda: (3, 3))
    cpu = "it runs on CUDA (or in Triton's interpreter), and the cost is on cpu"
    size = "it takes at most 2048 rows and columns"
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert backend.unsupported_reasons(torch.zeros(1, 3, 3)) == [cpu]
    assert backend.unsupported_reasons(torch.empty(1, 2049, 1)) == [cpu, size]
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backend.unsupported_reasons(torch.zeros(1, 2048, 3)) == []
    on_old_gpu = SimpleNamespace(is_cuda=True, device="cuda", shape=(1, 3, 3))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (6, 1))
    assert backend.unsupported_reasons(on_old_gpu) == ["it needs a GPU of compute capability 7.0 or newer"]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert backend.unsupported_reasons(on_old_gpu) == []


def test_the_reason_without_triton(monkeypatch):
    monkeypatch.setattr(_gpu, "triton_version", lambda: None)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert TritonBackend().unsupported_reasons(torch.zeros(1, 3, 3)) == [
        "Triton is not installed: PyTorch for CUDA brings the one that fits it"
    ]


def test_a_triton_that_is_too_old_is_not_chosen(monkeypatch):
    """That of PyTorch 2.6 has no `tl.gather`: "auto" must leave the problem to the CPU."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    on_gpu = SimpleNamespace(is_cuda=True, device=torch.device("cuda"), shape=(1, 3, 3))
    monkeypatch.setattr(_gpu, "triton_version", lambda: (3, 2))
    reason = "it needs Triton 3.3 or newer, got 3.2: a newer PyTorch brings one"
    assert TritonBackend().unsupported_reasons(on_gpu) == [reason]
    assert select_backend(on_gpu) in ("lapx", "scipy")
    with pytest.raises(RuntimeError, match=reason):
        linear_sum_assignment(torch.zeros(1, 3, 3), backend="triton")
    monkeypatch.setattr(_gpu, "triton_version", lambda: (3, 10))
    assert select_backend(on_gpu) == "triton"


@needs_triton
def test_the_version_of_triton_is_read_without_importing_it():
    code = """if True:
        import sys, detr_kd_losses._gpu as gpu
        print(gpu.triton_version(), "triton" in sys.modules)
        import triton
        print(tuple(map(int, triton.__version__.split(".")[:2])))
    """
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout
    read, imported = printed.splitlines()
    assert read == f"{imported} False"


@pytest.mark.parametrize(
    ("text", "version"),
    [('__version__ = "3.3.1"\n', (3, 3)), ("x = 1\n__version__ = '10.20.0+git'\n", (10, 20)), ("", (999, 0))],
)
def test_the_version_as_it_may_be_written(text, version, monkeypatch, tmp_path):
    file = tmp_path / "__init__.py"
    file.write_text(text)
    monkeypatch.setattr(_gpu, "find_spec", lambda _: SimpleNamespace(origin=str(file)))
    assert _gpu.triton_version.__wrapped__() == version


@pytest.mark.parametrize("spec", [None, SimpleNamespace(origin=None)], ids=["nothing", "a folder of that name"])
def test_no_version(spec, monkeypatch):
    monkeypatch.setattr(_gpu, "find_spec", lambda _: spec)
    assert _gpu.triton_version.__wrapped__() is None


@pytest.fixture
def kernel(kernel_runs, compiler):
    """The kernel, which is compiled and not launched."""
    from detr_kd_losses.assignment._forest import solve_problem

    return compiler.watch(solve_problem)


def test_no_register_is_spilled_at_the_default_sizes(compiler, kernel):
    for size in (300, 900):
        TritonBackend().solve(torch.empty(1, size, size), None, None)
    assert compiler.memory_of_registers(kernel) == 2 * [{"STACK": 0, "LOCAL": 0}]


def test_the_number_of_compilations_does_not_grow_with_the_number_of_shapes(compiler, kernel):
    backend = TritonBackend()
    for problems, rows, columns in [
        (1, 1, 1),
        (2, 16, 16),
        (3, 64, 1),
        (16, 1, 48),
        (5, 33, 17),
        (1, 0, 5),
        (96, 64, 64),
    ]:
        cost = torch.empty(problems, rows, columns)
        mask = torch.ones(problems, columns, dtype=torch.bool)
        backend.solve(cost, None, None)
        backend.solve(cost.mT, mask, None)
        backend.solve(torch.empty(problems, rows, columns + 1)[..., 1:], None, mask)  # not aligned
        backend.solve(cost[:1].expand_as(cost), None, mask[:1].expand_as(mask))
    assert len(compiler.compiled(kernel)) == 1
    backend.solve(torch.empty(1, 65, 2), None, None)
    assert len(compiler.compiled(kernel)) == 2


@needs_cuda
class TestCUDA:
    @pytest.mark.parametrize("shape", [(96, 300, 300), (96, 300, 100), (12, 300, 900), (4, 900, 900)])
    def test_optimal_and_the_same_in_two_runs(self, shape):
        cost = torch.from_numpy(detection_like_cost(*shape)).float()
        cost[1] = torch.from_numpy(polluted(cost[1].numpy(), 0.3))
        first, second = (TritonBackend().solve(cost.cuda(), None, None) for _ in range(2))
        assert first.equal(second)
        assert_optimal(first.cpu(), cost)

    def test_ragged(self):
        cost = torch.from_numpy(detection_like_cost(96, 300, 100)).float()
        mask = torch.arange(100) < torch.randint(0, 101, (96, 1), generator=torch.Generator().manual_seed(0))
        assignment = TritonBackend().solve(cost.cuda(), None, mask.cuda())
        assert_optimal(assignment.cpu(), cost, None, mask)

    def test_nothing_synchronises_with_the_host(self):
        cost = torch.rand(4, 30, 30, device="cuda")
        mask = torch.ones(4, 30, dtype=torch.bool, device="cuda")
        TritonBackend().solve(cost, mask, None)  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            TritonBackend().solve(cost, mask, None)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_a_cuda_graph_replays_it(self):
        first, second = torch.rand(2, 8, 40, 50, device="cuda")
        cost = first.clone()
        TritonBackend().solve(cost, None, None)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            assignment = TritonBackend().solve(cost, None, None)
        for values in (second, first):
            cost.copy_(values)
            graph.replay()
            assert assignment.equal(TritonBackend().solve(values, None, None))
