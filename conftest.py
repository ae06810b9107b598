"""What the examples in docstrings may use without importing it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import detr_kd_losses as dkl


@pytest.fixture(autouse=True)
def names_of_docstrings(doctest_namespace: dict[str, Any]) -> None:
    """A module that has no use for torch itself still shows tensors in its examples."""
    doctest_namespace["torch"] = torch
    doctest_namespace["dkl"] = dkl
