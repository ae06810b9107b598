"""Memory of the losses of box distributions, masks and plain features: what is counted, and that it stays in bounds."""

from __future__ import annotations

import importlib
import json
from functools import partial
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"


@pytest.fixture(scope="module")
def benchmark():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        return importlib.import_module("loss_memory")


def test_every_temporary_is_counted(benchmark):
    values = torch.ones(1000, 1000)
    for function, arrays in (
        (lambda: values * 2, 1),
        (lambda: values * 2 + values * 3, 3),
        (lambda: values.mul_(1), 0),
        (lambda: values.mT.log_softmax(-1), 2),  # the operation's own contiguous copy
    ):
        assert benchmark.allocated_bytes(function) == pytest.approx(arrays * values.nbytes, abs=20_000)


def small_cases(benchmark):
    """Those of one small map, masks and box distributions, and features of every option."""
    yield from (
        (name, case) for name, case in benchmark.CASES.items() if "pyramid" not in name and "padding" not in name
    )
    for distance in benchmark.DISTANCES:
        for rows in (False, True):
            options = {"padded": True, "weighted": distance != "channel", "rows": rows}
            yield f"{distance}, {options}", partial(benchmark.features, distance, (2, 64, 25, 42), **options)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_no_loss_needs_more_than_four_times_its_inputs(benchmark, dtype):
    measured = {name: benchmark.memory(case, benchmark.DTYPES[dtype]).ratio for name, case in small_cases(benchmark)}
    assert len(measured) > 16
    assert {name: ratio for name, ratio in measured.items() if ratio > benchmark.BOUND} == {}


def test_nor_did_it_in_the_results_that_the_page_cites(benchmark):
    cases = json.loads((BENCHMARKS / "results" / "loss_memory--cpu.json").read_text())["cases"]
    assert cases.keys() == benchmark.CASES.keys()
    assert max(row["ratio"] for rows in cases.values() for row in rows.values()) <= benchmark.BOUND
