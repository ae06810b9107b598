"""The toy detector of the examples: its data, its metric, its query groups, and a few steps of training."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import detr_kd_losses as dkl

pytest.importorskip("matplotlib", reason="the demo draws with matplotlib")
sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "toy_detector"))  # the demo runs as a script there

import draw
import runs
import shapes
import train
from average_precision import average_precision
from model import TinyDETR


def tiny_detector(num_queries: int, seed: int = 0) -> TinyDETR:
    """A detector whose weights are all random, in the heads too, so that everything depends on everything."""
    torch.manual_seed(seed)
    model = TinyDETR(
        num_classes=8, num_queries=num_queries, backbone_width=4, residual_blocks=1, encoder_layers=1, decoder_layers=2
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def perfect_predictions(targets: dkl.Targets) -> tuple[Tensor, Tensor]:
    """Logits and boxes that say the truth."""
    logits = torch.full((*targets.labels.shape, len(shapes.CLASSES)), -9.0)
    return torch.where(targets.mask[..., None], logits.scatter(2, targets.labels[..., None], 5.0), -9.0), targets.boxes


# -------------------------------------------------------------------------------------------------------------- data


def test_a_box_holds_exactly_the_pixels_of_its_object(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "draw_background", lambda _: np.full((shapes.SIZE, shapes.SIZE, 3), 0.5))
    monkeypatch.setattr(shapes, "NOISE", 0.0)
    generator = np.random.default_rng(0)
    seen = set()
    for _ in range(200):
        image, [label], [box] = shapes.draw_scene(generator, shapes.Layout(objects=(1, 1)))
        rows, columns = np.nonzero((image != int(0.5 * 255)).any(-1))
        centre, extent = np.array(box[:2]) * shapes.SIZE, np.array(box[2:]) * shapes.SIZE
        np.testing.assert_allclose(centre - extent / 2, [columns.min(), rows.min()], atol=1e-9)
        np.testing.assert_allclose(centre + extent / 2, [columns.max() + 1, rows.max() + 1], atol=1e-9)
        seen.add(label)
    assert seen == set(range(len(shapes.CLASSES)))


def test_the_same_seed_draws_the_same_images() -> None:
    first, again, other = (shapes.make_shapes.__wrapped__(5, seed) for seed in (0, 0, 1))
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.targets.boxes, again.targets.boxes)
    assert not torch.equal(first.images, other.images)


# ------------------------------------------------------------------------------------------------- average precision


def iou(box: list[float], other: list[float]) -> float:
    sides = [
        max(0.0, min(box[k] + box[k + 2] / 2, other[k] + other[k + 2] / 2)
            - max(box[k] - box[k + 2] / 2, other[k] - other[k + 2] / 2))
        for k in (0, 1)
    ]  # fmt: skip
    shared = sides[0] * sides[1]
    return shared / (box[2] * box[3] + other[2] * other[3] - shared)


def average_precision_by_loops(logits: Tensor, boxes: Tensor, targets: dkl.Targets, threshold: float) -> float:
    """COCO's definition for one IoU threshold, one detection after another."""
    values = []
    for label in range(logits.shape[-1]):
        truth = {
            image: [targets.boxes[image, t].tolist() for t in range(targets.mask.shape[1])
                    if targets.mask[image, t] and targets.labels[image, t] == label]
            for image in range(len(logits))
        }  # fmt: skip
        count = sum(len(found) for found in truth.values())
        if count == 0:
            continue
        detections = sorted(
            ((logits[i, n, label].item(), i, n) for i in range(len(logits)) for n in range(logits.shape[1])),
            reverse=True,
        )
        hits = []
        for _, image, query in detections:
            overlaps = [iou(boxes[image, query].tolist(), box) for box in truth[image]]
            hits.append(bool(overlaps) and max(overlaps) >= threshold)
            if hits[-1]:
                truth[image].pop(int(np.argmax(overlaps)))
        found = np.cumsum(hits)
        precision, recall = found / np.arange(1, len(hits) + 1), found / count
        at_least = [precision[recall >= r].max(initial=0.0) for r in np.arange(101) / 100]
        values.append(np.mean(at_least))
    return 100 * float(np.mean(values))


def test_perfect_predictions_have_an_average_precision_of_100() -> None:
    targets = shapes.make_shapes(30, 0).targets
    assert average_precision(*perfect_predictions(targets), targets) == pytest.approx((100.0, 100.0))


def test_average_precision_agrees_with_its_definition() -> None:
    targets = shapes.make_shapes(25, 0).targets
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(25, 3 * targets.boxes.shape[1], 4, generator=generator)
    boxes = (targets.boxes.repeat(1, 3, 1) + 0.02 * noise).clamp(0.01, 0.99)  # three guesses per object
    logits = torch.randn(*boxes.shape[:2], 8, generator=generator)
    logits = logits + 2 * torch.nn.functional.one_hot(targets.labels.repeat(1, 3), 8)
    expected = [average_precision_by_loops(logits, boxes, targets, 0.5 + k / 20) for k in range(10)]
    ap, ap50 = average_precision(logits, boxes, targets, detections_per_image=10_000)
    assert 10 < expected[0] < 90  # neither all right nor all wrong
    assert ap50 == pytest.approx(expected[0], abs=1e-6)
    assert ap == pytest.approx(np.mean(expected), abs=1e-6)


