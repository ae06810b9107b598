"""The benchmark of the feature loss against memory: what it counts, and that it runs without a GPU."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"


@pytest.fixture(scope="module")
def benchmark():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        return importlib.import_module("feature_bandwidth")


@pytest.mark.parametrize("variant", ["official", "default", "Eq. 9"])
@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_bytes_are_those_of_student_teacher_and_gradient(dtype, size, variant, benchmark):
    case = replace(benchmark.DEFAULT, images=1, channels=8, levels=((5, 6), (3, 3)))
    row = benchmark.compare(case, dtype, variant, 1e9)
    assert row["bytes"] == 3 * size * 8 * (5 * 6 + 3 * 3)
    assert row["milliseconds_of_bytes"] == pytest.approx(1e-6 * row["bytes"])
    assert row["ratio"] == row["milliseconds"] / row["milliseconds_of_bytes"] > 0
    step, _ = benchmark.make_loss(case, benchmark.DTYPES[dtype], variant)
    for gradient in step():
        assert gradient.dtype == benchmark.DTYPES[dtype]
        assert gradient.abs().max() > 0


def test_bandwidth_counts_what_is_read_and_what_is_written(benchmark, monkeypatch):
    monkeypatch.setattr(benchmark, "milliseconds", lambda function, repeats: (function(), {"median": 2.0})[1])
    assert benchmark.bandwidth(1000) == 2 * 1000 / 2e-3
