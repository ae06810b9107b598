"""What tests of the criterion share."""

from __future__ import annotations

import pytest

from detr_kd_losses.assignment import BACKENDS


@pytest.fixture
def counting(monkeypatch):
    """A backend that counts how often it is asked."""

    class Counting:
        device_type, calls = "cpu", 0

        def unsupported_reasons(self, cost):
            return []

        def solve(self, *problem):
            self.calls += 1
            return BACKENDS["scipy"].solve(*problem)

    backend = Counting()
    monkeypatch.setitem(BACKENDS, "counting", backend)
    return backend
