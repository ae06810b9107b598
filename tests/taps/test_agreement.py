"""Whether student, teacher and losses mean the same: told of when they are put together, not after hours."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import detr_kd_losses as dkl
from detr_kd_losses.taps import DistillationCriterion, check_setup, coco_class_map, distillation_loss, match_classes

from support import lineage, repositories
from support.decoder_parts import images, targets
from support.engines import SetCriterion

NAMES = ("person", "car", "dog", "cat", "bird")
SHUFFLED = ("dog", "person", "car", "bird", "cat")


def models(student: Any, teacher: Any) -> list[nn.Module]:
    pair = [lineage.build("v2", seed=seed) for seed in range(2)]
    for model, names in zip(pair, (student, teacher), strict=True):
        model.names = names
    return pair


MAKERS = {
    "distillation_loss": distillation_loss,
    "DistillationCriterion": lambda *pair: DistillationCriterion(SetCriterion(), *pair),
    "a loss of one's own": lambda *pair: DistillationCriterion(
        SetCriterion(), *pair, distillation=dkl.DETRDistillationLoss()
    ),
}


@pytest.mark.parametrize("make", MAKERS)
def test_the_same_classes_in_another_order_are_refused_with_the_map(make: str) -> None:
    """The names of an Ultralytics model are a dict or a list."""
    pair = models(list(SHUFFLED), dict(enumerate(NAMES)))
    with pytest.raises(ValueError, match=r"same order.*match_classes\(student, teacher\).*map \[1, 2, 0, 4, 3\]"):
        MAKERS[make](*pair)
    assert match_classes(*pair) == [1, 2, 0, 4, 3]
    assert distillation_loss(*pair, class_map=match_classes(*pair)).class_map.tolist() == [1, 2, 0, 4, 3]


@pytest.mark.parametrize("placeholders", [None, {k: str(k) for k in range(5)}, [f"class{k}" for k in range(5)]])
def test_what_is_no_name_is_not_compared(placeholders: Any) -> None:
    assert distillation_loss(*models(placeholders, NAMES)).class_map is None
    with pytest.raises(ValueError, match=r"must have names, in `config.id2label` or `names`.*\(without names\)"):
        match_classes(*models(placeholders, NAMES))


def test_the_check_of_a_set_up_compares_names(capsys: pytest.CaptureFixture[str]) -> None:
    pair = models(SHUFFLED, NAMES)
    assert not check_setup(*pair, lambda model: model(images()), distillation=dkl.DETRDistillationLoss())
    assert "WRONG classes" in " ".join(capsys.readouterr().out.split())
    nobody = dkl.DETRDistillationLoss(class_map=[-1] * 5)
    assert not check_setup(*pair, lambda model: model(images()), distillation=nobody)
    assert "of which a map of 5 teaches 0" in capsys.readouterr().out


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_head_that_a_model_does_not_have(side: str) -> None:
    heads = dict.fromkeys(("student_activation", "teacher_activation"), "softmax") | {f"{side}_activation": "sigmoid"}
    loss = dkl.DETRDistillationLoss([dkl.LogitsTerm()], **heads)
    pair = [repositories.build("detr", seed=seed) for seed in range(2)]
    with pytest.raises(ValueError, match=rf"{side}_activation='softmax' for a Detr, got 'sigmoid'.*afterwards"):
        DistillationCriterion(SetCriterion(), *pair, distillation=loss)


@pytest.mark.parametrize("levels", [[0, 1], ([0], [0, 1]), (None, [0]), ([0], [0], [0]), 1, ([], []), (["0"], ["1"])])
def test_levels_that_are_no_pairs(levels: Any) -> None:
    with pytest.raises(ValueError, match="`levels` must be those of the student and those of the teacher, as many"):
        DistillationCriterion(SetCriterion(), *models(None, None), levels=levels)


@pytest.mark.parametrize("share", [0, -0.5, 30, float("nan")])
def test_a_share_of_the_queries_is_one(share: float) -> None:
    with pytest.raises(ValueError, match=f"`group_share` must be .*, got {share}"):
        DistillationCriterion(SetCriterion(), *models(None, None), group_share=share)


def test_other_things_in_place_of_models_losses_and_targets() -> None:
    student, teacher = models(None, None)
    with pytest.raises(TypeError, match="`teacher` must be a Module, got FrozenTeacher: pass the model itself"):
        DistillationCriterion(SetCriterion(), student, dkl.FrozenTeacher(teacher))
    with pytest.raises(TypeError, match=r"`distillation` must be a DETRDistillationLoss, got list: pass"):
        DistillationCriterion(SetCriterion(), student, teacher, distillation=[dkl.LogitsTerm()])
    with pytest.raises(TypeError, match=r"`targets` must be a Targets, got list: pass pad_targets\(targets\)"):
        check_setup(student, teacher, lambda model: model(images()), targets())


@pytest.mark.parametrize(("student", "teacher"), [(80, 91), (91, 80), (90, 80)])
def test_heads_for_coco_teach_each_other_by_the_map(student: int, teacher: int) -> None:
    """A class of the teacher's is learned in the student's place for it, and in no other."""
    class_map = coco_class_map(teacher, student)
    taught = class_map.index(17 if student == 80 else 18)  # a horse
    say = torch.full((1, 1, 1, teacher), -20.0)
    say[..., taught] = 20.0
    expected = torch.full((1, 1, 1, student), -20.0)
    expected[..., 17 if student == 80 else 18] = 20.0
    box = torch.full((1, 1, 1, 4), 0.5)
    loss = dkl.DETRDistillationLoss([dkl.LogitsTerm()], class_map=class_map)
    truth = dkl.pad_targets([{"labels": torch.tensor([17 if student == 80 else 18]), "boxes": box[0, 0]}])
    terms = loss(dkl.DetectorOutput(expected, box), dkl.DetectorOutput(say, box), truth)
    assert terms["loss_kd_class"].item() < 1e-6
    wrong = loss(dkl.DetectorOutput(expected.roll(1, -1), box), dkl.DetectorOutput(say, box), truth)
    assert wrong["loss_kd_class"].item() > 1


@pytest.mark.parametrize("class_map", [{0: 1, 1: 0}, ["dog", "cat"], [[0], [1, 2]]])
def test_a_class_map_that_is_no_sequence_of_numbers(class_map: Any) -> None:
    with pytest.raises(ValueError, match="`class_map` must be a sequence of class numbers, -1 = dropped, got"):
        dkl.DETRDistillationLoss(class_map=class_map)


@pytest.mark.parametrize("number", ["int32", "float", "pixels", "fewer images", "no list"])
def test_targets_of_another_kind_are_named(number: str) -> None:
    criterion = DistillationCriterion(SetCriterion(), *models(None, None))
    criterion.criterion.forward = lambda outputs, targets: {}
    right = targets()
    given, message = {
        "int32": ([{**one, "labels": one["labels"].int()} for one in right], r"targets\[0\]\['labels'\].*int64"),
        "float": ([{**one, "labels": one["labels"].float()} for one in right], r"targets\[0\]\['labels'\].*int64"),
        "pixels": ([{**one, "boxes": one["boxes"].long()} for one in right], r"targets\[0\]\['boxes'\].*floating"),
        "fewer images": (right[:1], r"`target_labels` must have the batch dimensions"),
        "no list": ({"labels": right}, r"`targets\[0\]` must be a mapping with 'labels' and 'boxes', got str"),
    }[number]
    (student,) = criterion._student
    with pytest.raises((TypeError, ValueError), match=message):
        criterion(student.train()(images()), given)


@pytest.mark.parametrize("collate", [tuple, lambda images: [{"class_labels": x["labels"], **x} for x in images]])
def test_targets_as_collators_leave_them(collate: Any) -> None:
    """DETR's makes a tuple; transformers has another name for labels."""
    criterion = DistillationCriterion(SetCriterion(), *models(None, None))
    (student,) = criterion._student
    losses = [criterion(student.train()(x=images()), given) for given in (targets(), collate(targets()))]
    assert losses[0]["loss_kd_class"] == losses[1]["loss_kd_class"]


@pytest.mark.parametrize("preset", ["paper", "official", "recommended"])
def test_every_preset_gets_a_projection_between_widths(preset: Any) -> None:
    wide, narrow = lineage.build("v2"), lineage.build("v2", seed=1, width=24)
    projected = distillation_loss(narrow, wide, terms=preset)
    assert projected.names == dkl.DETRDistillationLoss(preset).names
    assert {tuple(weight.shape[:2]) for weight in projected.parameters() if weight.ndim == 4} == {(lineage.WIDTH, 24)}
    assert not list(distillation_loss(wide, lineage.build("v2", seed=1), terms=preset).parameters())


def test_an_unknown_preset_is_named() -> None:
    with pytest.raises(ValueError, match=r"`preset` must be one of .*'recommended', got 'best'"):
        distillation_loss(lineage.build("v2"), lineage.build("v2", seed=1), terms="best")
