"""A model that answers its own losses: where the terms are, what stays a plain student, what a trainer does with it."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import detr_kd_losses as dkl
from detr_kd_losses.taps import DistillationCriterion, ModelDistillation
from detr_kd_losses.taps.answered import add_terms

from support import lineage
from support.answering import Answering, distilled
from support.decoder_parts import images, targets
from support.engines import SetCriterion

TERMS = {"loss_kd_class": torch.tensor(2.0, requires_grad=True), "loss_kd_bbox": torch.tensor(3.0)}


def batch(seed: int = 0, **options: Any) -> dict[str, Any]:
    return {"images": images(seed=seed, **options), "targets": targets(seed=seed)}


def test_terms_are_those_of_a_criterion() -> None:
    student, _ = distilled()
    loss, logged = student(batch())
    other, teacher = Answering().train(), Answering(seed=1)
    criterion = DistillationCriterion(SetCriterion(), other.detector, teacher.detector)
    expected = criterion(other.detector(images(), targets()), targets())
    assert_close(logged, {name: term.detach() for name, term in expected.items()})
    assert_close(loss, torch.stack(list(expected.values())).sum())
    assert not any(term.requires_grad for term in logged.values())


def test_a_trainer_learns_the_student_and_the_projections() -> None:
    student, distillation = distilled(width=24)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    distillation.learn(optimizer)
    models = {
        "student": student,
        "features": distillation.distillation,
        "queries": distillation.query_projection,
    }
    before = {name: copy.deepcopy(model.state_dict()) for name, model in models.items()}
    taught = copy.deepcopy(distillation.teacher.module.state_dict())
    for seed in range(2):
        optimizer.zero_grad()
        student(batch(seed))[0].backward()
        optimizer.step()
    for name, model in models.items():
        assert any((tensor != before[name][key]).any() for key, tensor in model.state_dict().items()), name
    assert_close(dict(distillation.teacher.module.state_dict()), dict(taught), rtol=0, atol=0)


def test_copies_and_pickles_are_plain() -> None:
    student, _ = distilled()
    plain = Answering().train()
    student(batch())
    for other in (copy.deepcopy(student), pickle.loads(pickle.dumps(student))):
        assert not [part for part in other.modules() if part._forward_hooks or part._forward_pre_hooks]
        assert other(batch())[1].keys() == SetCriterion().weight_dict.keys()
    assert student.state_dict().keys() == plain.state_dict().keys()
    assert len(pickle.dumps(student)) == len(pickle.dumps(plain))


def test_evaluation_and_what_comes_after_are_as_ever() -> None:
    student, distillation = distilled()
    plain = Answering()
    samples = batch(size=lineage.EVAL_SIZE)
    assert_close(student.eval()(samples), plain.eval()(samples), rtol=0, atol=0)
    distillation.detach()
    assert student.train()(batch())[1].keys() == SetCriterion().weight_dict.keys()
    with pytest.raises(RuntimeError, match="ModelDistillation that was copied or detached"):
        distillation.check(lambda model: model(batch()))


def test_check(capsys: pytest.CaptureFixture[str]) -> None:
    _, distillation = distilled(width=24)
    assert distillation.check(lambda model: model(batch()), dkl.pad_targets(targets()))
    assert "teacher == student" in capsys.readouterr().out


def test_after_an_interruption() -> None:
    """A pass that raises leaves no hook of its own, and the next is read as ever."""
    student, _ = distilled()
    with pytest.raises(KeyError):
        student({"images": images()})
    hooks = [part for part in student.detector.modules() if part._forward_hooks or part._forward_pre_hooks]
    assert not hooks
    assert "loss_kd_class" in student(batch())[1]


def test_answers() -> None:
    """A loss; a loss and what is logged, or is none of our business; losses that are summed."""
    one = torch.tensor(1.0)
    assert add_terms(one, TERMS) == 6
    loss, logged, rest = add_terms((one, {"own": one}, [7]), TERMS)
    assert (loss, rest) == (6, [7])
    assert logged == {"own": 1, "loss_kd_class": 2, "loss_kd_bbox": 3}
    assert loss.requires_grad
    assert not logged["loss_kd_class"].requires_grad
    losses = add_terms({"own": one}, TERMS)
    assert losses == {"own": one, **TERMS}
    assert losses["loss_kd_class"].requires_grad


@pytest.mark.parametrize("answer", [[torch.tensor(1.0)], ({"own": 1},), (), None, "loss"])
def test_other_answers(answer: Any) -> None:
    with pytest.raises(TypeError, match="give `add`"):
        add_terms(answer, TERMS)


def test_answers_of_ones_own() -> None:
    student, _ = distilled()
    seen: list[Tensor] = []

    def add(answer: Any, terms: dict[str, Tensor]) -> Any:
        seen.extend(terms.values())
        return answer

    ModelDistillation(
        student,
        Answering(seed=1),
        read_targets=lambda batch: dkl.pad_targets(batch["targets"]),
        teacher_call=lambda teacher, batch: teacher(batch),
        add=add,
    )
    assert student(batch())[1].keys() == SetCriterion().weight_dict.keys()  # the second teacher replaces the first
    assert len(seen) == 7
