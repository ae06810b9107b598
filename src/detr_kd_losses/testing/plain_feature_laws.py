"""The laws of plain distances of features, with the arguments that they are tried on.

>>> import detr_kd_losses as dkl
>>> PLAIN_FEATURE_LAWS["channel_permutation"](dkl.feature_distillation_loss, max_examples=5)
"""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from detr_kd_losses.testing import loss_laws as laws
from detr_kd_losses.testing.arguments import Arguments, remember_call
from detr_kd_losses.testing.law import Function, law, laws_by_name
from detr_kd_losses.testing.makers import make_feature_arguments
from detr_kd_losses.testing.requirements import require_each, require_equal
from detr_kd_losses.testing.signatures import PLAIN_FEATURES
from detr_kd_losses.testing.strategies import SEEDS, SIZES, generator

__all__ = ["PLAIN_FEATURE_LAWS", "make_plain_feature_arguments", "plain_feature_arguments"]


@remember_call
def make_plain_feature_arguments(
    *, images: int, channels: int, height: int, width: int, padded: bool, weighted: bool, seed: int = 0
) -> Arguments:
    """Arguments of a plain distance of features, on one level; of the weights some are 0."""
    sizes = {"images": images, "channels": channels, "height": height, "width": width}
    seen = make_feature_arguments(stages=1, queries=1, padded=padded, seed=seed, **sizes)
    tensors = dict(seen.without("teacher_queries", "quality").tensors)
    if weighted:
        weight = torch.rand((images, height, width), generator=generator(seed + 3), dtype=torch.float64)
        tensors["weight"] = (2 * weight - 0.4).clamp(min=0)
    return Arguments(PLAIN_FEATURES, tensors)


def plain_feature_arguments() -> SearchStrategy[Arguments]:
    """Arguments of a plain distance of features."""
    return st.builds(
        make_plain_feature_arguments,
        images=SIZES,
        channels=SIZES,
        height=SIZES,
        width=SIZES,
        padded=st.booleans(),
        weighted=st.booleans(),
        seed=SEEDS,
    )


@law("channel_permutation", "the order of the channels does not matter")
def channel_permutation(loss: Function, arguments: Arguments) -> None:
    require_equal(arguments.permuted("D").terms(loss), arguments.terms(loss))


@law("cell_permutation", "the order of the cells does not matter")
def cell_permutation(loss: Function, arguments: Arguments) -> None:
    moved = arguments.permuted("H").permuted("W")
    require_equal(moved.terms(loss), arguments.terms(loss))


@law("flat_features", "features without length or variance give a finite loss and gradient")
def flat_features(loss: Function, arguments: Arguments) -> None:
    for value in (0.0, 0.3):
        for names in (["student_features"], ["teacher_features"], ["student_features", "teacher_features"]):
            flat = {name: torch.full_like(arguments[name], value) for name in names}
            terms, gradients = arguments.replaced(**flat).terms_and_gradients(loss)
            require_each(terms | gradients, "finite", torch.isfinite)


@law("equal_weights", "weights of 1 are as none", needs=["weight"])
def equal_weights(loss: Function, arguments: Arguments) -> None:
    ones = torch.ones_like(arguments["student_features"][:, 0])
    require_equal(arguments.replaced(weight=ones).terms(loss), arguments.without("weight").terms(loss))


PLAIN_FEATURE_LAWS = laws_by_name(
    PLAIN_FEATURES,
    plain_feature_arguments(),
    laws.no_cells,
    laws.zero_at_teacher,
    laws.non_negative,
    flat_features,
    laws.image_permutation,
    channel_permutation,
    cell_permutation,
    laws.cell_padding,
    equal_weights,
    laws.levels_add,
    laws.replicas,
    laws.teacher_detached,
    laws.half_precision,
    laws.gradients,
)
