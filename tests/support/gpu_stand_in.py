"""Triton kernels without a GPU: run in Triton's interpreter, or compiled for sm_90 and not launched."""

from __future__ import annotations

import multiprocessing
import re
import subprocess
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

WARM_UP = {"warmup": True}  # compile, do not launch


def interpreting_process() -> Iterator[ProcessPoolExecutor]:
    """A process in which Triton interprets kernels: it decides that when it is imported."""
    pytest.importorskip("triton")
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            patch.setenv("PYTHONWARNINGS", "error::RuntimeWarning")  # NumPy's, such as a scalar overflow
            pool.submit(torch.set_num_threads, 1).result()
        yield pool


class Compiler:
    """Stands in for the driver of a GPU: the kernels that it `watch`es are compiled where they would be launched."""

    def __init__(self, patch: pytest.MonkeyPatch, folder: Path) -> None:
        from triton.backends.compiler import GPUTarget
        from triton.runtime import driver

        try:
            from triton.backends.nvidia.compiler import get_ptxas

            self.tools = Path(get_ptxas(90).path).parent
        except (ImportError, RuntimeError) as error:
            pytest.skip(f"no ptxas: {error}")
        device = SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", 90, 32),
            get_current_device=lambda: 0,
            get_current_stream=lambda _: 0,
        )
        patch.delenv("TRITON_INTERPRET", raising=False)
        patch.setenv("TRITON_CACHE_DIR", str(folder))
        patch.setattr(driver, "_active", device)
        self.patch, self.folder, self.kernels = patch, folder, []

    def watch(self, kernel: Any) -> Any:
        if not hasattr(kernel, "device_caches"):
            pytest.skip("Triton interprets kernels in this process")
        run = type(kernel).run
        self.patch.setattr(kernel, "run", lambda *args, **options: run(kernel, *args, **options | WARM_UP))
        self.kernels.append(kernel)
        kernel.device_caches.clear()
        return kernel

    def compiled(self, kernel: Any) -> list[Any]:
        """The binaries of a kernel so far."""
        return list(kernel.device_caches[0][0].values())

    def memory_of_registers(self, kernel: Any) -> list[dict[str, int]]:
        """Bytes of each binary in which registers are spilled: stack and local memory."""
        usages = []
        for binary in self.compiled(kernel):
            cubin = self.folder / "kernel.cubin"
            cubin.write_bytes(binary.asm["cubin"])
            command = [self.tools / "cuobjdump", "--dump-resource-usage", cubin]
            printed = subprocess.run(command, capture_output=True, check=True, text=True).stdout
            usages.append({name: int(size) for name, size in re.findall(r"(STACK|LOCAL):(\d+)", printed)})
        return usages

    def forget(self) -> None:
        for kernel in self.kernels:
            kernel.device_caches.clear()
