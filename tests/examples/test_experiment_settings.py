"""What the experiments compare: labels, data sets, settings, controls, and the logits loss taken apart."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import detr_kd_losses as dkl
from experiments import crowds, digits, directions, probes, rows, tables, training, worlds
from experiments.settings import RECOMMENDED, SETTINGS, Setting

from support.small_world import RUN, SMALL

import model  # isort: skip  (of the toy detector, which `experiments` finds)
import train  # isort: skip


# ------------------------------------------------------------------------------------------------------------- labels


def some_targets(images: int = 300) -> dkl.Targets:
    return worlds.DATA_SETS["shapes"].draw(images, 0).targets


def test_noise_of_labels_is_of_the_size_that_it_says() -> None:
    exact = some_targets()
    noisy = worlds.with_noise(exact, worlds.LabelNoise(shift=0.08, resize=0.1, missing=0.2), seed=0)
    centre, extent = exact.boxes.split(2, -1)
    inside = ((centre - extent > 0) & (centre + extent < 1)).all(-1) & exact.mask  # not cut at the border
    moved = ((noisy.boxes[..., :2] - centre) / extent)[inside]
    resized = (noisy.boxes[..., 2:] / extent)[inside].log()
    assert moved.std().item() == pytest.approx(0.08, rel=0.1)
    assert resized.std().item() == pytest.approx(0.1, rel=0.1)
    assert (noisy.mask.sum() / exact.mask.sum()).item() == pytest.approx(0.8, abs=0.05)
    assert not (noisy.mask & ~exact.mask).any()


def test_no_noise_leaves_labels_alone_and_noise_is_the_same_each_time() -> None:
    exact, noise = some_targets(), worlds.LabelNoise(0.1, 0.1, 0.5)
    unchanged = worlds.with_noise(exact, worlds.LabelNoise(), seed=0)
    torch.testing.assert_close(unchanged.boxes, exact.boxes, rtol=0, atol=1e-6)
    assert torch.equal(unchanged.mask, exact.mask)
    first, again = (worlds.with_noise(exact, noise, seed=0) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))


def test_unlabelled_images_are_not_trained_on_unless_the_teacher_labels_them(
    small_world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = training.ready_teacher("demo", "teacher", small_world)
    monkeypatch.setitem(worlds.WORLDS, "demo", worlds.WORLDS["demo"]._replace(labelled=5))
    worlds.all_images.cache_clear()
    assert len(worlds.training_images("demo")) == 5
    everything = worlds.all_images("demo")
    assert everything.targets.mask.any(1).tolist() == [True] * 5 + [False] * 15
    teacher.outputs.logits[-1, 19, 3, 2] = 9.0  # sure of one object in the last image
    labelled = SETTINGS["teacher's boxes too"].labels(worlds.training_images("demo"), everything, teacher)
    assert labelled.targets.labels[19][labelled.targets.mask[19]].tolist() == [2]
    assert labelled.targets.mask[:5].sum() == everything.targets.mask[:5].sum()


# ---------------------------------------------------------------------------------------------------------- data sets


def test_crowds_are_small_many_and_of_common_and_rare_classes() -> None:
    drawn = worlds.DATA_SETS["crowds"].draw(200, 0)
    sides = drawn.targets.boxes[drawn.targets.mask][:, 2:].prod(-1).sqrt() * 64
    assert 4 < sides.min() < sides.max() < 14
    assert drawn.targets.mask.sum(1).max() == 12
    counts = torch.bincount(drawn.targets.labels[drawn.targets.mask], minlength=8) / drawn.targets.mask.sum()
    torch.testing.assert_close(counts.double(), torch.tensor(crowds.FREQUENCIES).double(), rtol=0, atol=0.03)


def test_no_digit_is_in_two_parts_and_a_box_holds_the_ink() -> None:
    pytest.importorskip("sklearn", reason="the digits are those of scikit-learn")
    parts = [{digit.tobytes() for digit in digits.digits_of(seed)[0]} for seed in range(3)]
    assert [len(part) for part in parts] == [899, 449, 449]
    assert not parts[0] & parts[1] | parts[0] & parts[2] | parts[1] & parts[2]
    drawn = worlds.DATA_SETS["digits"].draw(50, 2)
    assert drawn.targets.labels[drawn.targets.mask].unique().tolist() == list(range(10))
    digit = np.zeros((8, 8))
    digit[1:7, 2:5] = 1.0
    ink = digits.ink_of(digit, np.array([10.0, 20.0, 22.0, 50.0]))
    np.testing.assert_array_equal(np.argwhere(ink > digits.INK).min(0), [20, 10])
    np.testing.assert_array_equal(np.argwhere(ink > digits.INK).max(0), [49, 21])


# ----------------------------------------------------------------------------------------------------------- settings


def shape_of(setting: Setting) -> tuple[object, ...]:
    """Return what a setting is, but for the weights of its terms."""
    terms = (
        (name, part.make.func, frozenset(option for option in part.make.keywords.items() if option[0] != "weight"))
        for name, part in setting.parts.items()
    )
    schedules = tuple(part.schedule for part in setting.parts.values())
    return (tuple(terms), schedules, *setting[1:-1], tuple(setting.shares.items()))


ONE_OF_EACH_SHAPE = {shape_of(setting): name for name, setting in SETTINGS.items() if "distributions" not in name}


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_setting_has_terms_of_valid_options(setting: str) -> None:
    terms = {name: part.make() for name, part in SETTINGS[setting].parts.items()}
    assert all(term.weight > 0 for term in terms.values())


@pytest.mark.parametrize("setting", ONE_OF_EACH_SHAPE.values())
def test_three_steps_of_one_setting_of_each_shape(setting: str, small_world: Path) -> None:
    row = training.train_student(RUN._replace(setting=setting), small_world, on_step=lambda: None)
    assert json.loads(json.dumps(row)) == row
    assert rows.run_of(row) == RUN._replace(setting=setting)
    assert 0 <= row["ap"] <= row["ap50"] <= 100
    assert (row["teacher"] is None) == (not SETTINGS[setting].needs_teacher)
    terms = set(SETTINGS[setting].parts)
    assert (
        set(row["gradients"]["norms"])
        == set(row["gradients"]["cosines"])
        == ({"detection"} | terms if terms else set())
    )


def test_cosines_between_terms_and_changes_of_the_matching(small_world: Path) -> None:
    row = training.train_student(RUN._replace(setting="paper", steps=40), small_world, on_step=lambda: None)
    pairs = row["gradients"]["between"]
    assert set(pairs) == {"logits, feature", "logits, query_group", "feature, query_group"}
    assert all(len(values) == len(row["gradients"]["steps"]) for values in pairs.values())
    assert all(-1 <= value <= 1 for values in pairs.values() for value in values)
    assert [step for step, _ in row["instability"]] == list(range(4, 41, 2))
    assert all(0 <= share <= 1 for _, share in row["instability"])
    assert any(share > 0 for _, share in row["instability"])


def test_a_student_begins_with_the_queries_of_its_teacher(small_world: Path) -> None:
    teacher = training.ready_teacher("demo", "teacher", small_world)
    student = training.detector("demo", SMALL)
    SETTINGS["teacher's queries at the beginning"].begin(student, teacher)
    assert torch.equal(student.queries, teacher.model.queries[: SMALL["num_queries"]])
    assert torch.equal(student.anchors, teacher.model.anchors[: SMALL["num_queries"]])


def test_every_setting_of_a_table_is_known() -> None:
    assert {setting for table in tables.TABLES.values() for setting in table.settings} <= set(SETTINGS)
    assert {table.world for table in tables.TABLES.values()} <= set(worlds.WORLDS)


def test_weights_follow_their_schedules() -> None:
    parts = SETTINGS["shared queries in the first half + features, decayed"].parts
    criterion = dkl.DETRDistillationLoss({name: part.make() for name, part in parts.items()})
    schedule = training.weight_schedule(criterion, parts)
    seen = []
    for progress in (0.0, 0.5, 0.75, 0.0):
        schedule.update(progress)
        seen.append((criterion.terms["shared"].weight, round(criterion.terms["feature"].weight, 3)))
    assert seen == [(1.0, 20.0), (0.0, 10.0), (0.0, 2.929), (1.0, 20.0)]


def test_the_recommended_preset_is_what_was_measured() -> None:
    """Terms, options and weights all along the training: a row says nothing of another preset."""
    parts = SETTINGS[RECOMMENDED].parts
    measured = dkl.DETRDistillationLoss({name: part.make() for name, part in parts.items()})
    preset = dkl.DETRDistillationLoss("recommended")
    schedules = training.weight_schedule(measured, parts), dkl.WeightSchedule(preset)
    for progress in (0.0, 0.2, 0.49, 0.5, 0.8, 1.0):
        for schedule in schedules:
            schedule.update(progress)
        by_kind = [{type(term): term.options for term in loss.terms.values()} for loss in (measured, preset)]
        assert by_kind[0] == by_kind[1]


def test_gradients_are_watched_as_one_vector(small_world: Path) -> None:
    student = training.detector("demo", SMALL)
    loss = student.queries.sum()
    expected = torch.cat([torch.full_like(p, float(p is student.queries)).flatten() for p in student.parameters()])
    assert torch.equal(training.gradient(loss, student), expected)
    assert torch.equal(training.gradient(torch.zeros(()), student), torch.zeros_like(expected))
    seen: dict = {"steps": [], "norms": {}, "cosines": {}}
    criterion = dkl.DETRDistillationLoss([dkl.LogitsTerm()])
    watch = training.gradient_watcher(student, criterion, steps=100, seen=seen)
    losses = train.Losses(3 * loss, {"loss_kd_class": -loss, "loss_kd_bbox": -loss})
    for step in (1, 2):  # the latter is two percent of the steps
        watch(step, losses)
    length = expected.norm().item()
    assert seen["steps"] == [2]
    assert seen["norms"] == {
        "detection": [pytest.approx(3 * length, rel=1e-4)],
        "logits": [pytest.approx(2 * length, rel=1e-4)],
    }
    assert seen["cosines"] == {"detection": [pytest.approx(1.0)], "logits": [pytest.approx(-1.0)]}


def test_other_images_are_shown_and_own_queries_are_sent(small_world: Path) -> None:
    teacher = training.ready_teacher("demo", "teacher", small_world)
    shown = SETTINGS["logits of other images, decayed"].change(teacher, {})
    assert torch.equal(shown.batch(torch.tensor([0])).logits, teacher.batch(torch.tensor([10])).logits)
    assert torch.equal(shown.batch(torch.tensor([0])).features, teacher.batch(torch.tensor([0])).features)
    term = SETTINGS["own group"].parts["own_group"].make()
    group = SETTINGS["own group"].change(teacher, {"own_group": term}).group()
    assert group.queries is term.queries


def test_random_queries_are_new_in_each_step_and_go_through_both_decoders(small_world: Path) -> None:
    teacher = SETTINGS["random queries, decayed"].change(training.ready_teacher("demo", "teacher", small_world), {})
    indices = torch.tensor([3, 7])
    first = teacher.batch(indices)
    sent = teacher.group()
    boxes, logits, _ = teacher.model.decode(first.features, *sent)
    torch.testing.assert_close(first.group.logits, logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(first.group.boxes, boxes, rtol=1e-5, atol=1e-5)
    assert not torch.equal(teacher.batch(indices).group.boxes, first.group.boxes)


def test_the_best_queries_are_asked_as_if_they_were_alone(small_world: Path) -> None:
    teacher = SETTINGS["best queries + features, decayed"].change(
        training.ready_teacher("demo", "teacher", small_world), {}
    )
    indices = torch.tensor([3, 7])
    surest = teacher.batch(indices).logits[-1].amax(-1).topk(3).indices  # a quarter of 10, rounded up
    assert torch.equal(teacher.group().index, surest)
    student = training.detector("demo", SMALL).eval()
    images = worlds.all_images("demo").select(indices).normalised()
    together = student(images, teacher.group())
    for image in range(2):
        own = model.Group(teacher.model.queries[surest[image]], teacher.model.anchors[surest[image]])
        alone = student(images[image : image + 1], own)
        torch.testing.assert_close(together.group.boxes[:, image], alone.group.boxes[:, 0], rtol=1e-5, atol=1e-5)
    assert torch.equal(together.group_index, surest)


# ------------------------------------------------------------------------------------------------------------- probes


def a_step() -> dkl.Step:
    """Two images of one and two objects; a teacher of two layers and four queries, a student of three queries."""
    generator = torch.Generator().manual_seed(0)

    def predictions(queries: int) -> tuple[Tensor, Tensor]:
        boxes = 0.2 + 0.5 * torch.rand(2, 2, queries, 4, generator=generator)
        return torch.randn(2, 2, queries, 3, generator=generator), boxes

    mask = torch.tensor([[True, False], [True, True]])
    targets = dkl.Targets(torch.tensor([[2, 0], [1, 0]]), torch.rand(2, 2, 4, generator=generator), mask)
    return dkl.Step(dkl.DetectorOutput(*predictions(3)), dkl.DetectorOutput(*predictions(4)), targets)


def test_a_true_teacher_differs_at_its_positives_alone_and_there_tells_the_truth() -> None:
    step = a_step()
    _, boxes = probes.TrueBoxesTerm().shown(step)
    _, classes = probes.TrueClassesTerm().shown(step)
    positives = 0
    for place, target in np.ndenumerate(step.teacher_assignment.numpy()):
        image = place[1]
        if target < 0:
            assert torch.equal(boxes.boxes[place], step.teacher.boxes[place])
            assert torch.equal(classes.logits[place], step.teacher.logits[place])
        else:
            positives += 1
            assert torch.equal(boxes.boxes[place], step.targets.boxes[image, target])
            label = int(step.targets.labels[image, target])
            assert classes.logits[place].tolist() == [6.0 if k == label else -6.0 for k in range(3)]
    assert positives == 6
    assert torch.equal(boxes.logits, step.teacher.logits)
    assert torch.equal(classes.boxes, step.teacher.boxes)


def test_the_last_layers_term_is_the_logits_term_of_the_last_layers() -> None:
    step = a_step()
    found = probes.LastLayerTerm().compute(step)
    last = [dkl.DetectorOutput(output.logits[1:], output.boxes[1:]) for output in (step.student, step.teacher)]
    expected = dkl.LogitsTerm().compute(dkl.Step(*last, step.targets))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


def test_true_boxes_pull_where_the_boxes_of_the_detection_loss_do(
    small_world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directions, "BATCHES", 2)
    monkeypatch.setattr(directions, "BATCH", 8)
    torch.manual_seed(0)
    student = training.detector("demo", SMALL)
    teacher = training.ready_teacher("demo", "teacher", small_world)
    found = directions.directions(student, teacher, worlds.training_images("demo"))
    assert set(directions.ASKED) < set(found)
    assert all(length > 0 for length, *_ in found.values())
    assert found["true boxes"][3] > 0.9 > found["boxes, through targets"][3]  # this teacher knows nothing
