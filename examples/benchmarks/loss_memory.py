"""Memory of the losses of box distributions, masks and plain features, beside that of their inputs.

    python examples/benchmarks/loss_memory.py            # a minute on a CPU

The most that is in use at a time in a forward and a backward pass, in bytes of the allocator: the inputs, every
temporary, and the gradient. Over the bytes of the inputs alone, which are all tensors that the loss is given. Writes
results/loss_memory--cpu.json.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from measure import allocated_bytes, save
from torch import Tensor

import detr_kd_losses as dkl

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DISTANCES = ("mse", "cosine", "pearson", "channel")
BOUND = 4.0
"""A loss must not need more than so many times its inputs, the inputs themselves counted."""

Case = Callable[[torch.dtype], tuple[Callable[..., Tensor], dict[str, Any]]]


class Memory(NamedTuple):
    """Bytes of the inputs, and the most that is in use."""

    inputs: int
    most: int

    @property
    def ratio(self) -> float:
        return self.most / self.inputs


def random_assignment(queries: int, partners: int, *lead: int) -> Tensor:
    """As many pairs as there can be."""
    order = torch.rand(*lead, max(queries, partners)).argsort(-1)[..., :queries]
    return order.where(order < partners, -1)


def features(
    distance: str,
    *sizes: tuple[int, int, int, int],
    weighted: bool = False,
    padded: bool = False,
    rows: bool = False,
    dtype: torch.dtype,
) -> tuple[Callable[..., Tensor], dict[str, Any]]:
    """Levels (B, D, H, W), as they are in memory or as the rows (B, H W, D) of a transformer."""

    def level(batch: int, channels: int, height: int, width: int) -> Tensor:
        if not rows:
            return torch.randn(batch, channels, height, width).to(dtype)
        return torch.randn(batch, height * width, channels).to(dtype).mT.unflatten(2, (height, width))

    arguments: dict[str, Any] = {
        name: [level(*size) for size in sizes] for name in ("student_features", "teacher_features")
    }
    cells = [torch.rand(batch, height, width) for batch, _, height, width in sizes]
    if weighted:
        arguments["weight"] = cells
    if padded:
        arguments["padding_mask"] = [level < 0.9 for level in cells]
    return partial(dkl.feature_distillation_loss, distance=distance), arguments


def masks(
    lead: tuple[int, ...],
    queries: tuple[int, int],
    size: tuple[int, int],
    teacher_size: tuple[int, int],
    *,
    boxed: bool = False,
    dtype: torch.dtype,
) -> tuple[Callable[..., Tensor], dict[str, Any]]:
    """Masks (*lead, N, h, w) and (*lead, M, h', w'), inside the boxes of the teacher or in all cells."""
    students, teachers = queries
    arguments = {
        "student_masks": torch.randn(*lead, students, *size).to(dtype),
        "teacher_masks": torch.randn(*lead, teachers, *teacher_size).to(dtype),
        "assignment": random_assignment(students, teachers, *lead),
        **({"boxes": torch.rand(*lead, teachers, 4)} if boxed else {}),
    }
    return dkl.mask_distillation_loss, arguments


def box_distributions(
    lead: tuple[int, ...], queries: tuple[int, int], bins: tuple[int, int], *, dtype: torch.dtype
) -> tuple[Callable[..., Tensor], dict[str, Any]]:
    """Distributions (*lead, N, 4 (R_S + 1)) and (*lead, M, 4 (R_T + 1)), and references."""
    models = dict(zip(("student", "teacher"), zip(queries, bins, strict=True), strict=True))
    arguments: dict[str, Any] = {"assignment": random_assignment(*queries, *lead)}
    for model, (number, last) in models.items():
        arguments[f"{model}_distributions"] = torch.randn(*lead, number, 4 * (last + 1)).to(dtype)
        arguments[f"{model}_references"] = torch.rand(*lead, number, 4)
        arguments[f"{model}_bins"] = torch.linspace(-4, 4, last + 1)
    return partial(dkl.box_distribution_loss, student_scale=4.0, teacher_scale=4.0), arguments


# Strides 8, 16 and 32 of an 800 x 1333 image.
PYRAMID = ((2, 256, 100, 167), (2, 256, 50, 84), (2, 256, 25, 42))
LAYERS, LAST, ONE = (6, 2), (1, 2), (1,)
CASES: dict[str, Case] = {
    **{
        f"features, {distance}, {where}": partial(features, distance, *sizes, rows=where.endswith("rows"))
        for distance in DISTANCES
        for where, sizes in (("pyramid", PYRAMID), ("pyramid of rows", PYRAMID), ("one small map", ((1, 64, 20, 20),)))
    },
    **{
        f"features, {distance}, padding and weights": partial(
            features, distance, *PYRAMID, padded=True, weighted=distance != "channel"
        )
        for distance in DISTANCES
    },
    "masks of all cells, 300 and 300 queries": partial(masks, LAYERS, (300, 300), (25, 42), (25, 42)),
    "masks in boxes, 300 and 300 queries": partial(masks, LAYERS, (300, 300), (25, 42), (25, 42), boxed=True),
    "masks of all cells, 300 and 100 queries, one layer": partial(masks, LAST, (300, 100), (50, 84), (25, 42)),
    "masks in boxes, 300 and 100 queries, one layer": partial(masks, LAST, (300, 100), (50, 84), (25, 42), boxed=True),
    "masks in boxes, 100 and 300 queries, one image": partial(masks, ONE, (100, 300), (20, 20), (40, 40), boxed=True),
    "box distributions, 33 and 33 bins": partial(box_distributions, LAYERS, (300, 300), (32, 32)),
    "box distributions, 33 and 17 bins": partial(box_distributions, LAYERS, (300, 300), (32, 16)),
    "box distributions, 17 and 33 bins": partial(box_distributions, LAYERS, (300, 300), (16, 32)),
    "box distributions, 300 and 100 queries": partial(box_distributions, LAYERS, (300, 100), (32, 16)),
    "box distributions, one image": partial(box_distributions, ONE, (300, 300), (32, 32)),
}


def memory(case: Case, dtype: torch.dtype) -> Memory:
    """Of a forward and a backward pass of a case."""
    function, arguments = case(dtype=dtype)
    flat = [tensor for value in arguments.values() for tensor in (value if isinstance(value, list) else [value])]
    for name, value in arguments.items():
        if name.startswith("student_") and name != "student_bins":
            for tensor in value if isinstance(value, list) else [value]:
                tensor.requires_grad_()
    inputs = sum(tensor.nbytes for tensor in flat)
    return Memory(inputs, inputs + allocated_bytes(lambda: function(**arguments).backward()))


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    results: dict[str, dict[str, dict[str, float]]] = {}
    print(f"| | inputs, MB | {' | '.join(DTYPES)} |")
    for name, case in CASES.items():
        rows = {dtype: memory(case, DTYPES[dtype]) for dtype in DTYPES}
        results[name] = {dtype: {**row._asdict(), "ratio": row.ratio} for dtype, row in rows.items()}
        ratios = " | ".join(f"{row.ratio:.2f}" for row in rows.values())
        print(f"| {name} | {rows['float32'].inputs / 1e6:.1f} | {ratios} |", flush=True)
    print("the most:", max(row["ratio"] for rows in results.values() for row in rows.values()))
    print(save("loss_memory", {"cases": results}))


if __name__ == "__main__":
    main()
