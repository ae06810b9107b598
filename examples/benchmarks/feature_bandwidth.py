"""The feature loss against the memory it has to move: student and teacher read once, the gradient written once.

    python examples/benchmarks/feature_bandwidth.py            # half a minute on a GPU, two minutes on a CPU

Bytes are counted, and the bandwidth is that of a copy, measured in the same run. On a GPU a step is replayed from a
CUDA graph, so that launching does not count. Writes results/feature_bandwidth--<device>.json.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from measure import milliseconds, save

import detr_kd_losses as dkl
from criterion import DEFAULT, VARIANTS, Case, feature_arguments

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
COPIED = {"cuda": 2**32, "cpu": 2**28}


def bandwidth(size: int) -> float:
    """Bytes per second, read and written ones counted, of a copy of `size` bytes."""
    source = torch.ones(size // 4, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * size / (1e-3 * milliseconds(lambda: target.copy_(source), repeats=9)["median"])


def make_loss(case: Case, dtype: torch.dtype, variant: str) -> tuple[Callable[[], object], int]:
    """Forward and backward of the loss, and the bytes of student, teacher and gradient."""
    (students, teachers, *of_queries), options = feature_arguments(variant, case)
    students, teachers = ([level.detach().to(DEVICE, dtype) for level in levels] for levels in (students, teachers))
    of_queries = [tensor.to(DEVICE) for tensor in of_queries]
    for level in students:
        level.requires_grad_()

    def step() -> object:
        loss = dkl.target_aware_feature_loss(students, teachers, *of_queries, **options)
        return torch.autograd.grad(loss, students)

    return step, sum(2 * s.nbytes + t.nbytes for s, t in zip(students, teachers, strict=True))


def replayed(step: Callable[[], object]) -> Callable[[], object]:
    """The same work from a CUDA graph; on a CPU the step itself."""
    if DEVICE == "cpu":
        return step
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def compare(case: Case, dtype: str, variant: str, bytes_per_second: float) -> dict[str, float]:
    """Time of a step, in milliseconds, beside that of moving its bytes once."""
    step, size = make_loss(case, DTYPES[dtype], variant)
    once = 1e3 * size / bytes_per_second
    time = milliseconds(replayed(step), repeats=9)["median"]
    return {"bytes": size, "milliseconds": time, "milliseconds_of_bytes": once, "ratio": time / once}


def main() -> None:
    torch.set_num_threads(1)
    speed = bandwidth(COPIED[DEVICE])
    results: dict[str, object] = {"copy_bytes_per_second": speed, "case": vars(DEFAULT)}
    print(f"copy: {speed / 1e9:.0f} GB/s")
    print(f"{'images':>6}  {'dtype':10}{'variant':10}{'ms':>10}{'bytes, ms':>12}{'ratio':>8}")
    for images in (2, 16) if DEVICE == "cuda" else (2,):
        for dtype in DTYPES:
            for variant in VARIANTS:
                row = compare(replace(DEFAULT, images=images), dtype, variant, speed)
                results[f"{images} images, {dtype}, {variant}"] = row
                time, once = row["milliseconds"], row["milliseconds_of_bytes"]
                print(f"{images:6}  {dtype:10}{variant:10}{time:10.3f}{once:12.3f}{row['ratio']:8.2f}")
    print(save("feature_bandwidth", results))


if __name__ == "__main__":
    main()
