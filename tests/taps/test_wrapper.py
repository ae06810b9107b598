"""A trainer's criterion with our terms: what engines call and count, what stays on the student, what is learned."""

from __future__ import annotations

import copy
import gc
import io
import logging
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import detr_kd_losses as dkl
from detr_kd_losses.taps import DistillationCriterion, Tap

from support import lineage, repositories
from support.decoder_parts import images, targets
from support.engines import (
    SetCriterion,
    TotalCriterion,
    WeighingCriterion,
    average_of,
    solve_one_epoch,
    train_one_epoch,
)
from support.repositories import NestedTensor

KINDS = [*(f"lineage {kind}" for kind in lineage.DECODERS if kind != "ultralytics"), *repositories.KINDS]
SIZES = [(48, 32), (32, 32), (64, 48)]


def build(kind: str, seed: int = 0, **options: Any) -> nn.Module:
    family, _, name = kind.rpartition(" ")
    return lineage.build(name, seed=seed, **options) if family else repositories.build(kind, seed=seed)


def call(model: nn.Module, samples: Any, labels: Any) -> Any:
    """As the engine of the model's own repository does."""
    if isinstance(model, lineage.Lineage):
        return model(samples, targets=labels)
    if isinstance(model, repositories.Detr):
        return model(samples, dn_args=labels) if model.denoising else model(samples)
    return model(samples, labels) if model.kind == "DinoDecoder" else model(samples)


def batches(kind: str) -> list[tuple[Any, Any]]:
    drawn = [(images(size=size, seed=seed), targets(seed=seed)) for seed, size in enumerate(SIZES)]
    return drawn if kind.startswith("lineage") else [(NestedTensor(x, padded=8), labels) for x, labels in drawn]


def wrapped(kind: str = "lineage v2", criterion: nn.Module | None = None, **options: Any) -> tuple[Any, nn.Module]:
    student, teacher = build(kind), build(kind, seed=1)
    if kind == "dn":
        options = {"teacher_call": lambda model, samples, **_: model(samples, dn_args=0)} | options
    criterion = criterion or SetCriterion()
    return DistillationCriterion(criterion, student, teacher, **options), student


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


