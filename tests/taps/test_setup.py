"""The check of a set-up: all right where it is, and each thing that can be wrong told by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import detr_kd_losses as dkl
from detr_kd_losses.taps import DistillationCriterion, QueryProjection, check_setup, coco_class_map, distillation_loss

from support import lineage, repositories
from support.decoder_parts import images, targets
from support.engines import SetCriterion
from support.repositories import NestedTensor

Call = Callable[[nn.Module], Any]


def run(model: nn.Module) -> Any:
    return model(images())


def lines(printed: str, mark: str = "WRONG") -> list[str]:
    return [line.split(maxsplit=1)[1] for line in printed.splitlines() if line.startswith(mark)]


@pytest.mark.parametrize("kind", [*lineage.DECODERS, *repositories.KINDS])
def test_what_is_right(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    if kind in lineage.DECODERS:
        models, call = [lineage.build(kind, seed=seed) for seed in range(2)], run
    else:
        models = [repositories.build(kind, seed=seed) for seed in range(2)]
        call = lambda model: model(NestedTensor(images(), padded=8))  # noqa: E731
    models[0].train()
    assert check_setup(*models, call, dkl.pad_targets(targets()))
    printed = capsys.readouterr().out
    assert lines(printed) == []
    for text in ("3 of 3 are read", "teacher == student", "run through the student's decoder"):
        assert text in printed
    assert models[0].training


def test_criterion_checks_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    """A wider and deeper teacher, with projections of features and queries."""
    student, teacher = lineage.build("v2"), lineage.build("d_fine", seed=1, width=24, number=4, queries=9)
    criterion = DistillationCriterion(SetCriterion(), student, teacher)
    assert criterion.check(run, targets())
    assert criterion.check(run)
    assert "4 of 4 are read" in capsys.readouterr().out
    assert criterion._said is None


def wrong_head(student: nn.Module, teacher: nn.Module) -> dict[str, Any]:
    return {"distillation": distillation_loss(student, teacher, teacher_activation="softmax")}


def wrong_map(student: nn.Module, teacher: nn.Module) -> dict[str, Any]:
    return {"distillation": distillation_loss(student, teacher, class_map=coco_class_map(91, 80))}


WRONG = {
    "teacher_activation": (wrong_head, {}, "softmax, the head is sigmoid"),
    "classes": (wrong_map, {}, "of which a map of 91 teaches 80"),
    "feature levels": (lambda *_: {"levels": ([0], [0, 1])}, {}, "1 and 2: choose those that correspond with `levels`"),
    "the teacher's queries": (lambda *_: {}, {"width": 24}, "map it with a QueryProjection"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    make, options, text = WRONG[what]
    student, teacher = lineage.build("v2"), lineage.build("v2", seed=1, **options)
    assert not check_setup(student, teacher, run, **make(student, teacher))
    (line,) = [line for line in lines(capsys.readouterr().out) if line.startswith(what)]
    assert text in line


def test_other_classes(capsys: pytest.CaptureFixture[str]) -> None:
    student, teacher = lineage.build("v2"), lineage.build("v2", seed=1)
    teacher.decoder.dec_score_head = nn.ModuleList(nn.Linear(16, 91) for _ in range(3))
    assert not check_setup(student, teacher, run)
    assert "5 and 91: give `class_map`" in capsys.readouterr().out


def test_targets_in_pixels(capsys: pytest.CaptureFixture[str]) -> None:
    student, teacher = lineage.build("v2"), lineage.build("v2", seed=1)
    pixels = [{**image, "boxes": 640 * image["boxes"]} for image in targets()]
    assert not check_setup(student, teacher, run, dkl.pad_targets(pixels))
    assert any(line.startswith("targets") and "`target_boxes` must" in line for line in lines(capsys.readouterr().out))


def test_targets_as_corners(capsys: pytest.CaptureFixture[str]) -> None:
    """All numbers are in [0, 1], and every box is another."""
    pair = lineage.build("v2"), lineage.build("v2", seed=1)
    corners = [{**image, "boxes": dkl.box_cxcywh_to_xyxy(image["boxes"])} for image in targets()]
    assert not check_setup(*pair, run, dkl.pad_targets(corners))
    assert any("would all be right as xyxy" in line for line in lines(capsys.readouterr().out))
    criterion = DistillationCriterion(SetCriterion(), *pair)
    with pytest.warns(
        UserWarning, match="first batch that has any: `target_boxes` must be cxcywh, got boxes that reach"
    ):
        criterion(pair[0].train()(images()), corners)


def test_boxes_in_pixels(capsys: pytest.CaptureFixture[str]) -> None:
    student, teacher = repositories.build("rf_detr"), repositories.build("rf_detr", seed=1)
    teacher.references.weight.data.fill_(0)
    teacher.bbox_embed.bias.data[:2] = 640.0
    assert not check_setup(student, teacher, lambda model: model(NestedTensor(images())))
    assert any(line.startswith("teacher: boxes") for line in lines(capsys.readouterr().out))


def test_a_decoder_that_forgets(capsys: pytest.CaptureFixture[str]) -> None:
    """One whose answer depends on more than what it is given does not replay."""
    student, teacher = lineage.build("v2"), lineage.build("v2", seed=1)
    teacher.decoder.decoder.layers[0].register_forward_hook(lambda _, __, output: output + torch.rand(1))
    assert not check_setup(student, teacher, run, query_projection=QueryProjection(student, teacher))
    assert any(line.startswith("teacher: own queries replayed") for line in lines(capsys.readouterr().out))