# ------------------------------------------------------------------------------------------------------ query groups


def test_the_teachers_queries_leave_the_students_outputs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = tiny_detector(num_queries=6), tiny_detector(num_queries=10, seed=1)
    images = shapes.make_shapes(3, 0).normalised()
    alone, together = student(images), student(images, teacher.own_group())
    assert together.group.logits.shape == (2, 3, 10, 8)
    for name in ("logits", "boxes", "queries"):
        torch.testing.assert_close(getattr(together, name), getattr(alone, name), rtol=1e-5, atol=1e-5)

    monkeypatch.setattr(dkl, "query_group_attention_mask", lambda sizes: torch.zeros(sum(sizes), sum(sizes)).bool())
    mixed = student(images, teacher.own_group())
    for name in ("logits", "boxes", "queries"):
        assert (getattr(mixed, name) - getattr(alone, name)).abs().max() > 1e-2


def test_the_query_group_teaches_the_student_and_not_the_teacher() -> None:
    student, teacher = tiny_detector(num_queries=6), tiny_detector(num_queries=10, seed=1)
    output = student(shapes.make_shapes(3, 0).normalised(), teacher.own_group())
    (output.group.logits.sum() + output.group.boxes.sum()).backward()
    assert student.decoder[0].self_attention.in_proj_weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in teacher.parameters())


# ---------------------------------------------------------------------------------------------------------- training


def few_steps(setting: str) -> tuple[TinyDETR, train.History]:
    data, validation = shapes.make_shapes(20, 0), shapes.make_shapes(10, 1)
    student = tiny_detector(num_queries=6)
    teacher = train.Teacher.from_model(tiny_detector(num_queries=10, seed=1), data)
    history = train.train(
        student,
        data,
        validation,
        steps=3,
        seed=0,
        **runs.prepare(setting, student, None if setting == runs.ALONE else teacher),
        batch_size=8,
        evaluations=1,
    )
    return student, history


@pytest.mark.parametrize("setting", runs.SETTINGS)
def test_three_steps_of_training(setting: str) -> None:
    student, history = few_steps(setting)
    assert history.steps == [3]
    assert 0 <= history.ap[0] <= history.ap50[0] <= 100
    assert all(bool(parameter.isfinite().all()) for parameter in student.parameters())
    if setting != runs.ALONE:  # a teacher changes what is learnt
        assert not torch.equal(student.queries, few_steps(runs.ALONE)[0].queries)


def test_training_depends_on_the_seed_alone() -> None:
    (first, _), (again, _) = few_steps(runs.RECOMMENDED), few_steps(runs.RECOMMENDED)
    for parameter, expected in zip(again.parameters(), first.parameters(), strict=True):
        assert torch.equal(parameter, expected)


def test_the_cached_teacher_is_the_teacher() -> None:
    data = shapes.make_shapes(20, 0)
    teacher = train.Teacher.from_model(tiny_detector(num_queries=10).eval(), data)
    indices = torch.tensor([17, 3, 11])
    cached, fresh = teacher.batch(indices), teacher.model(data.select(indices).normalised())
    for name in ("logits", "boxes", "queries", "features"):
        torch.testing.assert_close(getattr(cached, name), getattr(fresh, name), rtol=1e-4, atol=1e-4)


def test_every_image_comes_once_an_epoch() -> None:
    batches = train.endless_batches(10, 4, seed=0)
    for _ in range(2):
        assert sorted(torch.cat([next(batches) for _ in range(3)]).tolist()) == list(range(10))


# ----------------------------------------------------------------------------------------------------------- picture


def test_the_picture_says_what_came_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "STUDENT", runs.STUDENT | {"num_queries": 8})
    monkeypatch.setattr(draw, "STUDENT", runs.STUDENT)
    monkeypatch.setattr(draw, "validation_images", lambda: shapes.make_shapes(40, 1))
    monkeypatch.setattr(runs, "validation_images", lambda: shapes.make_shapes(40, 1))
    scale = runs.Scale(images=40, teacher_steps=1, student_steps=1)
    runs.train_teacher(tmp_path, scale, on_step=lambda: None)
    students = {
        setting: {0: runs.train_student(setting, 0, tmp_path, scale, on_step=lambda: None)}
        for setting in (runs.ALONE, runs.RECOMMENDED)
    }
    students[runs.ALONE][0].ap[-1], students[runs.RECOMMENDED][0].ap[-1] = 30.0, 20.0
    assert "-10.0 AP for the student, better on 0 of 1 seeds" in draw.headline(students)
    draw.draw_comparison(students, tmp_path, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
