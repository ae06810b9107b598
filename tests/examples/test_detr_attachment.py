"""A student with a teacher: its outputs, copies and files, attaching and detaching."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import detr_kd_losses as dkl
from detr_convention.adapter import (
    KEY,
    DetrReader,
    DistillationCriterion,
    Reader,
    attach_teacher,
    detach_teacher,
)
from detr_convention.standin import SetCriterion, StandIn
from detr_convention.train import NUM_CLASSES

from support.stand_ins import batch, stand_in

readers = pytest.mark.parametrize("reader", [Reader, DetrReader])


def teacher_with_calls() -> tuple[StandIn, list[None]]:
    teacher = stand_in(1, queries=20)
    calls: list[None] = []
    teacher.register_forward_pre_hook(lambda *_: calls.append(None))
    return teacher, calls


def number_of_hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


class TestAttached:
    """What a student with a teacher does."""

    @pytest.fixture
    def student(self) -> StandIn:
        student = stand_in(0)
        self.plain = copy.deepcopy(student)
        self.teacher = stand_in(1, queries=20, layers=4)
        self.handle = attach_teacher(student, self.teacher, reader=DetrReader)
        return student

    def test_outputs_are_the_students_and_one_entry_more(self, student: StandIn) -> None:
        images = batch()[0]
        expected, actual = self.plain(images), student(images)
        assert actual.keys() - expected.keys() == {KEY}
        assert_close({name: actual[name] for name in expected}, expected, rtol=0, atol=0)
        student_output, teacher_output = actual[KEY]
        assert student_output.logits.shape == (3, 4, 12, NUM_CLASSES)
        assert student_output.group.logits.shape == (3, 4, 20, NUM_CLASSES)
        assert teacher_output.logits.shape == (4, 4, 20, NUM_CLASSES)

    def test_evaluation_and_checkpoints_are_plain(self, student: StandIn) -> None:
        assert student.eval()(batch()[0]).keys() == self.plain(batch()[0]).keys()
        assert student.state_dict().keys() == self.plain.state_dict().keys()
        assert sum(1 for _ in student.parameters()) == sum(1 for _ in self.plain.parameters())
        student.train()
        assert not self.teacher.training

    @pytest.mark.parametrize("reader", [Reader, DetrReader])
    def test_criterion_keeps_its_terms_and_adds_ours(self, reader: type[Reader]) -> None:
        student, plain = stand_in(0), stand_in(0)
        attach_teacher(student, stand_in(1, queries=20), reader=reader)
        criterion = DistillationCriterion(SetCriterion(layers=3), dkl.DETRDistillationLoss())
        images, targets = batch()
        losses, expected = criterion(student(images), targets), SetCriterion(layers=3)(plain(images), targets)
        assert_close({name: losses[name] for name in expected}, expected, rtol=0, atol=0)
        new = losses.keys() - expected.keys()
        assert new == set(criterion.distillation.names[: None if reader is DetrReader else 3])
        assert all(criterion.weight_dict[name] == 1 for name in new)
        assert SetCriterion(layers=3).weight_dict.items() <= criterion.weight_dict.items()

    def test_criterion_sees_the_outputs_that_it_knows(self, student: StandIn) -> None:
        seen = []

        class Criterion(SetCriterion):
            def forward(self, outputs: dict[str, Any], targets: Any) -> dict[str, Tensor]:
                seen.append(outputs.keys())
                return super().forward(outputs, targets)

        images, targets = batch()
        DistillationCriterion(Criterion(layers=3), dkl.DETRDistillationLoss())(student(images), targets)
        assert seen == [self.plain(images).keys()]

    def test_evaluation_has_the_terms_of_the_criterion_alone(self, student: StandIn) -> None:
        criterion = DistillationCriterion(SetCriterion(layers=3), dkl.DETRDistillationLoss()).eval()
        images, targets = batch()
        assert criterion(student.eval()(images), targets).keys() == SetCriterion(layers=3).weight_dict.keys()

    def test_targets_of_denoising_models_reach_the_student_alone(self) -> None:
        seen = []

        class Denoising(StandIn):
            def forward(self, samples: Tensor, targets: Any = None) -> dict[str, Any]:
                seen.append(targets)
                return {**super().forward(samples), "dn_meta": {"pad_size": 4}, "enc_outputs": {}}

        student, teacher = (Denoising(num_classes=NUM_CLASSES, num_queries=5) for _ in range(2))
        attach_teacher(student, teacher)
        outputs = student(*batch())
        assert [targets is None for targets in seen] == [False, True]
        assert outputs["dn_meta"] == {"pad_size": 4}
        assert outputs["enc_outputs"] == {}

    def test_wrong_uses(self, student: StandIn) -> None:
        with pytest.raises(ValueError, match=r"another model than the student.*deepcopy"):
            attach_teacher(student, student)
        criterion = DistillationCriterion(SetCriterion(layers=3), dkl.DETRDistillationLoss())
        images, targets = batch()
        with pytest.raises(ValueError, match=r"'distillation' in training: call attach_teacher"):
            criterion(self.plain(images), targets)
        wide = stand_in(2, channels=64)
        attach_teacher(self.plain, wide, reader=DetrReader)
        with pytest.raises(ValueError, match=r"must have 32 channels .*, got 64; .* leave QueryGroupTerm out"):
            self.plain(images)


class TestCopies:
    """What was trained under a teacher is copied, saved and averaged like any model."""

    @readers
    def test_deep_copy_is_a_student_of_its_own(self, reader: type[Reader]) -> None:
        student, (teacher, calls) = stand_in(0), teacher_with_calls()
        attach_teacher(student, teacher, reader=reader)
        images = batch()[0]
        student(images)
        other = copy.deepcopy(student)
        assert_close(dict(other.state_dict()), dict(student.state_dict()), rtol=0, atol=0)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(0.5)
        calls.clear()
        outputs = other(images)
        assert len(calls) == 1
        said = outputs[KEY][0]
        assert_close(said.logits[-1], outputs["pred_logits"])
        if reader is DetrReader:
            assert_close(said.features, [other.backbone(images)])
        assert (said.logits[-1] - student.eval()(images)["pred_logits"]).abs().max() > 1e-3
        student.train()

    def test_average_of_weights_is_evaluated_without_the_teacher(self) -> None:
        student, (teacher, calls) = stand_in(0), teacher_with_calls()
        attach_teacher(student, teacher, reader=DetrReader)
        student(batch()[0])
        average = torch.optim.swa_utils.AveragedModel(student)
        average.update_parameters(student)
        calls.clear()
        outputs = average.eval()(batch()[0])  # while the student itself is in training mode
        assert KEY not in outputs
        assert not calls
        assert student.training

    @readers
    def test_pickled_student_is_plain_and_takes_a_teacher_again(self, reader: type[Reader]) -> None:
        student, (teacher, calls) = stand_in(0), teacher_with_calls()
        plain = io.BytesIO()
        torch.save(student, plain)
        attach_teacher(student, teacher, reader=reader)
        student(batch()[0])
        file = io.BytesIO()
        torch.save(student, file)
        assert file.tell() < plain.tell() + 10_000, "the teacher is not in the file"
        file.seek(0)
        other = torch.load(file, weights_only=False)
        assert_close(dict(other.state_dict()), dict(student.state_dict()), rtol=0, atol=0)
        assert KEY not in other.train()(batch()[0])
        attach_teacher(other, teacher, reader=reader)
        calls.clear()
        assert KEY in other(batch()[0])
        assert len(calls) == 1

    @readers
    def test_nothing_of_a_batch_is_kept(self, reader: type[Reader]) -> None:
        student, teacher = stand_in(0), stand_in(1, queries=20)
        attachment = attach_teacher(student, teacher, reader=reader)
        before = number_of_hooks(student), number_of_hooks(teacher)
        student(batch()[0])
        assert (number_of_hooks(student), number_of_hooks(teacher)) == before == (2, 0)
        assert not attachment._reading

    def test_pass_that_fails_leaves_nothing_behind(self) -> None:
        student = stand_in(0)
        attachment = attach_teacher(student, stand_in(1, queries=20), reader=DetrReader)
        with pytest.raises(RuntimeError, match="channels"):
            student(torch.rand(2, 5, 64, 64))
        assert number_of_hooks(student) == 2
        assert not attachment._reading
        assert KEY in student(batch()[0])


class TestAttachingAndDetaching:
    """One student, one teacher."""

    def test_second_teacher_replaces_the_first(self) -> None:
        student, (first, first_calls), (second, second_calls) = stand_in(0), teacher_with_calls(), teacher_with_calls()
        old = attach_teacher(student, first, reader=DetrReader)
        for _ in range(2):
            attach_teacher(student, second, reader=DetrReader)
        student(batch()[0])
        assert (len(first_calls), len(second_calls)) == (0, 1)
        old.remove()  # a second time, to no effect
        student(batch()[0])
        assert len(second_calls) == 2

    @readers
    @pytest.mark.parametrize("by_handle", [True, False])
    def test_nothing_stays_after_detaching(self, reader: type[Reader], by_handle: bool) -> None:
        student, (teacher, calls) = stand_in(0), teacher_with_calls()
        attachment = attach_teacher(student, teacher, reader=reader)
        student(batch()[0])
        calls.clear()
        attachment.remove() if by_handle else detach_teacher(student)
        assert KEY not in student(batch()[0])
        assert not calls
        assert number_of_hooks(student) == 0
        assert number_of_hooks(teacher) == 1, "the one of this test"

    def test_copy_is_detached_alone(self) -> None:
        student = stand_in(0)
        attach_teacher(student, stand_in(1, queries=20))
        other = copy.deepcopy(student)
        detach_teacher(other)
        assert number_of_hooks(other) == 0
        assert KEY not in other(batch()[0])
        assert KEY in student(batch()[0])

    def test_hooks_of_others_stay(self) -> None:
        student, seen = stand_in(0), []
        student.register_forward_hook(lambda *_: seen.append(1))
        attach_teacher(student, stand_in(1)).remove()
        attach_teacher(student, stand_in(1))
        detach_teacher(student)
        student(batch()[0])
        assert seen == [1]

    def test_teacher_that_shares_parameters_with_the_student(self) -> None:
        student = stand_in(0)
        teacher = copy.copy(student)  # another module, the same tensors
        with pytest.raises(ValueError, match=r"parameters of its own.*deepcopy"):
            attach_teacher(student, teacher)
        assert all(parameter.requires_grad for parameter in student.parameters())

    def test_evaluation_mode_of_the_student_is_what_counts(self) -> None:
        student, (teacher, calls) = stand_in(0), teacher_with_calls()
        attach_teacher(student, teacher)
        for mode, expected in ((True, 1), (False, 1), (True, 2)):
            student.train(mode)(batch()[0])
            teacher.train()  # by somebody who walks over all models
            assert len(calls) == expected
