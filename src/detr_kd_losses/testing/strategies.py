"""Hypothesis strategies for what detectors produce, edge cases included.

Hypothesis draws shapes, a kind and a seed; the seed makes the numbers. So a failure shrinks to small shapes and prints
as the call of a ``make_*`` function that repeats it. Numbers are float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from detr_kd_losses.boxes import box_xyxy_to_cxcywh
from detr_kd_losses.outputs import Predictions, Targets

__all__ = [
    "BOX_KINDS",
    "COST_KINDS",
    "LOGIT_KINDS",
    "FeaturePyramid",
    "Predictions",
    "assignments",
    "boxes",
    "costs",
    "feature_pyramids",
    "logits",
    "make_assignment",
    "make_boxes",
    "make_costs",
    "make_feature_pyramid",
    "make_logits",
    "make_planted_costs",
    "make_predictions",
    "make_targets",
    "planted_costs",
    "predictions",
    "targets",
]

BOX_KINDS = ("generic", "degenerate", "touching", "identical", "tiny", "full")
LOGIT_KINDS = ("generic", "saturated", "tied")
COST_KINDS = ("generic", "ties", "wide", "non_finite")

SEEDS = st.integers(0, 2**16)
SIZES = st.integers(1, 4)
# Duals this large, and slacks of 1, are whole numbers that float32 holds and float16 does not.
_LARGEST_DUAL = 2**18


class FeaturePyramid(NamedTuple):
    """Levels (B, D, H, W), each half as large as the one before, and their masks (B, H, W), True = valid."""

    levels: list[Tensor]
    padding_masks: list[Tensor]


def generator(seed: int) -> torch.Generator:
    """A random number generator of its own: the global one stays as it is."""
    return torch.Generator().manual_seed(seed)


def _uniform(shape: Sequence[int], numbers: torch.Generator) -> Tensor:
    return torch.rand(tuple(shape), generator=numbers, dtype=torch.float64)


def _normal(shape: Sequence[int], numbers: torch.Generator) -> Tensor:
    return torch.randn(tuple(shape), generator=numbers, dtype=torch.float64)


def make_boxes(shape: Sequence[int], *, kind: str = "generic", seed: int = 0) -> Tensor:
    """Boxes (*shape, 4), cxcywh in [0, 1].

    Args:
        shape: Leading dimensions.
        kind: ``"generic"``; ``"degenerate"``, without width, height or both; ``"touching"``, on a grid of quarters, so
            that edges and whole boxes coincide; ``"identical"``; ``"tiny"``, 1e-6 wide; ``"full"``, the whole image.
        seed: Of the numbers.
    """
    numbers = generator(seed)
    size = 0.05 + 0.6 * _uniform((*shape, 2), numbers)
    center = size / 2 + (1 - size) * _uniform((*shape, 2), numbers)
    box = torch.cat((center, size), dim=-1)
    if kind == "degenerate":
        empty = torch.tensor([[1, 0], [0, 1], [0, 0]], dtype=box.dtype)
        return torch.cat((center, size * empty[_integers(shape, 3, numbers)]), dim=-1)
    if kind == "touching":
        corner = _integers((*shape, 2), 3, numbers).double()
        return box_xyxy_to_cxcywh(torch.cat((corner, corner + 1 + _integers((*shape, 2), 2, numbers)), dim=-1) / 4)
    if kind == "identical":
        return make_boxes((), seed=seed).expand(*shape, 4).clone()
    if kind == "tiny":
        return torch.cat((center, 1e-6 * size), dim=-1)
    if kind == "full":
        return torch.tensor([0.5, 0.5, 1.0, 1.0], dtype=box.dtype).expand(*shape, 4).clone()
    return box


def _integers(shape: Sequence[int], below: int, numbers: torch.Generator) -> Tensor:
    return torch.randint(below, tuple(shape), generator=numbers)


def make_logits(shape: Sequence[int], *, kind: str = "generic", seed: int = 0) -> Tensor:
    """Logits of the given shape: ``"generic"``, ``"saturated"`` (±1e4) or ``"tied"`` (0 or 1)."""
    numbers = generator(seed)
    if kind == "saturated":
        return 2e4 * (_integers(shape, 2, numbers).double() - 0.5)
    if kind == "tied":
        return _integers(shape, 2, numbers).double()
    return 2 * _normal(shape, numbers)


def make_predictions(
    *,
    stages: int,
    images: int,
    queries: int,
    classes: int,
    box_kind: str = "generic",
    logit_kind: str = "generic",
    seed: int = 0,
) -> Predictions:
    """Predictions of all decoder layers."""
    shape = (stages, images, queries)
    return Predictions(
        make_logits((*shape, classes), kind=logit_kind, seed=seed), make_boxes(shape, kind=box_kind, seed=seed + 1)
    )


def make_targets(
    *, images: int, targets: int, classes: int, at_least: int = 0, box_kind: str = "generic", seed: int = 0
) -> Targets:
    """Ragged targets: between `at_least` and all `targets` of each image are valid."""
    numbers = generator(seed)
    labels = _integers((images, targets), classes, numbers)
    mask = torch.arange(targets) < at_least + _integers((images, 1), targets + 1 - at_least, numbers)
    return Targets(labels, make_boxes((images, targets), kind=box_kind, seed=seed + 1), mask)


def make_assignment(shape: Sequence[int], queries: int, partner_mask: Tensor, *, seed: int = 0) -> Tensor:
    """A random assignment (*shape, N): one-to-one, to valid partners, not always complete.

    Args:
        shape: Leading dimensions, (L, B).
        queries: N.
        partner_mask: (*shape, M) bool or fewer leading dimensions, True = may be a partner.
        seed: Of the numbers.
    """
    numbers = generator(seed)
    size = max(queries, partner_mask.shape[-1])
    partner = _uniform((*shape, size), numbers).argsort(-1)[..., :queries]
    valid = torch.nn.functional.pad(partner_mask, (0, size - partner_mask.shape[-1]))
    kept = valid.expand(*shape, size).gather(-1, partner) & (_uniform(partner.shape, numbers) < 0.9)
    return torch.where(kept, partner, -1)


def make_costs(*, problems: int, rows: int, columns: int, kind: str = "generic", seed: int = 0) -> Tensor:
    """Costs (problems, rows, columns).

    Args:
        problems: Number of problems.
        rows: N.
        columns: T.
        kind: ``"generic"``, one optimum; ``"ties"``, small whole numbers, many optima; ``"wide"``, over twelve orders
            of magnitude; ``"non_finite"``, with NaN and infinite entries, rows and columns.
        seed: Of the numbers.
    """
    numbers = generator(seed)
    shape = (problems, rows, columns)
    if kind == "ties":
        return _integers(shape, 3, numbers).double()
    cost = 3 * _normal(shape, numbers)
    if kind == "wide":
        return cost * 10.0 ** (_integers(shape, 13, numbers) - 6)
    if kind == "non_finite":
        bad = torch.tensor([float("nan"), float("inf"), -float("inf")], dtype=cost.dtype)[_integers(shape, 3, numbers)]
        rate = _uniform((problems, 1, 1), numbers)
        for some in (shape, (problems, rows, 1), (problems, 1, columns)):
            cost = torch.where(_uniform(some, numbers) < rate**2, bad, cost)
    return cost


def make_planted_costs(*, rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A cost (rows, columns) and its one optimal assignment (rows,), known by construction.

    Whole numbers: u_n + v_t on the planted pairs and at least 1 more elsewhere, with duals up to 2^18 (v is at most 0,
    and 0 where nothing is planted). Rounding the costs to float16, or the like, loses the optimum.
    """
    numbers = generator(seed)
    if rows > columns:
        cost, column_of_row = make_planted_costs(rows=columns, columns=rows, seed=seed)
        assignment = torch.full((rows,), -1, dtype=torch.int64)
        return cost.mT, assignment.scatter(0, column_of_row, torch.arange(columns))
    planted = torch.randperm(columns, generator=numbers)[:rows]
    u = _integers((rows, 1), _LARGEST_DUAL, numbers)
    v = torch.zeros(columns, dtype=torch.int64).scatter(0, planted, -_integers((rows,), _LARGEST_DUAL, numbers))
    slack = (1 + _integers((rows, columns), 3, numbers)).scatter(1, planted.unsqueeze(1), 0)
    return (u + v + slack).double(), planted


