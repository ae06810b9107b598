"""Losses that are taken part by part, and computed again in the backward pass: the same numbers, wherever they run."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.testing import assert_close

import detr_kd_losses as dkl
from detr_kd_losses import _blocks

from support import cases
from support.comparisons import to_tensors

LOSSES = {
    "box distributions": (dkl.box_distribution_loss, cases.box_distributions(), "student_distributions"),
    "masks": (dkl.mask_distillation_loss, cases.masks(), "student_masks"),
    "masks, no stages": (dkl.mask_distillation_loss, cases.masks(stages=None), "student_masks"),
    **{
        f"features, {distance}": (
            partial(dkl.feature_distillation_loss, distance=distance),
            cases.plain_features(weighted=distance != "channel"),
            "student_features",
        )
        for distance in ("mse", "cosine", "pearson", "channel")
    },
}


@pytest.fixture(params=LOSSES, name="given")
def one_loss(request):
    """A loss as a function of what the student says, and what it says."""
    function, case, name = LOSSES[request.param]
    arguments = to_tensors(case)
    values = arguments.pop(name)
    others = {
        key: [x.detach() for x in value] if isinstance(value, list) else value.detach()
        for key, value in arguments.items()
    }
    if not isinstance(values, list):
        return lambda value: function(**{name: value}, **others), values.detach()

    # The first level; the others are those of the case.
    return lambda level: function(**{name: [level, *(x.detach() for x in values[1:])]}, **others), values[0].detach()


def take_at_once(monkeypatch, entries):
    monkeypatch.setattr(_blocks, "RECOMPUTED", entries)
    monkeypatch.setattr(_blocks, "RECOMPUTED_AT_LEAST", entries)


@pytest.fixture
def small_parts(monkeypatch):
    take_at_once(monkeypatch, 40)


def value_and_gradient(loss, values):
    values = values.clone().requires_grad_()
    value = loss(values)
    return value.detach(), *torch.autograd.grad(value, values)


@pytest.mark.parametrize("entries", [1, 30])
def test_parts_make_the_whole(given, entries, monkeypatch):
    loss, values = given
    whole = value_and_gradient(loss, values)
    take_at_once(monkeypatch, entries)
    assert_close(value_and_gradient(loss, values), whole, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("entries", [30])
def test_rows_in_memory(given, entries, monkeypatch):
    """Student's values that lie in another order."""
    loss, values = given
    whole = value_and_gradient(loss, values)
    take_at_once(monkeypatch, entries)
    other = values.movedim(1, -1).contiguous().movedim(-1, 1)
    assert_close(value_and_gradient(loss, other), whole, rtol=1e-12, atol=1e-14)


def test_first_and_second_derivatives(given, small_parts):
    loss, values = given
    assert torch.autograd.gradcheck(loss, values.clone().requires_grad_(), fast_mode=True)
    assert torch.autograd.gradgradcheck(loss, values.clone().requires_grad_(), fast_mode=True)


def test_transforms_of_torch_func(given, small_parts):
    loss, values = given
    expected = value_and_gradient(loss, values)[1]
    assert_close(torch.func.grad(loss)(values), expected)
    both = torch.stack((values, 2 * values))
    gradients = [expected, value_and_gradient(loss, 2 * values)[1]]
    assert_close(torch.func.vmap(torch.func.grad(loss))(both), torch.stack(gradients))


def test_many_gradients_at_once(given, small_parts):
    loss, values = given
    expected = value_and_gradient(loss, values)[1]
    values = values.clone().requires_grad_()
    (batched,) = torch.autograd.grad(loss(values), values, torch.tensor([1.0, 2.0]).double(), is_grads_batched=True)
    assert_close(batched, torch.stack((expected, 2 * expected)))


@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*instantiated:DeprecationWarning")
def test_one_graph_for_a_compiler(given, small_parts):
    loss, values = given
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert_close(value_and_gradient(compiled, values), value_and_gradient(loss, values))


def test_autocast_is_that_of_the_forward_pass(given, small_parts):
    loss, values = given
    expected = value_and_gradient(loss, values.float())
    values = values.float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(values)
    assert_close((value.detach(), *torch.autograd.grad(value, values)), expected)
