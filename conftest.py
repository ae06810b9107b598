"""What the examples in docstrings may use without importing it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import detr_kd_losses as dkl

# Examples that need what is installed with an extra.
NEEDS = {"detr_kd_losses.training.saving.PredictionWriter": "safetensors"}


@pytest.fixture(autouse=True)
def names_of_docstrings(request: pytest.FixtureRequest, doctest_namespace: dict[str, Any]) -> None:
    """A module that has no use for torch itself still shows tensors in its examples."""
    if request.node.name in NEEDS:
        pytest.importorskip(NEEDS[request.node.name], reason=f"{NEEDS[request.node.name]} is not installed")
    doctest_namespace["torch"] = torch
    doctest_namespace["dkl"] = dkl
