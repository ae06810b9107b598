"""The trainers themselves, as they are on PyPI; `make trainers` installs them where nothing else sees them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from support.torchvision_on_cpu import import_torchvision

if os.environ.get("TRAINERS"):  # set by tests/trainers.sh, with the packages in PYTHONPATH
    import_torchvision()
else:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainers write beside themselves."""
    monkeypatch.chdir(tmp_path)
