"""The dispatcher: which backend, which error, and how it compiles."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import types

import pytest
import scipy.optimize
import torch

import detr_kd_losses as dkl
from detr_kd_losses import assignment as assignment_module
from detr_kd_losses.assignment import BACKENDS, _cpu

WITH_LAPX = pytest.mark.skipif(not importlib.util.find_spec("lap"), reason="lapx is not installed")


class Unable:
    """A backend with reasons against everything."""

    device_type = "cpu"

    def unsupported_reasons(self, cost):
        return [f"{cost.shape[-2]} rows are too many", "it is Monday"]

    def solve(self, cost, row_mask, column_mask):
        raise AssertionError


class Recording:
    """A backend that leaves everything unassigned and remembers what it was given."""

    device_type = "cpu"

    def unsupported_reasons(self, cost):
        return []

    def solve(self, cost, row_mask, column_mask):
        self.given = cost.shape, row_mask, column_mask
        return cost.new_full(cost.shape[:2], -1, dtype=torch.int64)


def test_auto_takes_the_first_without_reasons(monkeypatch):
    recording = Recording()
    monkeypatch.setattr(assignment_module, "BACKENDS", {"unable": Unable(), "recording": recording} | BACKENDS)
    assert dkl.select_backend(torch.rand(2, 3, 3)) == "recording"
    rows = torch.ones(2, 5, 3, dtype=torch.bool)
    dkl.linear_sum_assignment(torch.rand(2, 5, 3, 4), row_mask=rows)
    assert recording.given[0] == (10, 3, 4)
    assert recording.given[1].shape == (10, 3)
    assert recording.given[2] is None


def test_auto_prefers_the_device_of_the_cost(monkeypatch):
    elsewhere, here = Recording(), Recording()
    elsewhere.device_type = "cuda"
    monkeypatch.setattr(assignment_module, "BACKENDS", {"elsewhere": elsewhere, "here": here})
    assert dkl.select_backend(torch.rand(3, 3)) == "here"
    assert dkl.select_backend(torch.rand(3, 3, device="meta")) == "elsewhere"
    monkeypatch.setattr(assignment_module, "BACKENDS", {"elsewhere": elsewhere, "here": Unable()})
    assert dkl.select_backend(torch.rand(3, 3)) == "elsewhere"


def test_triton_says_why_it_cannot_run(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match=r"(?s)triton: .*it runs on CUDA .* the cost is on cpu.* at most 2048 rows"):
        dkl.linear_sum_assignment(torch.zeros(2, 3000), backend="triton")


def test_a_named_backend_that_cannot_run_raises_with_all_reasons(monkeypatch):
    monkeypatch.setattr(assignment_module, "BACKENDS", {"unable": Unable()} | BACKENDS)
    with pytest.raises(
        RuntimeError,
        match=r"no assignment backend supports a cost of shape .*\n  unable: 3 rows are too many; it is Monday",
    ):
        dkl.linear_sum_assignment(torch.rand(2, 3, 3), backend="unable")


def test_no_backend_at_all(monkeypatch):
    monkeypatch.setattr(assignment_module, "BACKENDS", {"one": Unable(), "two": Unable()})
    with pytest.raises(RuntimeError, match=r"(?s)one: .*Monday.*two: .*Monday"):
        dkl.select_backend(torch.rand(2, 3, 3))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"cost": torch.rand(3)}, ValueError, r"`cost` must have shape \(..., N, T\), got \(3,\)"),
        (
            {"cost": torch.ones(3, 3, dtype=torch.int64)},
            TypeError,
            "`cost` must have a floating-point dtype, got torch.int64",
        ),
        (
            {"cost": torch.rand(2, 3, 4), "row_mask": torch.ones(2, 4).bool()},
            ValueError,
            r"`row_mask` and `cost` must have the same dimensions rows, got \(2, 4\) and \(2, 3\)",
        ),
        (
            {"cost": torch.rand(2, 3, 4), "column_mask": torch.ones(4).bool()},
            ValueError,
            "`column_mask` and `cost` must have the same dimensions columns",
        ),
        (
            {"cost": torch.rand(2, 3), "column_mask": torch.ones(3)},
            TypeError,
            "`column_mask` must have dtype torch.bool, got torch.float32",
        ),
        (
            {"cost": torch.rand(2, 3), "row_mask": torch.ones(2, device="meta").bool()},
            ValueError,
            "`row_mask` must be on the device of `cost` cpu, got meta",
        ),
        (
            {"cost": torch.rand(2, 3), "backend": "magic"},
            ValueError,
            "`backend` must be 'auto' or one of .*'scipy'.*, got 'magic'",
        ),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        dkl.linear_sum_assignment(**arguments)


@pytest.mark.parametrize("with_masks", [False, True])
def test_operator_is_well_formed(with_masks):
    masks = (torch.ones(2, 4).bool(), torch.ones(2, 3).bool()) if with_masks else (None, None)
    operator = torch.ops.detr_kd_losses.linear_sum_assignment.default
    torch.library.opcheck(operator, (torch.rand(2, 4, 3), *masks, "scipy"))


def test_compiles_without_graph_break():
    @torch.compile(fullgraph=True, backend="eager")
    def total(cost):
        assignment = dkl.linear_sum_assignment(cost * 2)
        return cost.gather(-1, assignment.unsqueeze(-1)).sum()

    for size in (4, 5, 6):
        cost = torch.rand(2, size, size)
        expected = cost.gather(-1, dkl.linear_sum_assignment(cost).unsqueeze(-1)).sum()
        torch.testing.assert_close(total(cost), expected)


def test_a_compiler_does_not_look_into_the_solver(monkeypatch):
    """Not even where it leaves the frame around the operator to Python, and goes on with those that this one calls."""
    traced = []

    def solve(cost):
        traced.append(torch.compiler.is_compiling())
        return scipy.optimize.linear_sum_assignment(cost)

    monkeypatch.setattr(assignment_module, "BACKENDS", {"spy": _cpu.CpuBackend(solve)})

    @torch.compiler.disable(recursive=False)
    def call(cost):
        return torch.ops.detr_kd_losses.linear_sum_assignment(cost, None, None, "spy")

    torch.compile(lambda cost: call(cost) + 1, backend="eager")(torch.rand(2, 4, 4))
    assert traced == [False, False]


def test_the_module_can_be_loaded_again():
    code = """if True:
        import importlib, torch, detr_kd_losses.assignment as a
        importlib.reload(a)
        print(a.linear_sum_assignment(torch.eye(2)).tolist())
    """
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout.split() == [
        b"[1,",
        b"0]",
    ]


@pytest.mark.parametrize("backend", ["scipy", pytest.param("lapx", marks=WITH_LAPX)])
def test_large_problems_in_threads_equal_problem_by_problem(backend, monkeypatch):
    cost = torch.rand(6, 130, 140)
    columns = torch.rand(6, 140) < 0.8
    monkeypatch.setattr(_cpu, "_available_cpus", lambda: 3)
    threaded = dkl.linear_sum_assignment(cost, column_mask=columns, backend=backend)
    monkeypatch.setattr(_cpu, "_available_cpus", lambda: 1)
    assert threaded.equal(dkl.linear_sum_assignment(cost, column_mask=columns, backend=backend))


def test_an_error_in_a_thread_is_not_lost(monkeypatch):
    def fail(cost):
        msg = "solver broke"
        raise ArithmeticError(msg)

    monkeypatch.setattr(_cpu, "_available_cpus", lambda: 2)
    monkeypatch.setattr(assignment_module, "BACKENDS", {"broken": _cpu.CpuBackend(fail)})
    with pytest.raises(ArithmeticError, match="solver broke"):
        dkl.linear_sum_assignment(torch.rand(4, 130, 130))


@pytest.mark.parametrize(
    ("installed", "reason"),
    [(None, "pip install 'detr-kd-losses.fast.'"), (types.ModuleType("lap"), "lapx 0.11.1 or later is needed")],
)
def test_lapx_says_why_it_cannot_run(installed, reason, monkeypatch):
    monkeypatch.setitem(sys.modules, "lap", installed)
    assert dkl.select_backend(torch.rand(3, 3)) == "scipy"
    with pytest.raises(RuntimeError, match=rf"lapx: .*{reason}"):
        dkl.linear_sum_assignment(torch.rand(3, 3), backend="lapx")


def test_invert_assignment():
    assignment = torch.tensor([[[2, -1, 0], [-1, -1, -1]]])
    inverse = dkl.invert_assignment(assignment, 4)
    assert inverse.tolist() == [[[2, -1, 0, -1], [-1, -1, -1, -1]]]
    assert dkl.invert_assignment(inverse, 3).equal(assignment)
    assert dkl.invert_assignment(torch.empty(2, 0, dtype=torch.int64), 3).tolist() == [[-1] * 3] * 2
    with pytest.raises(TypeError, match=r"`assignment` must have dtype torch.int64, got torch.float32"):
        dkl.invert_assignment(torch.rand(3), 3)


def test_assignment_to_indices():
    pairs = dkl.assignment_to_indices(torch.tensor([[2, -1, 0], [-1, -1, -1]]))
    assert [(rows.tolist(), columns.tolist()) for rows, columns in pairs] == [([0, 2], [2, 0]), ([], [])]
    with pytest.raises(ValueError, match=r"`assignment` must have shape \(B, N\), got \(3,\)"):
        dkl.assignment_to_indices(torch.tensor([1, 2, 3]))
