"""Arguments of the losses of weighted and of shared queries, and strategies that draw them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from detr_kd_losses.testing.arguments import Arguments, remember_call
from detr_kd_losses.testing.makers import make_distillation_arguments
from detr_kd_losses.testing.signatures import SHARED_QUERIES, WEIGHTED_DISTILLATION
from detr_kd_losses.testing.strategies import BOX_KINDS, LOGIT_KINDS, SEEDS, SIZES, generator, make_predictions

__all__ = ["make_shared_arguments", "make_weighted_arguments", "shared_arguments", "weighted_arguments"]


@remember_call
def make_weighted_arguments(*, weighted: bool, seed: int = 0, **options: Any) -> Arguments:
    """Arguments of a distillation loss with weights of the teacher queries, some of which are 0.

    Args:
        weighted: Whether there are weights.
        seed: Of the numbers.
        **options: Sizes and kinds, see :func:`~detr_kd_losses.testing.makers.make_distillation_arguments`.
    """
    plain = make_distillation_arguments(seed=seed, **options)
    weight = torch.rand(plain["teacher_boxes"].shape[:-1], generator=generator(seed + 1), dtype=torch.float64)
    weights = {"teacher_weight": (2 * weight - 0.4).clamp(min=0)} if weighted else {}
    return Arguments(WEIGHTED_DISTILLATION, {**plain.tensors, **weights})


@remember_call
def make_shared_arguments(*, seed: int = 0, **options: Any) -> Arguments:
    """Arguments of a loss of queries that ran through both decoders.

    Args:
        seed: Of the numbers.
        **options: Sizes and kinds, see :func:`~detr_kd_losses.testing.strategies.make_predictions`.
    """
    predictions = (*make_predictions(seed=seed, **options), *make_predictions(seed=seed + 2, **options))
    return Arguments(SHARED_QUERIES, dict(zip(SHARED_QUERIES.axes, predictions, strict=True)))


def weighted_arguments(
    *, box_kinds: Sequence[str] = BOX_KINDS, logit_kinds: Sequence[str] = LOGIT_KINDS
) -> SearchStrategy[Arguments]:
    """Arguments of a distillation loss, with and without weights of the teacher queries."""
    sizes = {"students": SIZES, "teachers": SIZES, "split": st.booleans(), "weighted": st.booleans()}
    return _predicted(box_kinds, logit_kinds)(make_weighted_arguments, **sizes)


def shared_arguments(
    *, box_kinds: Sequence[str] = BOX_KINDS, logit_kinds: Sequence[str] = LOGIT_KINDS
) -> SearchStrategy[Arguments]:
    """Arguments of a loss of queries that ran through both decoders."""
    return _predicted(box_kinds, logit_kinds)(make_shared_arguments, queries=SIZES)


def _predicted(box_kinds: Sequence[str], logit_kinds: Sequence[str]) -> partial[SearchStrategy[Arguments]]:
    """What builds arguments of predictions."""
    return partial(
        st.builds,
        stages=SIZES,
        images=SIZES,
        classes=st.integers(2, 4),
        box_kind=st.sampled_from(box_kinds),
        logit_kind=st.sampled_from(logit_kinds),
        seed=SEEDS,
    )
