"""Which assignment backends run here, and how the faster one is made to take small problems too."""

from __future__ import annotations

import pytest
import torch

from detr_kd_losses.assignment import BACKENDS, _cpu

# By backend, why it cannot solve a problem on the CPU; Triton can, in its interpreter.
REASONS = {name: backend.unsupported_reasons(torch.zeros(1, 1, 1)) for name, backend in BACKENDS.items()}
RUNNABLE = [name for name, reasons in REASONS.items() if not reasons]
# Those that are made for the CPU, of which one that cannot run is skipped and says why.
CPU_BACKENDS = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            bool(REASONS[name]), reason=f"{name} cannot run on the CPU: {'; '.join(REASONS[name])}"
        ),
    )
    for name, backend in BACKENDS.items()
    if backend.device_type == "cpu"
]


def let_lapx_take_small_problems(patch: pytest.MonkeyPatch) -> None:
    """They would go to SciPy, and lapx would be tested on nothing."""
    patch.setattr(_cpu, "_LAPX_SIZE", 0)
