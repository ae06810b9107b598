"""Losses that are taken part by part, and computed again in the backward pass: the same numbers, wherever they run."""

from __future__ import annotations

import subprocess
import sys
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


def make(name, dtype=torch.float64):
    """A loss as a function of what the student says, and what it says; of levels, the first."""
    function, case, student = LOSSES[name]
    arguments = {
        key: [level.detach() for level in value] if isinstance(value, list) else value.detach()
        for key, value in to_tensors(case, dtype).items()
    }
    values = arguments.pop(student)
    if not isinstance(values, list):
        return lambda value: function(**{student: value}, **arguments), values
    return lambda level: function(**{student: [level, *values[1:]]}, **arguments), values[0]


@pytest.fixture(params=LOSSES, name="given")
def one_loss(request):
    return make(request.param)


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


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(name, dtype, small_parts):
    loss, values = make(name, torch.float32)
    expected = value_and_gradient(loss, values)
    with torch.autocast("cpu", dtype):
        actual = value_and_gradient(loss, values)
    assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", LOSSES)
def test_a_teacher_of_inference_mode(name, small_parts):
    loss, values = make(name)
    with torch.inference_mode():
        inferred, _ = make(name)
    assert_close(value_and_gradient(inferred, values), value_and_gradient(loss, values), rtol=0, atol=0)


def test_loads_no_compiler():
    """PyTorch's own checkpoint would."""
    code = """if True:
        import sys, torch, detr_kd_losses as dkl
        features = torch.randn(1, 3, 90, 90, requires_grad=True)
        dkl.feature_distillation_loss(features, features.detach() + 1).backward()
        print("torch._dynamo" in sys.modules)
    """
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout.split() == [b"False"]
