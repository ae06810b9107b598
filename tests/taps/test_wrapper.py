"""A trainer's criterion with our terms: what engines call and count, what stays on the student, what is learned."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import detr_kd_losses as dkl
from detr_kd_losses.taps import DistillationCriterion, Tap

from support import lineage
from support.decoder_parts import images, targets
from support.engines import (
    SetCriterion,
    TotalCriterion,
    WeighingCriterion,
    average_of,
    solve_one_epoch,
    train_one_epoch,
)
from support.wrapped import KINDS, batches, build, call, wrapped


@pytest.mark.parametrize("kind", KINDS)
def test_real_steps_of_the_engine_of_each(kind: str) -> None:
    """At several sizes of images; all three losses; what is copied afterwards is a plain student."""
    criterion, student = wrapped(kind)
    before = copy.deepcopy(student.state_dict())
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    criterion.learn(optimizer)
    history = train_one_epoch(student, criterion, batches(kind), optimizer, call)
    assert len(history) == 3
    assert torch.stack(history).isfinite().all()
    assert any((tensor != before[name]).any() for name, tensor in student.state_dict().items())
    losses = criterion(call(student, *batches(kind)[0]), targets())
    assert set(criterion.distillation.names) <= losses.keys()
    assert {"loss_kd_class", "loss_kd_feature", "loss_kd_group_class"} <= losses.keys()
    assert criterion.counted.startswith("the engine reads `weight_dict`")


@pytest.mark.parametrize("kind", ["lineage v1", "lineage v2", "lineage d_fine"])
def test_engine_with_mixed_precision_and_an_average(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    criterion, student = wrapped(kind, WeighingCriterion())
    average = average_of(student)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    criterion.learn(optimizer)
    with caplog.at_level(logging.INFO, logger="detr_kd_losses.taps.wrapper"):
        history = solve_one_epoch(student, criterion, batches(kind), optimizer, average)
    assert torch.stack(history).isfinite().all()
    assert criterion.criterion.called_with[2] == {"epoch": 0, "step": 2, "global_step": 2}
    assert criterion.counted.startswith("the engine sums all that the criterion answers")
    assert criterion.counted in caplog.text
    plain = average(images(size=lineage.EVAL_SIZE))
    assert plain["pred_logits"].isfinite().all()


def test_distillation_alone_lowers_every_term() -> None:
    """On one batch, over 25 steps."""
    criterion, student = wrapped("lineage v2")
    samples, labels = images(), targets()
    optimizer = torch.optim.AdamW(student.parameters(), lr=2e-3)
    history = []
    for _ in range(26):
        torch.manual_seed(0)
        losses = criterion(student(samples, labels), labels)
        terms = {name: losses[name] for name in criterion.distillation.names}
        optimizer.zero_grad()
        torch.stack(list(terms.values())).sum().backward()
        nn.utils.clip_grad_norm_(student.parameters(), 0.1)
        optimizer.step()
        history.append({name: term.item() for name, term in terms.items()})
    for name, first in history[0].items():
        assert history[-1][name] < first, name


def test_criterion_that_sums_by_itself() -> None:
    criterion, student = wrapped(criterion=TotalCriterion())
    losses = criterion(student(images(), targets()), targets())
    terms = torch.stack([losses[name] for name in criterion.distillation.names]).sum()
    own = torch.stack([losses[name] for name in SetCriterion().weight_dict]).sum()
    assert_close(losses["total_loss"], own + terms)
    assert (
        criterion.counted
        == "the criterion sums its terms itself: those of the distillation are added to its 'total_loss'"
    )


def test_not_known_before_two_steps() -> None:
    criterion, _ = wrapped()
    assert criterion.counted == "not known before the second step"


def test_arguments_of_the_criterion() -> None:
    """Positional ones, tuples, and whatever else an engine passes."""
    criterion, student = wrapped("dn")
    outputs = call(student.train(), *batches("dn")[0])
    criterion(outputs, targets(), outputs[1], epoch=3)
    assert criterion.criterion.called_with == (outputs, ({"pad_size": 4},), {"epoch": 3})
    criterion(outputs=call(student, *batches("dn")[0]), targets=targets())
    original = criterion.criterion
    original.loss_weight_decay = lambda epoch: epoch
    assert criterion.loss_weight_decay(epoch=3) == 3
    with pytest.raises(AttributeError, match=r"SetCriterion.*'matcher'"):
        _ = criterion.matcher


def test_losses_and_outputs_of_the_student_are_as_ever() -> None:
    criterion, student = wrapped()
    plain = build("lineage v2").train()
    expected = plain(images(), targets())
    actual = student.train()(images(), targets())
    assert_close(actual, expected, rtol=0, atol=0)
    losses, own = criterion(actual, targets()), SetCriterion()(expected, targets())
    assert_close({name: losses[name] for name in own}, own, rtol=0, atol=0)
    assert losses.keys() - own.keys() == set(criterion.distillation.names)
    assert all(criterion.weight_dict[name] == 1 for name in criterion.distillation.names)


def test_what_is_distilled_is_what_two_taps_read() -> None:
    criterion, student = wrapped()
    teacher = criterion.teacher.module
    losses = criterion(student.train()(images(), targets()), targets())
    other = build("lineage v2").train()
    with torch.no_grad(), Tap(teacher) as teacher_tap:
        teacher(images())
    with Tap(other) as tap:
        other(images(), targets())
    outputs = tap.output(group=teacher_tap.query_group()), teacher_tap.output()
    expected = dkl.DETRDistillationLoss()(*outputs, dkl.pad_targets(targets()))
    assert_close({name: losses[name] for name in expected}, expected, rtol=1e-5, atol=1e-6)


def test_evaluation_is_plain() -> None:
    criterion, student = wrapped()
    calls: list[None] = []
    criterion.teacher.module.register_forward_pre_hook(lambda *_: calls.append(None))
    student.eval()(images(size=lineage.EVAL_SIZE))
    outputs = student.train()(images(), targets())
    assert len(calls) == 1
    criterion(outputs, targets())
    student.eval()
    assert criterion.eval()(outputs, targets()).keys() == SetCriterion().weight_dict.keys()


def test_options() -> None:
    """Levels, the surest queries, images of another size for the teacher, targets of another form."""
    seen = []

    def teacher_call(teacher: Any, samples: Tensor, *_: Any, **__: Any) -> Any:
        seen.append(samples.shape)
        return teacher(nn.functional.interpolate(samples, size=(64, 64)))

    student, teacher = build("lineage v2"), build("lineage d_fine", seed=1, width=24, queries=10)
    criterion = DistillationCriterion(
        SetCriterion(),
        student,
        teacher,
        levels=([1], [1]),
        group_share=0.5,
        teacher_call=teacher_call,
        read_targets=lambda batch: dkl.pad_targets(batch["labels"]),
    )
    criterion.criterion = nn.Identity()
    criterion.criterion.forward = lambda outputs, targets: {}
    losses = criterion(student.train()(images(), targets()), {"labels": targets()})
    assert losses.keys() == set(criterion.distillation.names)
    assert seen == [(2, 3, 48, 32)]
    assert len(criterion.distillation.terms["feature"].projections) == 1
    torch.stack(list(losses.values())).sum().backward()
    learned = [*criterion.distillation.parameters(), *criterion.query_projection.parameters()]
    assert len(learned) == 3
    assert all(parameter.grad.abs().sum() > 0 for parameter in learned)


def test_wrong_uses() -> None:
    student = build("lineage v2")
    with pytest.raises(ValueError, match=r"another model than the student.*deepcopy"):
        DistillationCriterion(SetCriterion(), student, student)
    criterion, student = wrapped(criterion=nn.L1Loss())
    with pytest.raises(AttributeError, match="'weight_dict'"):
        _ = criterion.weight_dict
    criterion.criterion.forward = lambda outputs, targets: outputs["pred_logits"].mean()
    with pytest.raises(TypeError, match="`criterion` must answer a dict of losses, got Tensor"):
        criterion(student.train()(images(), targets()), targets())

    class Keywords(nn.Module):
        def forward(self, **inputs: Any) -> Any:
            return student(inputs["pixel_values"])

    outer = Keywords()
    outer.student = student
    DistillationCriterion(SetCriterion(), outer, build("lineage v2", seed=1))
    with pytest.raises(TypeError, match=r"images must be the first argument .* got \['pixel_values'\]"):
        outer(pixel_values=images())


def test_boxes_in_pixels_are_told_of() -> None:
    """Also where the first batch has no object at all."""
    criterion, student = wrapped()
    wrong = [{"labels": image["labels"], "boxes": 640 * image["boxes"]} for image in targets()]
    nothing = [{name: tensor[:0] for name, tensor in image.items()} for image in wrong]
    criterion(student.train()(images(), nothing), nothing)
    with pytest.warns(UserWarning, match=r"targets of the first batch that has any: `target_boxes` must"):
        criterion(student.train()(images(), targets()), wrong)


def test_copies_of_data_parallel_are_refused() -> None:
    criterion, student = wrapped()
    with pytest.raises(RuntimeError, match=r"Lineage must not run in torch\.nn\.DataParallel"):
        student.train()._replicate_for_data_parallel()(images())
    assert criterion(student(images()), targets())
