"""Students of transformers in the experiments: they learn by their own loss, and are read as the small detector is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="the students are models of transformers")

from experiments import modern, rows, run, tables, training, worlds
from experiments.settings import SETTINGS

KIND = {"width": 16, "layers": 2, "queries": 6, "backbone": [8, 16, 16]}
FAMILIES = {"RT-DETR": tables.MODERN[:7], "D-FINE": tables.MODERN}


@pytest.fixture(params=FAMILIES)
def world(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A few images and a teacher of one step."""
    recipe = worlds.Recipe(KIND | {"queries": 10}, steps=1)
    small = worlds.WORLDS[request.param]._replace(images=16, teachers={"teacher": recipe}, student=KIND)
    monkeypatch.setitem(worlds.WORLDS, request.param, small)
    monkeypatch.setattr(modern, "VALIDATION", (4, 1))
    monkeypatch.setattr(modern, "TEST", (4, 2))
    monkeypatch.setattr(modern, "BATCH_SIZE", 4)
    worlds.all_images.cache_clear()
    yield request.param
    worlds.all_images.cache_clear()


def test_two_steps_of_every_setting(world: str, tmp_path: Path) -> None:
    which = training.TeacherOf(world, "teacher")
    row = run.trainer_of(which)(which, tmp_path, lambda: None)
    assert training.teacher_file(*which, tmp_path).exists()
    assert row["seconds"] > 0
    for setting in FAMILIES[world]:
        job = rows.Run(world, setting, 2, 0)
        row = run.trainer_of(job)(job, tmp_path, lambda: None)
        assert json.loads(json.dumps(row)) == row
        assert rows.run_of(row) == job
        assert 0 <= row["ap"] <= row["ap50"] <= 100
        assert (row["teacher"] is None) == (setting == "alone")


def test_terms_join_the_models_own_loss(world: str) -> None:
    """Which has denoising queries: its loss is that of the model, whatever is distilled."""
    torch.manual_seed(0)
    student, teacher = (modern.build(world, KIND | {"queries": queries}) for queries in (6, 10))
    batch = worlds.training_images(world).select(torch.arange(4))
    images = modern.enlarged(batch.normalised())
    said = modern.say(teacher, images)
    setting = SETTINGS["best queries + features, decayed"]
    for weight in (0.0, 1.0):
        criterion = modern.dkl.DETRDistillationLoss({name: part.make() for name, part in setting.parts.items()})
        for term in criterion.terms.values():
            term.weight *= weight
        losses = []
        for tap in (None, said):
            torch.manual_seed(1)  # noise of the denoising queries
            losses.append(modern.step_loss(student.train(), images, batch, tap, criterion, modern.share_of(setting)))
        assert (losses[0] == losses[1]) == (weight == 0)
        assert all(loss.isfinite() for loss in losses)


def test_a_student_begins_with_the_decoder_of_its_teacher(
    world: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = modern.build(world, KIND | {"queries": 10})
    training.keep_teacher(training.TeacherOf(world, "teacher"), tmp_path, teacher, {"ap": 0.0})
    seen = []

    def stop(model: torch.nn.Module, *_: object) -> None:
        seen.append(model)
        raise InterruptedError

    monkeypatch.setattr(modern, "train", stop)
    with pytest.raises(InterruptedError):
        modern.train_student(rows.Run(world, "teacher's decoder at the beginning", 1, 0), tmp_path, lambda: None)
    (student,) = seen
    own, others = student.state_dict(), teacher.state_dict()
    assert all(torch.equal(own[name], others[name]) for name in own if name.startswith("model.decoder.layers"))
    assert not all(torch.equal(own[name], others[name]) for name in own if name.startswith("model.backbone"))


def test_other_changes_of_the_teacher_are_refused() -> None:
    with pytest.raises(ValueError, match="no other change is made for these models"):
        modern.share_of(SETTINGS["random queries, decayed"])
