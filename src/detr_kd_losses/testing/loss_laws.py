"""The laws of distillation, detection and feature losses, for any callable with the signature of ours.

    >>> import detr_kd_losses as dkl
    >>> HUNGARIAN_DISTILLATION_LAWS["non_negative"](dkl.hungarian_distillation_loss, max_examples=5)
    >>> print(HUNGARIAN_DISTILLATION_LAWS["stages_add"].sentence)
    the loss is the sum over decoder layers, each normalised on its own

`functools.partial` sets options. Arguments that break a law are shrunk, and the error begins with
``law broken: <name>: <sentence>``.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from detr_kd_losses.testing.arguments import Arguments
from detr_kd_losses.testing.law import Function, Law, law, laws_by_name
from detr_kd_losses.testing.makers import (
    criterion_arguments,
    detection_arguments,
    distillation_arguments,
    feature_arguments,
)
from detr_kd_losses.testing.replicas import run_replicas
from detr_kd_losses.testing.requirements import (
    TOLERANCE,
    Terms,
    add_terms,
    require_each,
    require_equal,
    require_zero,
)
from detr_kd_losses.testing.signatures import CRITERION, DETECTION, DISTILLATION, FEATURES
from detr_kd_losses.testing.strategies import BOX_KINDS, LOGIT_KINDS

__all__ = ["CRITERION_LAWS", "DETECTION_LAWS", "FEATURE_LAWS", "HUNGARIAN_DISTILLATION_LAWS"]

_WEIGHTS = {"weight_class": "loss_class", "weight_bbox": "loss_bbox", "weight_giou": "loss_giou"}
# What may be written where nothing counts.
_FILLS = (1e30, float("nan"))
WITH_AREA = ("generic", "touching", "identical", "full")
GENERIC: dict[str, Any] = {"box_kinds": ("generic",), "logit_kinds": ("generic",)}


@law("zero_at_teacher", "where the student equals the teacher, loss and gradient are 0")
def zero_at_teacher(loss: Function, arguments: Arguments) -> None:
    terms, gradients = arguments.at_teacher().terms_and_gradients(loss)
    require_zero(terms)
    require_zero(gradients)


@law("non_negative", "no term is below 0")
def non_negative(loss: Function, arguments: Arguments) -> None:
    require_each(arguments.terms(loss), "at least 0", lambda term: term >= -TOLERANCE.get(term.dtype, 0.0))


@law("finite", "boxes without area and saturated logits give finite terms and gradients")
def finite(loss: Function, arguments: Arguments) -> None:
    terms, gradients = arguments.cast(torch.float32).terms_and_gradients(loss)
    require_each(terms | gradients, "finite", torch.isfinite)


@law("zero_vectors", "features and queries of length 0 give a finite loss and gradient")
def zero_vectors(loss: Function, arguments: Arguments) -> None:
    blank = {name: torch.zeros_like(arguments[name]) for name in ("teacher_features", "teacher_queries")}
    finite.check(loss, arguments.replaced(**blank))


def _permutation(name: str, sentence: str, axis: str) -> Law:
    @law(name, sentence)
    def permutation(loss: Function, arguments: Arguments) -> None:
        # The plain call last: an error shows the calls in the order in which they were made.
        require_equal(arguments.permuted(axis).terms(loss), arguments.terms(loss))

    return permutation


image_permutation = _permutation("image_permutation", "the order of the images does not matter", "B")
student_permutation = _permutation("student_permutation", "the order of the student queries does not matter", "N")
teacher_permutation = _permutation("teacher_permutation", "the order of the teacher queries does not matter", "M")
target_permutation = _permutation("target_permutation", "the order of the targets does not matter", "T")


def _padding(name: str, sentence: str, axis: str) -> Law:
    @law(name, sentence)
    def padding(loss: Function, arguments: Arguments) -> None:
        terms, gradients = arguments.terms_and_gradients(loss)
        for fill in _FILLS:
            padded = arguments.padded(axis, fill)
            padded_terms, padded_gradients = padded.terms_and_gradients(loss)
            require_equal(padded_terms, terms)
            # Padding has no gradient of its own, and leaves those of the others.
            require_equal(padded_gradients, Arguments(padded.signature, gradients).padded(axis, 0.0).tensors)

    return padding


unmatched_students = _padding(
    "unmatched_students", "a student query without partner changes nothing, whatever it holds", "N"
)
unmatched_teachers = _padding(
    "unmatched_teachers", "a teacher query without partner changes nothing, whatever it holds", "M"
)
target_padding = _padding("target_padding", "padding targets changes nothing, whatever they hold", "T")
_columns = _padding("columns", "padding columns of cells changes nothing", "W")


@law("cell_padding", "padding cells changes nothing, whatever they hold", needs=["padding_mask"])
def cell_padding(loss: Function, arguments: Arguments) -> None:
    everywhere = torch.ones_like(arguments["student_features"][:, 0], dtype=torch.bool)
    _columns.check(loss, arguments.replaced(padding_mask=arguments.tensors.get("padding_mask", everywhere)))


@law("images_join", "a batch equals one image with the queries and targets of all")
def images_join(loss: Function, arguments: Arguments) -> None:
    require_equal(arguments.joined().terms(loss), arguments.terms(loss))


@law("images_average", "a batch is the average of its images by their number of valid cells")
def images_average(loss: Function, arguments: Arguments) -> None:
    everywhere = torch.ones_like(arguments["student_features"][:, 0])
    cells = arguments.tensors.get("padding_mask", everywhere).sum((1, 2)).double()
    images = [arguments.taken("B", [image]) for image in range(len(cells))]
    shares = (cells / cells.sum()).tolist()
    require_equal(arguments.terms(loss), add_terms((image.terms(loss) for image in images), shares))


@law("stages_add", "the loss is the sum over decoder layers, each normalised on its own")
def stages_add(loss: Function, arguments: Arguments) -> None:
    stages = [arguments.entry("L", stage) for stage in range(arguments.size("L"))]
    require_equal(arguments.terms(loss), add_terms(stage.terms(loss) for stage in stages))


@law("levels_add", "the loss is the sum over levels")
def levels_add(loss: Function, arguments: Arguments) -> None:
    levels = [arguments, arguments.taken("W", range(0, arguments.size("W"), 2))]
    pyramid = arguments.replaced(**{name: [level[name] for level in levels] for name in arguments.having("W")})
    require_equal(pyramid.terms(loss), add_terms(level.terms(loss) for level in levels))


@law("replicas", "the mean over replicas is the loss of the whole batch")
def replicas(loss: Function, arguments: Arguments) -> None:
    # Every image twice: with fewer pairs than replicas a mean of at least 1, DETR's, and a total of at least 1 differ.
    images = list(range(arguments.size("B")))
    batch = arguments.taken("B", images + images)
    shards = [arguments.taken("B", images[:1]), arguments.taken("B", images[1:] + images)]
    answers = run_replicas([partial(shard.terms, loss) for shard in shards])
    require_equal(add_terms(answers, [1 / len(shards)] * len(shards)), batch.terms(loss))


@law("weights_linear", "each weight scales its own term and no other", needs=_WEIGHTS, terms=_WEIGHTS.values())
def weights_linear(loss: Function, arguments: Arguments) -> None:
    ones = dict.fromkeys(_WEIGHTS, 1.0)
    terms = arguments.terms(loss, **ones)
    for weight, name in _WEIGHTS.items():
        require_equal(arguments.terms(loss, **{**ones, weight: 3.0}), {**terms, name: 3 * terms[name]})


@law("negatives_by_box", "a negative teacher query teaches its box and not its class", needs=["teacher_positive"])
def negatives_by_box(loss: Function, arguments: Arguments) -> None:
    logits = arguments["teacher_logits"]
    positive = arguments.tensors.get("teacher_positive", torch.zeros_like(logits[..., 0], dtype=torch.bool))
    split = arguments.replaced(teacher_positive=positive)
    other = split.replaced(teacher_logits=torch.where(positive.unsqueeze(-1), logits, 1 - logits))
    require_equal(other.terms(loss), split.terms(loss))


@law("no_pairs", "without pairs the loss is 0, with a graph")
def no_pairs(loss: Function, arguments: Arguments) -> None:
    for terms in _terms_without_pairs(loss, arguments, "M"):
        require_zero(terms)


@law("no_targets", "without targets the box terms are 0, with a graph", terms=["loss_bbox", "loss_giou"])
def no_targets(loss: Function, arguments: Arguments) -> None:
    for terms in _terms_without_pairs(loss, arguments, "T"):
        require_zero({name: terms[name] for name in ("loss_bbox", "loss_giou")})


def _terms_without_pairs(loss: Function, arguments: Arguments, partners: str) -> list[Terms]:
    """The terms where nothing is matched, and where there are no partners at all; finite, as are their gradients."""
    empty = arguments.unpaired()
    answers = [case.terms_and_gradients(loss) for case in (empty, empty.taken(partners, []))]
    for terms, gradients in answers:
        require_each(terms | gradients, "finite", torch.isfinite)
    return [terms for terms, _ in answers]


@law("no_cells", "without a valid cell the loss is 0, with a graph", needs=["padding_mask"])
def no_cells(loss: Function, arguments: Arguments) -> None:
    nowhere = torch.zeros_like(arguments["student_features"][:, 0], dtype=torch.bool)
    terms, gradients = arguments.replaced(padding_mask=nowhere).terms_and_gradients(loss)
    require_zero(terms)
    require_zero(gradients)


@law("teacher_detached", "no gradient reaches the teacher")
def teacher_detached(loss: Function, arguments: Arguments) -> None:
    floating = {name: tensor for name, tensor in arguments.tensors.items() if tensor.is_floating_point()}
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in floating.items()}
    total = torch.stack(list(arguments.in_graph(leaves).terms(loss).values())).sum()
    gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
    by_name = dict(zip(leaves, gradients, strict=True))
    others = {name: by_name[name] for name in by_name if name not in arguments.signature.student}
    require_each({f"the gradient of {name}": gradient for name, gradient in others.items()}, "0", torch.logical_not)


@law("half_precision", "half-precision inputs give the float32 loss of the same numbers")
def half_precision(loss: Function, arguments: Arguments) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        rounded = arguments.cast(dtype)
        require_equal(rounded.terms(loss), rounded.cast(torch.float32).terms(loss))


@law("gradients", "gradients are those of the value, in float64")
def gradients(loss: Function, arguments: Arguments) -> None:
    names = arguments.signature.student

    def total(*leaves: Tensor) -> Tensor:
        terms = arguments.in_graph(dict(zip(names, leaves, strict=True))).terms(loss)
        return torch.stack(list(terms.values())).sum()

    torch.autograd.gradcheck(total, [arguments[name].clone().requires_grad_() for name in names], fast_mode=True)


zero_at_empty_boxes = zero_at_teacher.called(
    "zero_at_empty_boxes", "where the student equals the teacher, boxes without area have loss and gradient 0, too"
)
query_permutation = student_permutation.called("query_permutation", "the order of the queries does not matter")
_replicas_with_targets = "the mean over replicas is the loss of the whole batch, if no replica is without a target"

HUNGARIAN_DISTILLATION_LAWS = laws_by_name(
    DISTILLATION,
    distillation_arguments(),
    # The first: without pairs a mean is NaN, and would break other laws for a reason that is not theirs.
    no_pairs,
    zero_at_teacher.on(distillation_arguments(box_kinds=WITH_AREA)),
    zero_at_empty_boxes.on(distillation_arguments(box_kinds=("degenerate",))),
    non_negative,
    finite,
    student_permutation,
    teacher_permutation,
    unmatched_students,
    unmatched_teachers,
    images_join,
    stages_add,
    replicas,
    weights_linear,
    negatives_by_box,
    teacher_detached,
    half_precision,
    gradients.on(distillation_arguments(**GENERIC)),
)

DETECTION_LAWS = laws_by_name(
    DETECTION,
    detection_arguments(),
    non_negative,
    finite,
    query_permutation,
    target_permutation,
    target_padding,
    images_join,
    stages_add,
    replicas.on(detection_arguments(at_least=1), sentence=_replicas_with_targets),
    weights_linear,
    no_targets,
    teacher_detached.called("targets_detached", "no gradient reaches the targets"),
    half_precision,
    gradients.on(detection_arguments(**GENERIC)),
)

FEATURE_LAWS = laws_by_name(
    FEATURES,
    feature_arguments(),
    zero_at_teacher,
    non_negative,
    zero_vectors,
    teacher_permutation.called("query_permutation", "the order of the queries does not matter"),
    cell_padding,
    images_average,
    stages_add,
    levels_add,
    replicas,
    no_cells,
    teacher_detached,
    half_precision,
    gradients,
)

CRITERION_LAWS = laws_by_name(
    CRITERION,
    criterion_arguments(),
    non_negative,
    finite.on(criterion_arguments(box_kinds=BOX_KINDS, logit_kinds=LOGIT_KINDS)),
    image_permutation,
    student_permutation,
    teacher_permutation,
    target_permutation,
    target_padding,
    cell_padding,
    replicas.called("replicas", _replicas_with_targets),
    teacher_detached.called("teacher_detached", "no gradient reaches teacher or targets"),
    half_precision,
)
