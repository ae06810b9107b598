"""The laws of distillation, detection and feature losses, for any callable with the signature of ours.

    >>> import detr_kd_losses as dkl
    >>> check_hungarian_distillation_loss(dkl.hungarian_distillation_loss, max_examples=5)
    >>> HUNGARIAN_DISTILLATION_LAWS["non_negative"](dkl.hungarian_distillation_loss, max_examples=5)

`functools.partial` sets options. Arguments that break a law are shrunk, and the error begins with
``law broken: <name>: <sentence>``.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor

from detr_kd_losses.testing.arguments import Arguments, Terms
from detr_kd_losses.testing.cases import (
    criterion_arguments,
    detection_arguments,
    distillation_arguments,
    feature_arguments,
    group_outputs,
)
from detr_kd_losses.testing.checks import (
    WEIGHTS,
    cell_padding,
    finite,
    gradients,
    half_precision,
    images_average,
    images_join,
    levels_add,
    negatives_by_box,
    non_negative,
    padding,
    permutation,
    replicas,
    stages_add,
    teacher_detached,
    weights_linear,
    zero_at_teacher,
    zero_vectors,
    zero_without,
    zero_without_cells,
)
from detr_kd_losses.testing.law import Check, Function, check_laws, laws_by_name
from detr_kd_losses.testing.strategies import BOX_KINDS, LOGIT_KINDS

__all__ = [
    "CRITERION_LAWS",
    "DETECTION_LAWS",
    "FEATURE_LAWS",
    "HUNGARIAN_DISTILLATION_LAWS",
    "check_detection_loss",
    "check_distillation_criterion",
    "check_hungarian_distillation_loss",
    "check_target_aware_feature_loss",
]


def on_outputs(check: Check) -> Check:
    """The check of a criterion, which takes (:class:`DetectorOutput`, :class:`DetectorOutput`, :class:`Targets`)."""

    def check_criterion(criterion: Function, arguments: Arguments) -> None:
        def loss(**tensors: Tensor) -> Terms:
            terms: Terms = criterion(*group_outputs(tensors))
            return terms

        check(loss, arguments)

    return check_criterion


_WITH_AREA = ("generic", "touching", "identical", "full")
_GENERIC: dict[str, Any] = {"box_kinds": ("generic",), "logit_kinds": ("generic",)}

HUNGARIAN_DISTILLATION_LAWS = laws_by_name(
    distillation_arguments(),
    (
        "zero_at_teacher",
        "where the student equals the teacher, loss and gradient are 0",
        zero_at_teacher,
        distillation_arguments(box_kinds=_WITH_AREA),
    ),
    (
        "zero_at_empty_boxes",
        "where the student equals the teacher, boxes without area have loss and gradient 0, too",
        zero_at_teacher,
        distillation_arguments(box_kinds=("degenerate",)),
    ),
    ("non_negative", "no term is below 0", non_negative),
    ("finite", "boxes without area and saturated logits give finite terms and gradients", finite),
    ("student_permutation", "the order of the student queries does not matter", permutation("N")),
    ("teacher_permutation", "the order of the teacher queries does not matter", permutation("M")),
    ("unmatched_students", "a student query without partner changes nothing, whatever it holds", padding("N")),
    ("unmatched_teachers", "a teacher query without partner changes nothing, whatever it holds", padding("M")),
    ("images_join", "a batch equals one image with the queries of all", images_join),
    ("stages_add", "the loss is the sum over decoder layers, each normalised on its own", stages_add),
    ("replicas", "the mean over replicas is the loss of the whole batch", replicas),
    ("weights_linear", "each weight scales its own term and no other", weights_linear),
    ("negatives_by_box", "a negative teacher query teaches its box and not its class", negatives_by_box),
    ("no_pairs", "without pairs the loss is 0, with a graph", zero_without(*WEIGHTS.values(), drop="M")),
    ("teacher_detached", "no gradient reaches the teacher", teacher_detached),
    ("half_precision", "half-precision inputs give the float32 loss of the same numbers", half_precision),
    ("gradients", "gradients are those of the value, in float64", gradients, distillation_arguments(**_GENERIC)),
)

DETECTION_LAWS = laws_by_name(
    detection_arguments(),
    ("non_negative", "no term is below 0", non_negative),
    ("finite", "boxes without area and saturated logits give finite terms and gradients", finite),
    ("query_permutation", "the order of the queries does not matter", permutation("N")),
    ("target_permutation", "the order of the targets does not matter", permutation("T")),
    ("target_padding", "padding targets changes nothing, whatever they hold", padding("T")),
    ("images_join", "a batch equals one image with the queries and targets of all", images_join),
    ("stages_add", "the loss is the sum over decoder layers", stages_add),
    (
        "replicas",
        "the mean over replicas is the loss of the whole batch, if no replica is without a target",
        replicas,
        detection_arguments(at_least=1),
    ),
    ("weights_linear", "each weight scales its own term and no other", weights_linear),
    (
        "no_targets",
        "without targets the box terms are 0, with a graph",
        zero_without("loss_bbox", "loss_giou", drop="T"),
    ),
    ("targets_detached", "no gradient reaches the targets", teacher_detached),
    ("half_precision", "half-precision inputs give the float32 loss of the same numbers", half_precision),
    ("gradients", "gradients are those of the value, in float64", gradients, detection_arguments(**_GENERIC)),
)

FEATURE_LAWS = laws_by_name(
    feature_arguments(),
    ("zero_at_teacher", "where the student equals the teacher, loss and gradient are 0", zero_at_teacher),
    ("non_negative", "the loss is not below 0", non_negative),
    ("zero_vectors", "features and queries of length 0 give a finite loss and gradient", zero_vectors),
    ("query_permutation", "the order of the queries does not matter", permutation("M")),
    ("cell_padding", "padding cells changes nothing, whatever they hold", cell_padding),
    ("images_average", "a batch is the average of its images by their number of valid cells", images_average),
    ("stages_add", "the loss is the sum over decoder layers", stages_add),
    ("levels_add", "the loss is the sum over levels", levels_add),
    ("replicas", "the mean over replicas is the loss of the whole batch", replicas),
    ("no_cells", "without a valid cell the loss is 0, with a graph", zero_without_cells),
    ("teacher_detached", "no gradient reaches the teacher", teacher_detached),
    ("half_precision", "half-precision inputs give the float32 loss of the same numbers", half_precision),
    ("gradients", "gradients are those of the value, in float64", gradients),
)

CRITERION_LAWS = laws_by_name(
    criterion_arguments(),
    ("non_negative", "no term is below 0", on_outputs(non_negative)),
    (
        "finite",
        "boxes without area and saturated logits give finite terms and gradients",
        on_outputs(finite),
        criterion_arguments(box_kinds=BOX_KINDS, logit_kinds=LOGIT_KINDS),
    ),
    ("image_permutation", "the order of the images does not matter", on_outputs(permutation("B"))),
    ("student_permutation", "the order of the student queries does not matter", on_outputs(permutation("N"))),
    ("teacher_permutation", "the order of the teacher queries does not matter", on_outputs(permutation("M"))),
    ("target_permutation", "the order of the targets does not matter", on_outputs(permutation("T"))),
    ("target_padding", "padding targets changes nothing, whatever they hold", on_outputs(padding("T"))),
    ("cell_padding", "padding cells changes nothing, whatever they hold", on_outputs(cell_padding)),
    (
        "replicas",
        "the mean over replicas is the loss of the whole batch, if no replica is without a target",
        on_outputs(replicas),
    ),
    ("teacher_detached", "no gradient reaches teacher or targets", on_outputs(teacher_detached)),
    ("half_precision", "half-precision inputs give the float32 loss of the same numbers", on_outputs(half_precision)),
)


def check_hungarian_distillation_loss(
    loss: Function, *, skip: Collection[str] = (), max_examples: int | None = None
) -> None:
    """Check HUNGARIAN_DISTILLATION_LAWS by :func:`check_laws`."""
    check_laws(HUNGARIAN_DISTILLATION_LAWS, loss, skip=skip, max_examples=max_examples)


def check_detection_loss(loss: Function, *, skip: Collection[str] = (), max_examples: int | None = None) -> None:
    """Check DETECTION_LAWS by :func:`check_laws`."""
    check_laws(DETECTION_LAWS, loss, skip=skip, max_examples=max_examples)


def check_target_aware_feature_loss(
    loss: Function, *, skip: Collection[str] = (), max_examples: int | None = None
) -> None:
    """Check FEATURE_LAWS by :func:`check_laws`."""
    check_laws(FEATURE_LAWS, loss, skip=skip, max_examples=max_examples)


def check_distillation_criterion(
    criterion: Function, *, skip: Collection[str] = (), max_examples: int | None = None
) -> None:
    """Check CRITERION_LAWS by :func:`check_laws`: for what takes student, teacher and targets as ours does."""
    check_laws(CRITERION_LAWS, criterion, skip=skip, max_examples=max_examples)
