"""A criterion step, forward and backward: the package against the public formulation written in plain loops.

    python examples/benchmarks/criterion.py            # about five minutes on a CPU; with the extra `testing`

Same inputs, same numbers (checked first), timed in turns. Writes results/criterion--<device>.json.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import plain
import torch
from measure import peak_bytes, save, side_by_side
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import detr_kd_losses as dkl
from detr_kd_losses.testing import steps

Levels = tuple[tuple[int, int], ...]
# Strides 8, 16, 32 and 64 of an 800 x 1333 image, and of one of half the height and width.
PYRAMID: Levels = ((100, 167), (50, 84), (25, 42), (13, 21))
HALF_PYRAMID: Levels = ((50, 84), (25, 42), (13, 21), (7, 11))


@dataclass(frozen=True)
class Case:
    """Sizes of a step."""

    images: int = 2
    layers: int = 6
    student_queries: int = 300
    teacher_queries: int = 300
    classes: int = 80
    channels: int = 256
    targets: int = 20
    levels: Levels = PYRAMID


DEFAULT = Case()
# The feature loss: its options, and whether all teacher queries of a layer have a quality or one for each target.
VARIANTS: dict[str, tuple[dict[str, str], bool]] = {
    "official": ({"variant": "official"}, True),
    "Eq. 9": ({"variant": "paper"}, True),
    "default": ({"variant": "paper", "normalize": "max"}, False),
}
# One size varied at a time, the others as in the default case.
GROWTH: dict[str, tuple[object, ...]] = {
    "images": (1, 2, 4),
    "layers": (1, 3, 6),
    "student_queries": (100, 300, 900),
    "teacher_queries": (100, 300, 900),
    "levels": (HALF_PYRAMID, PYRAMID),
}


def make_step(case: Case) -> steps.CriterionInputs:
    """Predictions and targets of a step, the student's with gradients."""
    height, width = case.levels[0]  # each further level is half as large
    return steps.make_step(
        students=case.student_queries,
        teachers=case.teacher_queries,
        images=case.images,
        classes=case.classes,
        targets=case.targets,
        counts=torch.linspace(1, case.targets, case.images).round().int().tolist(),
        stages=case.layers,
        channels=case.channels,
        height=height,
        width=width,
        levels=len(case.levels),
        padded=False,
        logit_shift=-4.0,
        requires_grad=True,
    )


def package_criterion(implementation: str, part: str) -> dkl.DETRDistillationLoss:
    """The preset that computes what the plain loops do, or the criterion without options; one term of it, or all."""
    criterion = dkl.DETRDistillationLoss("official" if implementation == "package" else "paper")
    if implementation == "package":
        criterion.terms["logits"].class_loss = "bce"  # the public code's number; "kl" has the same gradient
    return criterion if part == "all" else dkl.DETRDistillationLoss([criterion.terms[part]])


def forward(which: str, case: Case) -> Callable[[], Tensor]:
    """A function that computes one loss of one implementation, say ``"plain feature"``, on fixed inputs.

    ``"package"`` is the preset that computes what ``"plain"`` does, ``"default"`` the criterion without options.
    """
    student, teacher, targets = make_step(case)
    implementation, part = which.split()
    if implementation != "plain":
        criterion = package_criterion(implementation, part)
        return lambda: sum(criterion(student, teacher, targets).values())
    parts = {
        "logits": lambda: plain.logits_loss(student, teacher),
        "feature": lambda: 20 * plain.feature_loss(student, teacher, targets),
        "query_group": lambda: plain.query_group_loss(student, teacher, targets),
    }
    return parts[part] if part != "all" else lambda: sum(compute() for compute in parts.values())


def forward_backward(which: str, case: Case) -> Callable[[], None]:
    """The same, with the backward pass."""
    compute = forward(which, case)
    return lambda: compute().backward()


def compare(part: str, case: Case) -> dict[str, object]:
    """Check that both implementations agree, then time and weigh them."""
    ours, theirs = forward(f"package {part}", case)(), forward(f"plain {part}", case)()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    names = ("package", "plain")
    times = side_by_side({name: forward_backward(f"{name} {part}", case) for name in names}, repeats=5)
    memory = {name: peak_bytes(forward_backward, f"{name} {part}", case) for name in names}
    return {
        "value": ours.item(),
        "milliseconds": times,
        "peak_bytes": memory,
        "speed_up": times["plain"]["median"] / times["package"]["median"],
        "memory_share": memory["package"] / memory["plain"],
    }


