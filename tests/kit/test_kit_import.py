"""The kit without Hypothesis names the extra."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["testing", "testing.strategies", "testing.law"])
def test_without_hypothesis_the_extra_is_named(module):
    code = f"""if True:
        import sys
        sys.modules["hypothesis"] = None  # as if it were not installed
        import detr_kd_losses
        try:
            import detr_kd_losses.{module}
        except ImportError as error:
            print(error.name, error, sep="\\n")
    """
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout.splitlines() == [
        "hypothesis",
        "detr_kd_losses.testing needs Hypothesis: pip install 'detr-kd-losses[testing]'",
    ]
