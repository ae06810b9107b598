"""Thousands of distillation steps, each of another shape: memory that grows, NaNs, warnings.

    python examples/soak.py --steps 10000              # with the extra `testing`

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
from torch.utils._pytree import tree_leaves

import detr_kd_losses as dkl
from detr_kd_losses.testing.steps import make_step

CHANNELS = 8
# Now and then saturated; now and then without area.
LOGITS = ("generic", "generic", "tied", "saturated")
BOXES = ("generic", "generic", "touching", "degenerate")


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
    kinds = {side: {"logit_kind": rng.choice(LOGITS), "box_kind": rng.choice(BOXES)} for side in heads}
    student, teacher, targets = make_step(
        students=size["N"],
        teachers=size["M"],
        images=size["B"],
        classes=size["C"],
        targets=size["T"],
        stages=size["L"],
        channels=CHANNELS,
        height=size["H"],
        width=size["W"],
        activation=heads["student"],
        teacher_options={"stages": teacher_layers, "activation": heads["teacher"], **kinds["teacher"]},
        dtype=dtype,
        requires_grad=True,
        seed=rng.getrandbits(16),
        **kinds["student"],
    )
    student = student._replace(queries=None)  # nothing is learned from them
    leaves = [leaf for leaf in tree_leaves(student) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
    softmax = heads["student"] == "softmax"
    criterion = dkl.DETRDistillationLoss(
        rng.choice(("official", "paper")),
        student_activation=heads["student"],
        teacher_activation=heads["teacher"],
    )
    criterion.terms["logits"].temperature = rng.choice((1.0, 2.0))
    criterion.terms["logits"].stage_map = criterion.terms["query_group"].stage_map = rng.choice(("even", "last"))
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
