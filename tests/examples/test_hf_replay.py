"""The replay takes the projections of the memory from the recorded call, with their gradients; nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("transformers", reason="the Hugging Face adapter needs transformers")

from detr_kd_losses.taps import Tap

from support import zoo

FAMILIES = list(zoo.FAMILIES)
WITHOUT_PROJECTIONS = ("d_fine", "deimv2")
EXACT = {"rtol": 0, "atol": 1e-6}
families = pytest.mark.parametrize("family", FAMILIES)
projecting = pytest.mark.parametrize("family", [name for name in FAMILIES if name not in WITHOUT_PROJECTIONS])


@families
@pytest.mark.usefixtures("float64")
def test_same_outputs_and_gradients_as_projecting_again(family: str) -> None:
    teacher = zoo.build(family, seed=1)
    with torch.no_grad(), Tap(teacher) as teacher_tap:
        teacher(**zoo.images(teacher))
    results = []
    for keep in (True, False):
        student = zoo.build(family).train()
        labels = None if family in WITHOUT_PROJECTIONS else zoo.labels()  # the loss of these two is float32 alone
        torch.manual_seed(0)
        with Tap(student) as tap:
            student(**zoo.images(student), labels=labels)
        assert len(tap.call.projections) == zoo.LAYERS * len(tap.description.memory_projections)
        if not keep:
            forget(tap)
        output = tap.output(group=teacher_tap.query_group())
        predictions = (output.logits, output.boxes, output.group.logits, output.group.boxes)
        sum(tensor.square().sum() for tensor in predictions).backward()
        gradients = {name: parameter.grad for name, parameter in student.named_parameters()}
        results.append((predictions, gradients))
    assert_close(*results, rtol=1e-9, atol=1e-9)


@families
def test_replay_is_cheaper_by_the_projections(family: str) -> None:
    model = zoo.build(family)
    with Tap(model) as tap:
        model(**zoo.images(model))
    batch, cells = tap.call.arguments["encoder_hidden_states"].shape[:2]
    first, second = cost_of_replay(tap), cost_of_replay(tap)
    forget(tap)
    projections = zoo.LAYERS * len(tap.description.memory_projections)
    assert first == second == cost_of_replay(tap) - projections * batch * cells * 2 * zoo.WIDTH**2


@families
@torch.no_grad()
def test_nothing_else_sees_the_memory(family: str) -> None:
    """By the number of tokens, of all that has parameters in a decoder layer."""
    more = {"two_stage_num_proposals": 20} if family == "deformable_two_stage" else {}
    model = zoo.build(family, num_queries=20, **more)
    tokens: dict[nn.Module, int] = {}
    for module in model.model.decoder.layers.modules():
        if module._parameters:
            module.register_forward_pre_hook(lambda module, inputs: tokens.update({module: inputs[0].shape[1]}))
    with Tap(model) as tap:
        model(**zoo.images(model))
    cells = tap.call.arguments["encoder_hidden_states"].shape[1]
    assert set(tokens.values()) == ({20} if family in WITHOUT_PROJECTIONS else {20, cells})
    for layer in model.model.decoder.layers:
        seeing = {name for name, module in layer.named_modules() if tokens.get(module) == cells}
        assert seeing == set(tap.description.memory_projections)


@projecting
def test_nothing_is_kept_without_gradients(family: str) -> None:
    for frozen in (False, True):
        model = zoo.build(family).requires_grad_(not frozen)
        with torch.set_grad_enabled(frozen), Tap(model) as tap:
            model(**zoo.images(model))
        assert tap.call.projections == {}


@pytest.mark.parametrize("family", ["detr", "conditional", "deformable"])
def test_nothing_is_kept_of_checkpointed_layers(family: str) -> None:
    """They run again in the backward pass, where they must find what they have found before."""
    model = zoo.build(family).train()
    model.activation_checkpointing_enable()
    with Tap(model) as tap:
        model(**zoo.images(model))
    assert tap.call.projections == {}
    tap.output(group=tap.query_group()).group.logits.sum().backward()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_nothing_is_kept_of_compiled_layers() -> None:
    model = zoo.build("detr")
    for layer in model.model.decoder.layers:
        layer.compile(backend="eager")
    with Tap(model) as tap:
        model(**zoo.images(model))
    assert tap.call.projections == {}


def test_what_is_called_twice_is_not_kept() -> None:
    model = zoo.build("deformable")
    twice, *others = [layer.encoder_attn for layer in model.model.decoder.layers]

    def call_again(module: nn.Module, _: Any, output: Any) -> None:
        module.value_proj(output[0])

    twice.register_forward_hook(call_again)
    with Tap(model) as tap:
        model(**zoo.images(model))
    assert list(tap.call.projections) == [attention.value_proj for attention in others]


@projecting
def test_of_two_calls_the_last_is_replayed(family: str) -> None:
    model = zoo.build(family)
    with Tap(model) as tap:
        model(**zoo.images(model))
        model(**zoo.images(model, seed=1))
    assert len(tap.call.projections) == zoo.LAYERS * len(tap.description.memory_projections)
    output = tap.output(group=tap.query_group())
    assert_close(output.group.logits, output.logits, **EXACT)


@projecting
def test_another_tap_around_the_replay(family: str) -> None:
    model = zoo.build(family)
    with Tap(model) as tap:
        model(**zoo.images(model))
    call = tap.call
    with Tap(model) as around:
        expected = tap.replay(tap.query_group())
    assert tap.call is call
    assert around.call.projections == {}
    assert_close(around.replay(tap.query_group()), expected, **EXACT)


@projecting
def test_autocast_of_the_recorded_call_alone(family: str) -> None:
    """As on a GPU, where the memory is float32 and its projections are not."""
    model = zoo.build(family)
    with Tap(model) as tap:
        model(**zoo.images(model))
    expected = tap.replay(tap.query_group())
    halves = {module: tensor.bfloat16() for module, tensor in tap.call.projections.items()}
    tap.call = tap.call._replace(projections=halves)
    assert_close(tap.replay(tap.query_group()), expected, rtol=0, atol=0.05)


def forget(tap: Tap) -> None:
    """Let the tap's replays project the memory once more."""
    tap.call = tap.call._replace(projections={})


def cost_of_replay(tap: Tap) -> int:
    """Floating-point operations of a replay."""
    with FlopCounterMode(display=False) as counter:
        tap.replay(tap.query_group())
    return counter.get_total_flops()