def mask_flops(case: Case) -> dict[str, float]:
    """Floating-point operations of the official mask of all layers and levels."""
    _, teacher, _ = make_step(case)
    quality = torch.rand(case.layers, case.images, case.teacher_queries)
    with FlopCounterMode(display=False) as package:
        for level in teacher.features:
            dkl.target_aware_mask(level, teacher.queries, quality, variant="official")
    with FlopCounterMode(display=False) as reference:
        for layer in range(case.layers):
            for level in teacher.features:
                torch.einsum("bmc,bchw->bmhw", teacher.queries[layer], level)
    package, reference = package.get_total_flops(), reference.get_total_flops()
    return {"package": package, "plain": reference, "ratio": reference / package}


def feature_arguments(variant: str, case: Case) -> tuple[tuple[Any, ...], dict[str, str]]:
    """Arguments and options of the feature loss, with qualities at random."""
    student, teacher, _ = make_step(case)
    options, dense = VARIANTS[variant]
    queries = teacher.queries if dense else teacher.queries[:, :, : case.targets]
    return (student.features, teacher.features, queries, torch.rand(queries.shape[:-1])), options


def feature_loss(variant: str, case: Case, *, compiled: bool = False) -> Callable[[], None]:
    """Forward and backward of the feature loss alone."""
    arguments, options = feature_arguments(variant, case)
    function = dkl.TargetAwareFeatureLoss(**options)
    if compiled:
        function = torch.compile(function, fullgraph=True)
    return lambda: function(*arguments).backward()


def growth(variant: str, field: str, small: int, large: int) -> dict[str, float]:
    """How the time of the feature loss grows with one size, everything else as in the default case."""
    cases = {str(value): replace(DEFAULT, **{field: value}) for value in (small, large)}
    times = side_by_side({name: feature_loss(variant, case) for name, case in cases.items()}, repeats=15)
    medians = {name: time["median"] for name, time in times.items()}
    return {**medians, "growth": medians[str(large)] / medians[str(small)] - 1}


def compiled(variant: str) -> dict[str, float]:
    """Time of the feature loss with and without torch.compile: milliseconds."""
    steps = {name: feature_loss(variant, DEFAULT, compiled=name == "compiled") for name in ("eager", "compiled")}
    return {name: time["median"] for name, time in side_by_side(steps, repeats=15).items()}


def criterion_growth(implementation: str, field: str) -> dict[str, float]:
    """How the time of the whole criterion, forward and backward, grows with one size: milliseconds by value."""
    steps = {}
    for value in GROWTH[field]:
        name = f"{sum(map(prod, value))} cells" if isinstance(value, tuple) else str(value)
        steps[name] = forward_backward(f"{implementation} all", replace(DEFAULT, **{field: value}))
    return {name: time["median"] for name, time in side_by_side(steps, repeats=5).items()}


def main() -> None:
    torch.set_num_threads(1)
    results = {"case": vars(DEFAULT), "parts": {}}
    print(f"{'part':10}{'plain ms':>12}{'package ms':>12}{'faster':>10}{'memory':>10}")
    for part in ("logits", "feature", "query_group", "all"):
        row = results["parts"][part] = compare(part, DEFAULT)
        plain_ms, package_ms = (row["milliseconds"][name]["median"] for name in ("plain", "package"))
        print(f"{part:10}{plain_ms:12.1f}{package_ms:12.1f}{row['speed_up']:9.1f}x{row['memory_share']:10.1%}")
    results["mask_flops"] = mask_flops(DEFAULT)
    print(f"mask FLOPs: {results['mask_flops']['ratio']:.0f} times fewer")
    results["growth"] = {
        f"{variant} {field}": growth(variant, field, small, large)
        for variant in VARIANTS
        for field, small, large in (("layers", 1, 6), ("teacher_queries", 100, 900))
    }
    for what, row in results["growth"].items():
        print(f"feature loss, {what}: {row}")
    results["compiled"] = {variant: compiled(variant) for variant in VARIANTS}
    for what, row in results["compiled"].items():
        print(f"feature loss, {what}, ms: " + ", ".join(f"{name}: {ms:.0f}" for name, ms in row.items()))
    results["criterion_growth"] = {
        f"{implementation} {field}": criterion_growth(implementation, field)
        for implementation in ("package", "default")
        for field in GROWTH
    }
    for what, row in results["criterion_growth"].items():
        print(f"criterion, {what}, ms: " + ", ".join(f"{value}: {ms:.0f}" for value, ms in row.items()))
    print(save("criterion", results))


if __name__ == "__main__":
    main()
