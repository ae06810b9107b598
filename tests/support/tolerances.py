"""How close to its oracle a result has to be."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

# dtype: (rtol, atol)
TOLERANCES = {torch.float64: (1e-9, 1e-9), torch.float32: (1e-5, 1e-5)}


def assert_close(actual: Tensor, expected: np.ndarray | float, what: str = "result") -> None:
    """Raise AssertionError unless `actual` equals the float64 `expected`, within the tolerance of its dtype.

    `atol` is for an array whose largest entry is 1 or above. It shrinks with that entry, a thousandfold at most,
    so that the small gradients of a mean are compared as strictly as large ones.
    """
    rtol, atol = TOLERANCES[actual.dtype]
    reference = torch.as_tensor(expected, dtype=torch.float64)
    largest = reference.abs().max().item() if reference.numel() else 0.0
    torch.testing.assert_close(
        actual.detach().double(),
        reference,
        rtol=rtol,
        atol=atol * min(1.0, max(largest, 1e-3)),
        msg=lambda message: f"{what}: {message}",
    )
