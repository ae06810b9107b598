"""A run that goes on: projections are in the state of the optimizer, or say why not."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import detr_kd_losses as dkl
from detr_kd_losses.taps import learn_projections

from support import lineage
from support.engines import SetCriterion, train_one_epoch
from support.wrapped import batch, criterion_and_student


class TestResuming:
    """Engines save the model and the optimizer; the projections are in the optimizer's state."""

    def run(self, checkpoint: dict[str, Any] | None = None, *, learned: bool = True) -> Any:
        torch.manual_seed(7)
        criterion, student = criterion_and_student()
        for parameter in criterion.parameters():
            nn.init.normal_(parameter)  # as in every process that starts, something else
        optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
        if learned:
            criterion.learn(optimizer)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        if checkpoint is not None:
            student.load_state_dict(checkpoint["model"])
            optimizer.load_state_dict(checkpoint["optimizer"])
            scheduler.load_state_dict(checkpoint["lr_scheduler"])
        train_one_epoch(student, criterion, [batch(1)], optimizer)
        scheduler.step()
        return criterion, student, optimizer, scheduler

    def checkpoint(self, run: Any, path: Path) -> dict[str, Any]:
        _, student, optimizer, scheduler = run
        parts = {"model": student, "optimizer": optimizer, "lr_scheduler": scheduler}
        torch.save({name: part.state_dict() for name, part in parts.items()}, path)
        return torch.load(path, weights_only=True)

    def test_projections_are_what_they_were(self, tmp_path: Path) -> None:
        run = self.run()
        saved = self.checkpoint(run, tmp_path / "1.pt")
        criterion, student = criterion_and_student()
        optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
        criterion.learn(optimizer)
        optimizer.load_state_dict(saved["optimizer"])
        assert_close(criterion.distillation.state_dict(), run[0].distillation.state_dict(), rtol=0, atol=0)
        assert_close(criterion.query_projection.state_dict(), run[0].query_projection.state_dict(), rtol=0, atol=0)
        assert_close(optimizer.state_dict(), run[2].state_dict(), rtol=0, atol=0)
        learned = [*criterion.distillation.parameters(), *criterion.query_projection.parameters()]
        assert optimizer.param_groups[-1]["params"] == learned

    def test_run_without_a_teacher_goes_on_with_one(self, tmp_path: Path) -> None:
        saved = self.checkpoint(self.run(learned=False), tmp_path / "1.pt")
        with pytest.warns(UserWarning, match="without projections: they start anew"):
            _, student, optimizer, _ = self.run(saved)
        state = optimizer.state_dict()
        assert len(state["param_groups"]) == 2
        steps = [optimizer.state[one]["step"].item() for one in student.parameters() if one.grad is not None]
        assert set(steps) == {2}, "the student's own state goes on"
        assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 / 4)

    def test_run_with_projections_does_not_lose_them_silently(self, tmp_path: Path) -> None:
        saved = self.checkpoint(self.run(), tmp_path / "1.pt")
        with pytest.raises(ValueError, match="number of parameter groups"):
            self.run(saved, learned=False)

    def test_projections_for_another_teacher(self) -> None:
        criterion, student = criterion_and_student()
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        criterion.learn(optimizer)
        other = torch.optim.SGD(student.parameters(), lr=0.1)
        learn_projections(other, dkl.DETRDistillationLoss([dkl.FeatureTerm([16, 16], [32, 32])]))
        with pytest.raises(
            ValueError, match=r"same student, teacher and terms, got .*bias' of shape \(24,\) in place of"
        ):
            other.load_state_dict(optimizer.state_dict())
        third = torch.optim.SGD(student.parameters(), lr=0.1)
        learn_projections(third, dkl.DETRDistillationLoss([dkl.FeatureTerm([16, 16], [24, 24])]))
        with pytest.raises(ValueError, match=r"'1.maps.content.weight' of shape \(16, 24\) in place of None"):
            third.load_state_dict(optimizer.state_dict())

    def test_moments_of_projections_that_are_not_there(self) -> None:
        """As after a tool that keeps of an optimizer what it knows."""
        criterion, student = criterion_and_student()
        optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
        criterion.learn(optimizer)
        train_one_epoch(student, criterion, [batch()], optimizer)
        state = {name: part for name, part in optimizer.state_dict().items() if name in {"state", "param_groups"}}
        with pytest.raises(ValueError, match=r"must have 'distillation_projections'.*\['param_groups', 'state'\]"):
            optimizer.load_state_dict(state)

    @pytest.mark.parametrize(
        "make",
        [
            lambda optimizer: torch.optim.lr_scheduler.MultiStepLR(optimizer, [1], gamma=0.1),
            lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10),
            lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=20),
            lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=4),
        ],
    )
    def test_new_projections_learn_at_the_rate_of_the_student(self, make: Any) -> None:
        """Where a run that began without a teacher goes on with one, under its scheduler."""
        plain = torch.optim.SGD(lineage.build("v2").parameters(), lr=0.1)
        scheduler = make(plain)
        for _ in range(3):
            plain.step()
            scheduler.step()
        criterion, student = criterion_and_student()
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        criterion.learn(optimizer)
        resumed = make(optimizer)
        with pytest.warns(UserWarning, match="start anew"):
            optimizer.load_state_dict(plain.state_dict())
        resumed.load_state_dict(scheduler.state_dict())
        for _ in range(3):
            first, last = (group["lr"] for group in optimizer.param_groups)
            assert last == pytest.approx(first, rel=1e-6)
            optimizer.step()
            resumed.step()

    def test_scheduler_with_a_rate_for_each_group(self) -> None:
        """The remedy in the warning helps."""
        plain = torch.optim.SGD(lineage.build("v2").parameters(), lr=0.1)
        halve = lambda epoch: 0.5**epoch  # noqa: E731
        scheduler = torch.optim.lr_scheduler.LambdaLR(plain, halve)
        criterion, student = criterion_and_student()
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        criterion.learn(optimizer)
        resumed = torch.optim.lr_scheduler.LambdaLR(optimizer, halve)
        with pytest.warns(UserWarning, match=r"such as LambdaLR, needs theirs: `scheduler.base_lrs.append"):
            optimizer.load_state_dict(plain.state_dict())
        resumed.load_state_dict(scheduler.state_dict())
        resumed.base_lrs.append(0.1)
        optimizer.step()
        resumed.step()
        assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.05]

    @pytest.mark.parametrize("buffers", [True, False])
    def test_state_of_the_original_criterion(self, buffers: bool) -> None:
        """Solvers of RT-DETR and its heirs save whatever has a state, the criterion too."""
        plain = SetCriterion()
        criterion, _ = criterion_and_student()
        if buffers:
            for one in (plain, criterion.criterion):
                one.register_buffer("empty_weight", torch.zeros(3))
            plain.empty_weight += 2
        before = copy.deepcopy(criterion.state_dict())
        criterion.load_state_dict(plain.state_dict())
        for name, tensor in criterion.state_dict().items():
            expected = plain.empty_weight if name == "criterion.empty_weight" else before[name]
            assert_close(tensor, expected, rtol=0, atol=0)
        criterion.load_state_dict({name: tensor + 1 for name, tensor in before.items()})
        changed = criterion.state_dict().items()
        assert all(not torch.equal(tensor, before[name]) for name, tensor in changed)
        with pytest.raises(RuntimeError, match="Unexpected key"):
            criterion.load_state_dict({**plain.state_dict(), "other": torch.zeros(3)})

    def test_learning_twice(self) -> None:
        criterion, student = criterion_and_student()
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        criterion.learn(optimizer)
        with pytest.raises(ValueError, match="more than one parameter group"):
            criterion.learn(optimizer)
