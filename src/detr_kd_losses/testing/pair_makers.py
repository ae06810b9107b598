"""Arguments of the losses of what matched queries say beside classes and boxes, and strategies that draw them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from detr_kd_losses.testing.arguments import Arguments, remember_call
from detr_kd_losses.testing.signatures import BOX_DISTRIBUTIONS, MASKS
from detr_kd_losses.testing.strategies import (
    BOX_KINDS,
    LOGIT_KINDS,
    SEEDS,
    SIZES,
    generator,
    make_assignment,
    make_boxes,
    make_logits,
)

__all__ = [
    "BINS",
    "SCALE",
    "box_distribution_arguments",
    "make_box_distribution_arguments",
    "make_mask_arguments",
    "mask_arguments",
]

BINS = (-4.0, -1.0, 0.0, 1.5, 4.0)
"""The bins of both models in the laws of box distributions."""
SCALE = 4.0
"""The scale of both models in the laws of box distributions."""


@remember_call
def make_box_distribution_arguments(
    *,
    stages: int,
    images: int,
    students: int,
    teachers: int,
    weighted: bool,
    box_kind: str = "generic",
    logit_kind: str = "generic",
    seed: int = 0,
) -> Arguments:
    """Arguments of a loss of box distributions in the bins BINS; of the weights some are 0."""
    tensors = {}
    for name, queries, numbers in (("student", students, seed), ("teacher", teachers, seed + 2)):
        shape = (stages, images, queries)
        tensors[f"{name}_distributions"] = make_logits((*shape, 4 * len(BINS)), kind=logit_kind, seed=numbers)
        tensors[f"{name}_references"] = make_boxes(shape, kind=box_kind, seed=numbers + 1)
    return Arguments(BOX_DISTRIBUTIONS, tensors | _pairs((stages, images), students, teachers, weighted, seed))


@remember_call
def make_mask_arguments(
    *,
    stages: int,
    images: int,
    students: int,
    teachers: int,
    height: int,
    width: int,
    boxed: bool,
    weighted: bool,
    box_kind: str = "generic",
    logit_kind: str = "generic",
    seed: int = 0,
) -> Arguments:
    """Arguments of a loss of masks of one size, in boxes or not; of the weights some are 0."""
    tensors = {
        f"{name}_masks": make_logits((stages, images, queries, height, width), kind=logit_kind, seed=numbers)
        for name, queries, numbers in (("student", students, seed), ("teacher", teachers, seed + 2))
    }
    tensors |= _pairs((stages, images), students, teachers, weighted, seed)
    if boxed:
        tensors["boxes"] = make_boxes((stages, images, teachers), kind=box_kind, seed=seed + 3)
    return Arguments(MASKS, tensors)


def mask_arguments(*, logit_kinds: Sequence[str] = LOGIT_KINDS) -> SearchStrategy[Arguments]:
    """Arguments of a loss of masks."""
    return st.builds(
        make_mask_arguments,
        stages=SIZES,
        images=SIZES,
        students=SIZES,
        teachers=SIZES,
        height=SIZES,
        width=SIZES,
        boxed=st.booleans(),
        weighted=st.booleans(),
        box_kind=st.sampled_from(BOX_KINDS),
        logit_kind=st.sampled_from(logit_kinds),
        seed=SEEDS,
    )


def _pairs(shape: Sequence[int], students: int, teachers: int, weighted: bool, seed: int) -> dict[str, Tensor]:
    """Pairs of student and teacher queries, and perhaps weights of these, some of which are 0."""
    everyone = torch.ones(teachers, dtype=torch.bool)
    tensors = {"assignment": make_assignment(shape, students, everyone, seed=seed)}
    if weighted:
        weight = torch.rand((*shape, teachers), generator=generator(seed + 1), dtype=torch.float64)
        tensors["teacher_weight"] = (2 * weight - 0.4).clamp(min=0)
    return tensors


def box_distribution_arguments(
    *, box_kinds: Sequence[str] = BOX_KINDS, logit_kinds: Sequence[str] = LOGIT_KINDS
) -> SearchStrategy[Arguments]:
    """Arguments of a loss of box distributions."""
    return st.builds(
        make_box_distribution_arguments,
        stages=SIZES,
        images=SIZES,
        students=SIZES,
        teachers=SIZES,
        weighted=st.booleans(),
        box_kind=st.sampled_from(box_kinds),
        logit_kind=st.sampled_from(logit_kinds),
        seed=SEEDS,
    )