class TestTraces:
    """What was trained under a teacher is copied, saved and averaged like any model."""

    def test_copies_and_files_have_neither_teacher_nor_hooks(self) -> None:
        plain, file, plain_file = build("lineage v2"), io.BytesIO(), io.BytesIO()
        criterion, student = wrapped()
        seen: list[int] = []
        student.register_forward_hook(Note(seen))
        criterion(student.train()(images(), targets()), targets())
        torch.save(student, file)
        plain.register_forward_hook(Note([]))
        torch.save(plain, plain_file)
        assert file.tell() < plain_file.tell() + 2000, "the teacher is not in the file"
        file.seek(0)
        for other in (copy.deepcopy(student), torch.load(file, weights_only=False)):
            assert [type(hook) for hook in other._forward_hooks.values()] == [Note], "the hook of another stays"
            assert not other._forward_pre_hooks
            assert not other._forward_hooks_with_kwargs
            assert not other._forward_hooks_always_called
            assert_close(other.state_dict(), student.state_dict(), rtol=0, atol=0)
            other.train()(images(), targets())
        assert criterion._said is None

    def test_state_is_that_of_a_plain_student(self) -> None:
        criterion, student = wrapped()
        assert student.state_dict().keys() == build("lineage v2").state_dict().keys()
        assert not any(name.startswith("teacher") for name in criterion.state_dict())
        assert set(criterion.parameters()).isdisjoint(student.parameters())

    def test_nothing_of_a_batch_is_kept(self) -> None:
        gc.disable()
        try:
            criterion, student = wrapped()
            outputs = student.train()(images(), targets())
            kept = [weakref.ref(outputs["pred_logits"]), weakref.ref(criterion._said[0].group.logits)]
            losses = criterion(outputs, targets())
            torch.stack(list(losses.values())).sum().backward()
            del outputs, losses
            criterion.criterion.called_with = None
            assert [reference() for reference in kept] == [None] * 2
        finally:
            gc.enable()

    def test_pass_that_fails_leaves_nothing_behind(self) -> None:
        criterion, student = wrapped()
        with pytest.raises(RuntimeError, match="channels"):
            student.train()(torch.rand(2, 5, 64, 64))
        assert criterion._reading is None
        assert sum(len(module._forward_hooks) for module in student.modules()) == 1
        criterion(student(images(), targets()), targets())

    def test_interrupted_pass_leaves_nothing_behind(self) -> None:
        """A notebook's interrupt is no Exception, of which hooks would be told."""
        _, student = wrapped()

        def interrupt(*_: Any) -> None:
            raise KeyboardInterrupt

        handle = student.decoder.decoder.layers[1].register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            student.train()(images(), targets())
        handle.remove()
        student.eval()(images(size=lineage.EVAL_SIZE))
        assert not any(module.training for module in student.modules())
        assert student.decoder.eval_spatial_size == lineage.EVAL_SIZE
        assert sum(len(module._forward_hooks) for module in student.modules()) == 1
        copy.deepcopy(student)

    def test_detached(self) -> None:
        """From then on there is the original criterion."""
        criterion, student = wrapped()
        student.train()(images(), targets())
        criterion.detach()
        outputs = student.train()(images(), targets())
        assert criterion._said is None
        assert not student._forward_hooks
        assert not student._forward_pre_hooks
        assert vars(student).keys() == vars(build("lineage v2")).keys()
        assert criterion(outputs, targets()).keys() == SetCriterion().weight_dict.keys()
        with pytest.raises(RuntimeError, match="copied or detached has no student to check"):
            criterion.check(lambda model: model(images()))

    def test_hooks_of_others_are_still_removed_by_their_handles(self) -> None:
        plain = build("lineage v2")
        seen: list[int] = []
        earlier = plain.register_forward_hook(Note(seen))
        criterion = DistillationCriterion(SetCriterion(), plain, build("lineage v2", seed=1))
        later = plain.register_forward_pre_hook(Note(seen))
        plain.train()(images(), targets())
        assert seen == [1, 1]
        earlier.remove()
        plain(images(), targets())
        assert seen == [1, 1, 1]
        criterion.detach()
        plain(images(), targets())
        later.remove()
        plain(images(), targets())
        assert seen == [1, 1, 1, 1]

    def test_criterion_is_copied_and_saved_between_pass_and_loss(self) -> None:
        """With a module that holds both, as in Lightning: the copy of the student learns without a teacher."""
        both = nn.ModuleList(wrapped("lineage v2"))
        criterion, student = both
        outputs = student.train()(images(), targets())
        file = io.BytesIO()
        torch.save(both, file)
        file.seek(0)
        for other in (copy.deepcopy(both), torch.load(file, weights_only=False)):
            losses = other[0](other[1](images(), targets()), targets())
            assert losses.keys() == SetCriterion().weight_dict.keys()
            other[0].detach()
            with pytest.raises(RuntimeError, match="copied or detached has no student to check"):
                other[0].check(lambda model: model(images()))
        assert criterion(outputs, targets()).keys() > SetCriterion().weight_dict.keys()

    @pytest.mark.parametrize("training", [True, False])
    def test_copy_that_trains_in_place_of_the_student_is_told_of(self, training: bool) -> None:
        criterion, student = wrapped()
        other = copy.deepcopy(student.train(training)).train()
        with pytest.raises(RuntimeError, match="must be the student itself, no copy"):
            criterion(other(images(), targets()), targets())

    def test_loss_that_nobody_asked_for_is_in_no_evaluation(self) -> None:
        criterion, student = wrapped()
        student.train()(images(), targets())
        with torch.no_grad():
            outputs = student.eval()(images(size=lineage.EVAL_SIZE))
            losses = criterion({**outputs, "aux_outputs": []}, targets())
        assert losses.keys() == {"loss_class", "loss_bbox", "loss_giou"}

    def test_second_teacher_replaces_the_first(self) -> None:
        first, student = wrapped()
        second = DistillationCriterion(SetCriterion(), student, build("lineage v2", seed=2))
        outputs = student.train()(images(), targets())
        assert first._said is None
        second(outputs, targets())
        with pytest.raises(RuntimeError, match="must make a forward pass in training mode before"):
            first(outputs, targets())


class Note:
    """A hook of somebody else."""

    def __init__(self, seen: list[int]) -> None:
        self.seen = seen

    def __call__(self, *_: Any) -> None:
        self.seen.append(1)


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