def make_feature_pyramid(
    *, images: int, channels: int, height: int, width: int, levels: int = 1, padded: bool = False, seed: int = 0
) -> FeaturePyramid:
    """Feature maps; if `padded`, images are smaller than the map, as in a batch of images of different sizes."""
    numbers = generator(seed)
    sizes = [(-(-height // 2**level), -(-width // 2**level)) for level in range(levels)]
    maps = [_normal((images, channels, *size), numbers) for size in sizes]
    extent = 1.0 - 0.7 * padded * _uniform((images, 2), numbers)
    masks = []
    for h, w in sizes:
        rows = torch.arange(h) < (extent[:, :1] * h).ceil()
        columns = torch.arange(w) < (extent[:, 1:] * w).ceil()
        masks.append(rows.unsqueeze(-1) & columns.unsqueeze(-2))
    return FeaturePyramid(maps, masks)


def boxes(*, shape: SearchStrategy[Sequence[int]] | None = None) -> SearchStrategy[Tensor]:
    """Boxes of every kind, (*shape, 4); by default a few in one dimension."""
    return st.builds(
        make_boxes, st.tuples(SIZES) if shape is None else shape, kind=st.sampled_from(BOX_KINDS), seed=SEEDS
    )


def logits(*, shape: SearchStrategy[Sequence[int]] | None = None) -> SearchStrategy[Tensor]:
    """Logits of every kind; by default (N, C)."""
    shape = st.tuples(SIZES, SIZES) if shape is None else shape
    return st.builds(make_logits, shape, kind=st.sampled_from(LOGIT_KINDS), seed=SEEDS)


def predictions(
    *, box_kinds: Sequence[str] = BOX_KINDS, logit_kinds: Sequence[str] = LOGIT_KINDS
) -> SearchStrategy[Predictions]:
    """Predictions with stages."""
    return st.builds(
        make_predictions,
        stages=SIZES,
        images=SIZES,
        queries=SIZES,
        classes=SIZES,
        box_kind=st.sampled_from(box_kinds),
        logit_kind=st.sampled_from(logit_kinds),
        seed=SEEDS,
    )


def targets(*, classes: int = 3, box_kinds: Sequence[str] = BOX_KINDS) -> SearchStrategy[Targets]:
    """Ragged targets, images without any included."""
    return st.builds(
        make_targets,
        images=SIZES,
        targets=st.integers(0, 4),
        classes=st.just(classes),
        box_kind=st.sampled_from(box_kinds),
        seed=SEEDS,
    )


def assignments() -> SearchStrategy[Tensor]:
    """Assignments (L, B, N) to as many or other partners than queries."""
    masks = st.builds(lambda columns: torch.ones(columns, dtype=torch.bool), SIZES)
    return st.builds(make_assignment, st.tuples(SIZES, SIZES), SIZES, masks, seed=SEEDS)


def costs(*, kinds: Sequence[str] = COST_KINDS) -> SearchStrategy[Tensor]:
    """Costs (P, N, T) of every kind, rectangular both ways."""
    return st.builds(make_costs, problems=SIZES, rows=SIZES, columns=SIZES, kind=st.sampled_from(kinds), seed=SEEDS)


def planted_costs() -> SearchStrategy[tuple[Tensor, Tensor]]:
    """Costs (N, T) with large duals, and their only optimal assignment (N,)."""
    return st.builds(make_planted_costs, rows=st.integers(1, 12), columns=st.integers(1, 12), seed=SEEDS)


def feature_pyramids() -> SearchStrategy[FeaturePyramid]:
    """Feature pyramids, with and without padding."""
    return st.builds(
        make_feature_pyramid,
        images=SIZES,
        channels=SIZES,
        height=SIZES,
        width=SIZES,
        levels=st.integers(1, 3),
        padded=st.booleans(),
        seed=SEEDS,
    )
