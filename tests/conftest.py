"""Settings of the whole test suite."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import hypothesis
import pytest
import torch

from support.backends import let_lapx_take_small_problems
from support.gpu_stand_in import Compiler, interpreting_process

# Tests are many small operations: a second thread would only wait for the first.
torch.set_num_threads(1)

hypothesis.settings.register_profile("dev", deadline=None, max_examples=25)
hypothesis.settings.register_profile("ci", deadline=None, max_examples=25, derandomize=True, print_blob=True)
hypothesis.settings.register_profile("nightly", deadline=None, max_examples=1000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))


@pytest.fixture(scope="module")
def interpreter() -> Iterator[ProcessPoolExecutor]:
    """A process in which Triton interprets kernels."""
    yield from interpreting_process()


@pytest.fixture
def lapx_takes_small_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    """The solver lapx solves what would go to SciPy."""
    let_lapx_take_small_problems(monkeypatch)


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Compiler]:
    """Compiles kernels for sm_90 and does not launch them; needs no GPU."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("replaces the CUDA driver by a stand-in")
    compiler = Compiler(monkeypatch, tmp_path)
    yield compiler
    compiler.forget()
