"""How every benchmark here measures: warm-up, medians with their spread, memory of a fresh process, metadata, JSON."""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

RESULTS = Path(__file__).parent / "results"


def synchronize() -> None:
    """Wait for the GPU, if there is one in use."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def milliseconds(function: Callable[[], object], *, repeats: int = 7, warmup: int = 2) -> dict[str, float]:
    """Wall-clock time of a call: median, smallest and largest of `repeats` after `warmup`."""
    times = []
    for run in range(warmup + repeats):
        synchronize()
        start = time.perf_counter()
        function()
        synchronize()
        if run >= warmup:
            times.append(1e3 * (time.perf_counter() - start))
    return {"median": statistics.median(times), "min": min(times), "max": max(times)}


def side_by_side(functions: dict[str, Callable[[], object]], *, repeats: int = 7) -> dict[str, dict[str, float]]:
    """Time several functions in turns, so that a busy moment of the machine falls on all of them."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for run in range(repeats + 1):
        for name, function in functions.items():
            once = milliseconds(function, repeats=1, warmup=1 if run == 0 else 0)["median"]
            if run > 0:
                times[name].append(once)
    return {name: {"median": statistics.median(t), "min": min(t), "max": max(t)} for name, t in times.items()}


def peak_bytes(prepare: Callable[..., Callable[[], object]], *arguments: Any) -> int:
    """Memory that ``prepare(*arguments)()`` needs beyond what `prepare` itself has built, in a fresh process."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_peak_here, (prepare, arguments))


def _peak_here(prepare: Callable[..., Callable[[], object]], arguments: tuple[Any, ...]) -> int:
    torch.set_num_threads(1)
    function = prepare(*arguments)
    # Linux: writing 5 forgets the largest resident memory so far, which includes what building the inputs took.
    Path("/proc/self/clear_refs").write_text("5")
    before = _largest_resident()
    function()
    return _largest_resident() - before


def _largest_resident() -> int:
    """Largest resident memory of this process since it was last forgotten."""
    lines = Path("/proc/self/status").read_text().splitlines()
    kilobytes = next(line.split()[1] for line in lines if line.startswith("VmHWM"))
    return 1024 * int(kilobytes)


def allocated_bytes(function: Callable[[], object]) -> int:
    """The most that is allocated on the CPU at a time while a call runs: every temporary, none of what was there."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    # The profiler's only account of memory in time: bytes that are taken, or, as negative ones, given back.
    events = profiler.profiler.kineto_results.events()
    changes = [event.nbytes() for event in sorted(events, key=start_of) if event.name() == "[memory]"]
    return max(accumulate(changes, initial=0))


def start_of(event: Any) -> int:
    """When an event of the profiler began, in nanoseconds."""
    return event.start_ns()


def environment() -> dict[str, Any]:
    """What the numbers depend on."""
    versions = {}
    for package in ("torch", "numpy", "scipy", "lapx", "triton", "torch-linear-assignment"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "device": device_name(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": versions,
    }


def device_name() -> str:
    """Name of the GPU, or of the processor."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def save(area: str, results: dict[str, Any]) -> Path:
    """Write ``results/<area>--<cpu or gpu name>.json``."""
    RESULTS.mkdir(exist_ok=True)
    device = "cpu" if not torch.cuda.is_available() else device_name().replace(" ", "-").lower()
    path = RESULTS / f"{area}--{device}.json"
    path.write_text(json.dumps({"environment": environment(), **results}, indent=1) + "\n")
    return path
