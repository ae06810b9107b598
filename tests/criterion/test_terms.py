"""Terms: what they are called, what they share, and terms from outside."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

import detr_kd_losses as dkl

from support.steps import make_output, make_targets


def test_keys_do_not_come_and_go_with_the_weights():
    """A weight of 0 gives 0, at no cost: nothing is matched, and a projection has a gradient of 0."""
    student, teacher, targets = make_output(0, 3, 7, group=9, requires_grad=True), make_output(1, 3, 9), make_targets()
    narrow = student._replace(features=[torch.randn(2, 3, 6, 8, requires_grad=True)] * 2)
    terms = [dkl.LogitsTerm(weight=0), dkl.FeatureTerm([3, 3], [8, 8], weight=0), dkl.QueryGroupTerm(weight=0)]
    criterion = dkl.DETRDistillationLoss(terms, teacher_matching=dkl.TargetMatching(backend="triton"))
    losses = criterion(narrow, teacher, targets)
    assert tuple(losses) == criterion.names == dkl.DETRDistillationLoss().names
    assert criterion.needs == frozenset()
    assert all(loss == 0 for loss in losses.values())
    sum(losses.values()).backward()
    assert all((parameter.grad == 0).all() for parameter in criterion.parameters())
    assert (student.logits.grad == 0).all()
    assert dkl.DETRDistillationLoss().needs == {"features", "group"}


def test_terms_are_named():
    criterion = dkl.DETRDistillationLoss([dkl.QueryGroupTerm(), dkl.LogitsTerm()])
    assert list(criterion.terms) == ["query_group", "logits"]
    with pytest.raises(ValueError, match="`terms` must be a mapping by name where two are of the same kind"):
        dkl.DETRDistillationLoss([dkl.LogitsTerm(), dkl.LogitsTerm(prefix="loss_last_")])
    both = {"logits": dkl.LogitsTerm(), "last": dkl.LogitsTerm(prefix="loss_last_", stage_map="last")}
    assert dkl.DETRDistillationLoss(both).names[3:] == ("loss_last_class", "loss_last_bbox", "loss_last_giou")
    with pytest.raises(
        ValueError, match=r"`terms` must have different names, got \['loss_kd_bbox', .* another `prefix`"
    ):
        dkl.DETRDistillationLoss({"one": dkl.LogitsTerm(), "two": dkl.LogitsTerm()})
    criterion = dkl.DETRDistillationLoss(both)
    both["last"].prefix = "loss_kd_"
    with pytest.raises(ValueError, match=r"must have different names, got \['loss_kd_bbox', .* another `prefix`"):
        criterion(make_output(0, 3, 7), make_output(1, 3, 9), make_targets())
    with pytest.raises(TypeError, match=r"`terms\['logits'\]` must be a Term, got float: pass LogitsTerm\(\)"):
        dkl.DETRDistillationLoss({"logits": 1.0})


class ScoreTerm(dkl.Term):
    parts = ("score",)

    def compute(self, step):
        return {"score": (step.student.logits[-1].mean() - step.teacher_logits[-1].mean()).square()}


def test_a_term_from_outside():
    student, teacher, targets = make_output(0, 3, 7, requires_grad=True), make_output(1, 3, 9), make_targets()
    criterion = dkl.DETRDistillationLoss([dkl.LogitsTerm(), ScoreTerm(weight=2.0)])
    losses = criterion(student, teacher, targets)
    assert_close(losses["loss_kd_score"], 2 * (student.logits[-1].mean() - teacher.logits[-1].mean()).square())
    assert tuple(losses) == criterion.names


def test_a_term_from_outside_that_is_wrong():
    class Unfinished(dkl.Term):
        parts = ("score",)

    class Forgetful(ScoreTerm):
        parts = ("score", "more")

    step = dkl.Step(make_output(0, 3, 7), make_output(1, 3, 9), make_targets())
    with pytest.raises(TypeError, match=r"`Unfinished` must define compute\(step\)"):
        Unfinished()(step)
    with pytest.raises(
        ValueError, match=r"`Forgetful.compute` must return the `parts` \('score', 'more'\), got \('score',\)"
    ):
        Forgetful()(step)


def test_what_a_step_shares_is_computed_once_and_only_if_asked_for(counting):
    outputs = make_output(0, 3, 7), make_output(1, 3, 9), make_targets()
    matching = {side: dkl.TargetMatching(backend="counting") for side in ("teacher_matching", "student_matching")}
    step = dkl.Step(*outputs, **matching)
    assert counting.calls == 0
    assert step.teacher_assignment is step.teacher_assignment
    assert step.student_assignment is step.student_assignment
    assert counting.calls == 2
    assert_close(step.student_assignment, dkl.match_targets(outputs[0].logits, outputs[0].boxes, *outputs[2]))
    dkl.DETRDistillationLoss(**matching)(
        outputs[0]._replace(features=None), outputs[1]._replace(features=None), outputs[2]
    )
    assert counting.calls == 3
