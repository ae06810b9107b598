"""Whether a Triton kernel can run on a tensor, without importing Triton."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch
from torch import Tensor

__all__: list[str] = []


def why_no_triton(name: str, tensor: Tensor, *, capability: tuple[int, int]) -> list[str]:
    """Why no Triton kernel for GPUs of at least `capability` can run on `tensor` here and now; empty if one can."""
    reasons = []
    if find_spec("triton") is None:
        reasons.append("Triton is not installed: pip install triton")
    if tensor.is_cuda:
        if torch.cuda.get_device_capability(tensor.device) < capability:
            reasons.append(f"it needs a GPU of compute capability {'.'.join(map(str, capability))} or newer")
    elif not interprets():
        reasons.append(f"it runs on CUDA (or in Triton's interpreter), and the {name} is on {tensor.device.type}")
    return reasons


def is_wrapped(tensor: Tensor) -> bool:
    """Whether a transform of torch.func, or a batch of gradients, stands between `tensor` and its memory."""
    functorch = torch._C._functorch
    return functorch.is_functorch_wrapped_tensor(tensor) or functorch.is_legacy_batchedtensor(tensor)


def interprets() -> bool:
    """Whether Triton runs kernels in its interpreter, on a CPU, which its own switch decides."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
