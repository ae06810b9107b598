"""In which precision things are computed: float32 at least, autocast or not."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

__all__: list[str] = []


def full_precision(tensor: Tensor) -> Tensor:
    """`tensor` in float32 if it is in half precision, else as it is (float64 stays float64)."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def shared_dtype(*tensors: Tensor) -> torch.dtype:
    """The widest of the floating dtypes of the tensors, at least float32."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def shared_precision(*tensors: Tensor) -> list[Tensor]:
    """All tensors in the widest of their floating dtypes, at least float32."""
    dtype = shared_dtype(*tensors)
    return [tensor.to(dtype) for tensor in tensors]


def full_precision_matmul(tensor: Tensor) -> AbstractContextManager[object]:
    """Context in which matrix products on the device of `tensor` keep the precision of their inputs."""
    device = tensor.device.type
    # Compilers before PyTorch 2.12 cannot trace the question.
    available = device != "meta" if torch.compiler.is_compiling() else torch.amp.is_autocast_available(device)
    if not available:
        return nullcontext()
    return torch.autocast(device_type=device, enabled=False)
