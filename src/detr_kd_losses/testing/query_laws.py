"""The laws of distillation losses beyond the paper's: of weighted and of shared queries.

>>> import detr_kd_losses as dkl
>>> WEIGHTED_DISTILLATION_LAWS["equal_weights"](dkl.hungarian_distillation_loss, max_examples=5)
"""

from __future__ import annotations

import torch

from detr_kd_losses.testing import loss_laws as laws
from detr_kd_losses.testing.arguments import Arguments
from detr_kd_losses.testing.law import Function, law, laws_by_name
from detr_kd_losses.testing.query_makers import shared_arguments, weighted_arguments
from detr_kd_losses.testing.requirements import require_equal, require_zero
from detr_kd_losses.testing.signatures import SHARED_QUERIES, WEIGHTED_DISTILLATION

__all__ = ["SHARED_QUERY_LAWS", "WEIGHTED_DISTILLATION_LAWS"]


def _teacher_shape(arguments: Arguments) -> list[int]:
    return [arguments.size(axis) for axis in "LBM"]


@law("equal_weights", "equal weights of the teacher queries are as none", needs=["teacher_weight"])
def equal_weights(loss: Function, arguments: Arguments) -> None:
    equal = arguments.replaced(teacher_weight=torch.full(_teacher_shape(arguments), 0.3, dtype=torch.float64))
    require_equal(equal.terms(loss), arguments.without("teacher_weight").terms(loss))


@law("weightless", "a teacher query of weight 0 is as unmatched, whatever it holds", needs=["teacher_weight"])
def weightless(loss: Function, arguments: Arguments) -> None:
    everyone = torch.ones(_teacher_shape(arguments), dtype=torch.float64)
    weight = arguments.tensors.get("teacher_weight", everyone).clone()
    weight[..., ::2] = 0
    assignment = arguments["assignment"]
    dropped = torch.where(assignment % 2 == 0, -1, assignment)
    blank = {
        name: arguments[name].masked_fill(
            (weight == 0).reshape(*weight.shape, *[1] * (arguments[name].ndim - 3)), torch.nan
        )
        for name in arguments.having("M")
        if arguments[name].ndim > 3
    }
    expected = arguments.replaced(teacher_weight=weight, assignment=dropped).terms_and_gradients(loss)
    for actual, wanted in zip(
        arguments.replaced(teacher_weight=weight, **blank).terms_and_gradients(loss), expected, strict=True
    ):
        require_equal(actual, wanted)


@law("no_queries", "without queries the loss is 0, with a graph")
def no_queries(loss: Function, arguments: Arguments) -> None:
    terms, gradients = arguments.taken("K", []).terms_and_gradients(loss)
    require_zero(terms)
    require_zero(gradients)


@law("query_permutation", "the order of the queries does not matter")
def query_permutation(loss: Function, arguments: Arguments) -> None:
    require_equal(arguments.permuted("K").terms(loss), arguments.terms(loss))


WEIGHTED_DISTILLATION_LAWS = laws_by_name(
    WEIGHTED_DISTILLATION,
    weighted_arguments(),
    laws.no_pairs,
    laws.zero_at_teacher.on(weighted_arguments(box_kinds=laws.WITH_AREA)),
    laws.zero_at_empty_boxes.on(weighted_arguments(box_kinds=("degenerate",))),
    laws.non_negative,
    laws.finite,
    laws.student_permutation,
    laws.teacher_permutation,
    laws.unmatched_students,
    laws.unmatched_teachers,
    laws.images_join,
    laws.stages_add,
    laws.replicas,
    laws.weights_linear,
    laws.negatives_by_box,
    equal_weights,
    weightless,
    laws.teacher_detached,
    laws.half_precision,
    laws.gradients.on(weighted_arguments(**laws.GENERIC)),
)

SHARED_QUERY_LAWS = laws_by_name(
    SHARED_QUERIES,
    shared_arguments(),
    no_queries,
    laws.zero_at_teacher.on(shared_arguments(box_kinds=laws.WITH_AREA)),
    laws.zero_at_empty_boxes.on(shared_arguments(box_kinds=("degenerate",))),
    laws.non_negative,
    laws.finite,
    query_permutation,
    laws.images_join,
    laws.stages_add,
    laws.replicas,
    laws.weights_linear,
    laws.teacher_detached,
    laws.half_precision,
    laws.gradients.on(shared_arguments(**laws.GENERIC)),
)
