"""What was trained under a teacher is copied, saved and averaged like any model."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from detr_kd_losses.taps import DistillationCriterion

from support import lineage
from support.decoder_parts import images, targets
from support.engines import (
    SetCriterion,
)
from support.wrapped import build, wrapped


class Note:
    """A hook of somebody else."""

    def __init__(self, seen: list[int]) -> None:
        self.seen = seen

    def __call__(self, *_: Any) -> None:
        self.seen.append(1)


def test_copies_and_files_have_neither_teacher_nor_hooks() -> None:
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


def test_state_is_that_of_a_plain_student() -> None:
    criterion, student = wrapped()
    assert student.state_dict().keys() == build("lineage v2").state_dict().keys()
    assert not any(name.startswith("teacher") for name in criterion.state_dict())
    assert set(criterion.parameters()).isdisjoint(student.parameters())


def test_nothing_of_a_batch_is_kept() -> None:
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


def test_pass_that_fails_leaves_nothing_behind() -> None:
    criterion, student = wrapped()
    with pytest.raises(RuntimeError, match="channels"):
        student.train()(torch.rand(2, 5, 64, 64))
    assert criterion._reading is None
    assert sum(len(module._forward_hooks) for module in student.modules()) == 1
    criterion(student(images(), targets()), targets())


def test_interrupted_pass_leaves_nothing_behind() -> None:
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


def test_detached() -> None:
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


def test_hooks_of_others_are_still_removed_by_their_handles() -> None:
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


def test_criterion_is_copied_and_saved_between_pass_and_loss() -> None:
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
def test_copy_that_trains_in_place_of_the_student_is_told_of(training: bool) -> None:
    criterion, student = wrapped()
    other = copy.deepcopy(student.train(training)).train()
    with pytest.raises(RuntimeError, match="must be the student itself, no copy"):
        criterion(other(images(), targets()), targets())


def test_loss_that_nobody_asked_for_is_in_no_evaluation() -> None:
    criterion, student = wrapped()
    student.train()(images(), targets())
    with torch.no_grad():
        outputs = student.eval()(images(size=lineage.EVAL_SIZE))
        losses = criterion({**outputs, "aux_outputs": []}, targets())
    assert losses.keys() == {"loss_class", "loss_bbox", "loss_giou"}


def test_second_teacher_replaces_the_first() -> None:
    first, student = wrapped()
    second = DistillationCriterion(SetCriterion(), student, build("lineage v2", seed=2))
    outputs = student.train()(images(), targets())
    assert first._said is None
    second(outputs, targets())
    with pytest.raises(RuntimeError, match="must make a forward pass in training mode before"):
        first(outputs, targets())
