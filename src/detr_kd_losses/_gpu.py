"""Whether a Triton kernel can run on a tensor, without importing Triton."""

from __future__ import annotations

import os
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

__all__: list[str] = []


def why_no_triton(
    name: str, tensor: Tensor, *, capability: tuple[int, int], version: tuple[int, int] = (0, 0)
) -> list[str]:
    """Why no kernel for Triton and GPUs of at least these can run on `tensor` here and now; empty if one can."""
    reasons = []
    installed = triton_version()
    if installed is None:
        reasons.append("Triton is not installed: PyTorch for CUDA brings the one that fits it")
    elif installed < version:
        reasons.append(
            f"it needs Triton {_dotted(version)} or newer, got {_dotted(installed)}: a newer PyTorch brings one"
        )
    if tensor.is_cuda:
        if torch.cuda.get_device_capability(tensor.device) < capability:
            reasons.append(f"it needs a GPU of compute capability {_dotted(capability)} or newer")
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


@cache
def triton_version() -> tuple[int, int] | None:
    """Major and minor version of the Triton that would be imported, None if there is none.

    Read from its file, for it takes a second to import and goes by several names where packages are listed.
    """
    spec = find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    found = re.search(r"""^__version__ = ["'](\d+)\.(\d+)""", Path(spec.origin).read_text(), re.MULTILINE)
    return (int(found[1]), int(found[2])) if found else (999, 0)  # one to come, which writes it in another way


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
