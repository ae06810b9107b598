"""What the laws check: small functions of a loss and its arguments, which raise."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch
from torch import Tensor
from torch.testing import assert_close

from detr_kd_losses.testing.arguments import Arguments, Terms
from detr_kd_losses.testing.law import Check, Function
from detr_kd_losses.testing.replicas import run_replicas

__all__: list[str] = []

# Relative and absolute; a loss that answers in float32 is held to what float32 can.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
WEIGHTS = {"weight_class": "loss_class", "weight_bbox": "loss_bbox", "weight_giou": "loss_giou"}
# What may be written where nothing counts.
_FILLS = (1e30, float("nan"))


def _require_equal(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    for name, value in expected.items():
        tolerance = _TOLERANCE.get(actual[name].dtype, 0.0)
        describe = partial("{}: {}".format, name)
        assert_close(actual[name], value, rtol=tolerance, atol=tolerance, msg=describe)


def _require_zero(terms: Terms) -> None:
    _require_equal(terms, {name: torch.zeros_like(term) for name, term in terms.items()})


def _require(terms: Terms, what: str, holds: Callable[[Tensor], Tensor]) -> None:
    for name, value in terms.items():
        if not bool(holds(value).all()):
            msg = f"{name} must be {what}, got {value}"
            raise AssertionError(msg)


def _sum(all_terms: Iterable[Terms], factors: Iterable[float] | None = None) -> Terms:
    """Sum of terms, name by name, each times its factor."""
    all_terms = list(all_terms)
    factors = [1.0] * len(all_terms) if factors is None else list(factors)
    return {
        name: torch.stack([factor * terms[name] for factor, terms in zip(factors, all_terms, strict=True)]).sum(0)
        for name in all_terms[0]
    }


def zero_at_teacher(loss: Function, arguments: Arguments) -> None:
    if "student_features" in arguments.tensors:
        twin = arguments.replaced(student_features=arguments["teacher_features"])
    else:
        partner = arguments["assignment"].clamp(min=0).unsqueeze(-1)
        copies = {
            f"student_{kind}": teacher.gather(-2, partner.expand(*partner.shape[:-1], teacher.shape[-1]))
            for kind, teacher in (("logits", arguments["teacher_logits"]), ("boxes", arguments["teacher_boxes"]))
        }
        twin = arguments.replaced(**copies)
    terms, gradients = twin.terms_and_gradients(loss)
    _require_zero(terms)
    _require_zero(gradients)


def non_negative(loss: Function, arguments: Arguments) -> None:
    _require(arguments.terms(loss), "at least 0", lambda term: term >= -_TOLERANCE.get(term.dtype, 0.0))


def finite(loss: Function, arguments: Arguments) -> None:
    terms, gradients = arguments.cast(torch.float32).terms_and_gradients(loss)
    _require(terms | gradients, "finite", torch.isfinite)


def permutation(axis: str) -> Check:
    def check(loss: Function, arguments: Arguments) -> None:
        _require_equal(arguments.permuted(axis).terms(loss), arguments.terms(loss))

    return check


def padding(axis: str) -> Check:
    def check(loss: Function, arguments: Arguments) -> None:
        terms, gradients = arguments.terms_and_gradients(loss)
        for fill in _FILLS:
            padded = arguments.padded(axis, fill)
            padded_terms, padded_gradients = padded.terms_and_gradients(loss)
            _require_equal(padded_terms, terms)
            # Padding has no gradient of its own, and leaves those of the others.
            _require_equal(padded_gradients, Arguments(padded.signature, gradients).padded(axis, 0.0).tensors)

    return check


def cell_padding(loss: Function, arguments: Arguments) -> None:
    everywhere = torch.ones_like(arguments["student_features"][:, 0], dtype=torch.bool)
    padding("W")(loss, arguments.replaced(padding_mask=arguments.tensors.get("padding_mask", everywhere)))


def images_join(loss: Function, arguments: Arguments) -> None:
    _require_equal(arguments.joined().terms(loss), arguments.terms(loss))


def images_average(loss: Function, arguments: Arguments) -> None:
    cells = (
        arguments.tensors.get("padding_mask", torch.ones_like(arguments["student_features"][:, 0])).sum((1, 2)).double()
    )
    images = [arguments.taken("B", [image]) for image in range(len(cells))]
    shares = (cells / cells.sum()).tolist()
    _require_equal(arguments.terms(loss), _sum((image.terms(loss) for image in images), shares))


def stages_add(loss: Function, arguments: Arguments) -> None:
    stages = [arguments.entry("L", stage) for stage in range(arguments.size("L"))]
    _require_equal(arguments.terms(loss), _sum(stage.terms(loss) for stage in stages))


def levels_add(loss: Function, arguments: Arguments) -> None:
    spatial = arguments.having("W")
    levels = [arguments, arguments.taken("W", range(0, arguments.size("W"), 2))]
    pyramid = arguments.replaced(**{name: [level[name] for level in levels] for name in spatial})
    _require_equal(pyramid.terms(loss), _sum(level.terms(loss) for level in levels))


def replicas(loss: Function, arguments: Arguments) -> None:
    # Every image twice: with fewer pairs than replicas a mean of at least 1, DETR's, and a total of at least 1 differ.
    images = list(range(arguments.size("B")))
    batch = arguments.taken("B", images + images)
    shards = [arguments.taken("B", images[:1]), arguments.taken("B", images[1:] + images)]
    answers = run_replicas([partial(shard.terms, loss) for shard in shards])
    _require_equal(_sum(answers, [1 / len(shards)] * len(shards)), batch.terms(loss))


def weights_linear(loss: Function, arguments: Arguments) -> None:
    ones = dict.fromkeys(WEIGHTS, 1.0)
    terms = arguments.terms(loss, **ones)
    for weight, name in WEIGHTS.items():
        _require_equal(arguments.terms(loss, **{**ones, weight: 3.0}), {**terms, name: 3 * terms[name]})


def gradients(loss: Function, arguments: Arguments) -> None:
    names = arguments.signature.student

    def total(*leaves: Tensor) -> Tensor:
        terms = arguments.replaced(**dict(zip(names, leaves, strict=True))).terms(loss)
        return torch.stack(list(terms.values())).sum()

    torch.autograd.gradcheck(total, [arguments[name].clone().requires_grad_() for name in names], fast_mode=True)


def teacher_detached(loss: Function, arguments: Arguments) -> None:
    leaves = {
        name: tensor.clone().requires_grad_()
        for name, tensor in arguments.tensors.items()
        if tensor.is_floating_point()
    }
    terms = arguments.replaced(**leaves).terms(loss)
    gradients = torch.autograd.grad(
        torch.stack(list(terms.values())).sum(), list(leaves.values()), allow_unused=True, materialize_grads=True
    )
    by_name = dict(zip(leaves, gradients, strict=True))
    _require(
        {name: by_name[name] for name in by_name if name not in arguments.signature.student}, "0", torch.logical_not
    )


def half_precision(loss: Function, arguments: Arguments) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        rounded = arguments.cast(dtype)
        _require_equal(rounded.terms(loss), rounded.cast(torch.float32).terms(loss))


def negatives_by_box(loss: Function, arguments: Arguments) -> None:
    logits = arguments["teacher_logits"]
    positive = arguments.tensors.get("teacher_positive", torch.zeros_like(logits[..., 0], dtype=torch.bool))
    split = arguments.replaced(teacher_positive=positive)
    other = split.replaced(teacher_logits=torch.where(positive.unsqueeze(-1), logits, 1 - logits))
    _require_equal(other.terms(loss), split.terms(loss))


def zero_without(*names: str, drop: str = "") -> Check:
    """Without pairs (and, with `drop`, without any entry along that axis) the named terms are 0, with a graph."""

    def check(loss: Function, arguments: Arguments) -> None:
        empty = arguments.replaced(assignment=torch.full_like(arguments["assignment"], -1))
        for case in (empty, empty.taken(drop, [])):
            terms, gradients = case.terms_and_gradients(loss)
            _require_zero({name: terms[name] for name in names})
            _require(terms | gradients, "finite", torch.isfinite)

    return check


def zero_without_cells(loss: Function, arguments: Arguments) -> None:
    nowhere = torch.zeros_like(arguments["student_features"][:, 0], dtype=torch.bool)
    terms, gradients = arguments.replaced(padding_mask=nowhere).terms_and_gradients(loss)
    _require_zero(terms)
    _require_zero(gradients)


def zero_vectors(loss: Function, arguments: Arguments) -> None:
    blank = {"teacher_features": torch.zeros_like(arguments["teacher_features"])}
    blank["teacher_queries"] = torch.zeros_like(arguments["teacher_queries"])
    finite(loss, arguments.replaced(**blank))
