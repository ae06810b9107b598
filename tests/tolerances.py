"""How closely two computations of the same number must agree: {dtype: (rtol, atol)}, in one place."""

import torch

TOLERANCES = {torch.float64: (1e-9, 1e-9), torch.float32: (1e-5, 1e-5)}
