"""Thousands of distillation steps, each of another shape: memory that grows, numbers that are none, warnings.

    python examples/soak.py --steps 10000

A step draws sizes, heads, preset and precision, a share of edge cases (saturated logits, boxes without area, images
without targets), computes the student's detection loss and all distillation losses, and runs backward.
"""

from __future__ import annotations

import argparse
import gc
import random
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import torch

import detr_kd_losses as dkl

CHANNELS = 8


class Report(NamedTuple):
    """What a soak run saw. Growth is from a tenth of the run to its end."""

    steps: int
    shapes: int
    cpu_seconds: float
    memory_mib: float
    memory_growth_mib: float
    tensor_growth: int
    not_finite: int
    warnings: int


def soak(steps: int, seed: int = 0) -> Report:
    """Run the steps and watch the process."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    shapes, not_finite = set(), 0
    start = time.process_time()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number in range(steps):
            if number == steps // 10:
                memory, tensors = resident_mib(), live_tensors()
            shape, finite = step(rng)
            shapes.add(shape)
            not_finite += not finite
    final = resident_mib()
    return Report(
        steps=steps,
        shapes=len(shapes),
        cpu_seconds=time.process_time() - start,
        memory_mib=final,
        memory_growth_mib=final - memory,
        tensor_growth=live_tensors() - tensors,
        not_finite=not_finite,
        warnings=len(caught),
    )


def step(rng: random.Random) -> tuple[tuple[int, ...], bool]:
    """One step; its sizes, and whether all losses and gradients are finite."""
    sizes = {
        "L": (1, 6),
        "B": (1, 4),
        "N": (1, 30),
        "M": (1, 40),
        "C": (1, 9),
        "T": (0, 10),
        "H": (1, 12),
        "W": (1, 12),
    }
    size = {axis: rng.randint(*bounds) for axis, bounds in sizes.items()}
    teacher_layers = rng.randint(1, 6)
    heads = {side: rng.choice(("sigmoid", "softmax")) for side in ("student", "teacher")}
    dtype = rng.choice((torch.float32, torch.float32, torch.float16, torch.bfloat16))
    student = output(rng, size, size["L"], size["N"], heads["student"], dtype, group=size["M"])
    teacher = output(rng, size, teacher_layers, size["M"], heads["teacher"], dtype)
    leaves = [tensor for tensor in student if isinstance(tensor, torch.Tensor) and tensor.is_floating_point()]
    for leaf in leaves:
        leaf.requires_grad_()
    targets = dkl.Targets(
        torch.randint(size["C"], (size["B"], size["T"])),
        boxes(rng, (size["B"], size["T"])),
        torch.arange(size["T"]) < torch.randint(size["T"] + 1, (size["B"], 1)),
    )
    softmax = heads["student"] == "softmax"
    criterion = dkl.DETRDistillationLoss(
        rng.choice(("official", "paper")),
        student_activation=heads["student"],
        teacher_activation=heads["teacher"],
        temperature=rng.choice((1.0, 2.0)),
        stage_map=rng.choice(("even", "last")),
    )
    losses = criterion(student, teacher, targets)
    assignment = dkl.match_targets(
        student.logits, student.boxes, *targets, class_cost="softmax" if softmax else "focal"
    )
    losses |= dkl.detection_loss(
        student.logits, student.boxes, *targets, assignment, class_loss="cross_entropy" if softmax else "focal"
    )
    loss = sum(losses.values())
    loss.backward()
    finite = [loss, *(leaf.grad for leaf in leaves)]
    return (*size.values(), teacher_layers), all(bool(torch.isfinite(tensor).all()) for tensor in finite)


def output(
    rng: random.Random,
    size: dict[str, int],
    layers: int,
    queries: int,
    head: str,
    dtype: torch.dtype,
    group: int | None = None,
) -> dkl.DetectorOutput:
    """Random outputs of a detector."""
    classes = size["C"] + (head == "softmax")
    lead = (layers, size["B"])
    one_group = (
        {}
        if group is None
        else {
            "group_logits": logits(rng, (*lead, group, classes)).to(dtype),
            "group_boxes": boxes(rng, (*lead, group)).to(dtype),
        }
    )
    return dkl.DetectorOutput(
        logits(rng, (*lead, queries, classes)).to(dtype),
        boxes(rng, (*lead, queries)).to(dtype),
        queries=torch.randn(*lead, queries, CHANNELS, dtype=dtype) if group is None else None,
        features=torch.randn(size["B"], CHANNELS, size["H"], size["W"], dtype=dtype),
        padding_mask=torch.rand(size["B"], size["H"], size["W"]) < 0.9,
        **one_group,
    )


def logits(rng: random.Random, shape: tuple[int, ...]) -> torch.Tensor:
    """Logits, now and then saturated."""
    return rng.choice((1.0, 3.0, 3.0, 1e4)) * torch.randn(shape).clamp(-3, 3)


def boxes(rng: random.Random, shape: tuple[int, ...]) -> torch.Tensor:
    """Boxes, now and then without area."""
    return torch.rand(*shape, 4) * torch.tensor([1.0, 1.0, 1.0, rng.choice((1.0, 1.0, 1.0, 0.0))])


def live_tensors() -> int:
    """Tensors that Python still holds."""
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def resident_mib() -> float:
    """Memory that the process occupies (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for name, value in soak(arguments.steps, arguments.seed)._asdict().items():
        print(f"{name:18s} {value:.1f}" if isinstance(value, float) else f"{name:18s} {value}")
