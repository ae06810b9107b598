"""What the tests of the examples share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


@pytest.fixture
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def small_teachers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of the teachers of a small world of experiments."""
    from support.small_world import forget, make_small_world

    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        make_small_world(folder, patch)
        yield folder
    forget()


@pytest.fixture
def small_world(small_teachers: Path) -> Path:
    """The same, without what another test has left in memory."""
    from support.small_world import forget

    forget()
    return small_teachers
