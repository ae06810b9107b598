"""Default dtypes, determinism, autocast, gradient scaling and function transforms of torch."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import detr_kd_losses as dkl
from detr_kd_losses.testing.steps import make_output, make_step

from support.steps import loss_and_gradients

PRESETS = ("official", "paper")


@pytest.fixture
def float64_by_default():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_default_dtype_does_not_matter(preset, float64_by_default):
    losses, gradients = loss_and_gradients(*make_step(dtype=torch.float32), preset)
    torch.set_default_dtype(torch.float32)
    assert_close((losses, gradients), loss_and_gradients(*make_step(dtype=torch.float32), preset), rtol=0, atol=0)


@pytest.fixture
def deterministic_algorithms():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("preset", PRESETS)
def test_deterministic_mode(preset, deterministic_algorithms):
    first, second = (loss_and_gradients(*make_step(), preset) for _ in range(2))
    assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("preset", PRESETS)
def test_autocast_changes_nothing(preset, dtype):
    batch = make_step()
    expected = loss_and_gradients(*batch, preset)
    with torch.autocast("cpu", dtype):
        actual = loss_and_gradients(*batch, preset)
    assert_close(actual, expected)


def test_grad_scaler():
    """Scaled half-precision gradients are the float32 ones times the scale, and the step is taken."""
    student, teacher, targets = make_step(dtype=torch.float16)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    logits = nn.Parameter(student.logits.float())
    before = logits.detach().clone()
    optimizer = torch.optim.SGD([logits], lr=0.1)
    criterion = dkl.DETRDistillationLoss("official")
    loss = sum(criterion(student._replace(logits=logits.half()), teacher, targets).values())
    scaler.scale(loss).backward()
    plain = student._replace(logits=student.logits.float())
    _, gradients = loss_and_gradients(plain, teacher, targets, "official")
    assert_close(logits.grad / 2**10, gradients["logits"], rtol=1e-3, atol=1e-6)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**10
    assert not torch.equal(logits, before)


def test_vmap_over_students():
    """An ensemble of students under one teacher, and their gradients, in one call."""
    students = [make_output(seed=seed) for seed in range(3)]
    teacher = make_output(seed=9, queries=6)
    assignment = dkl.match_teacher(students[0].logits, students[0].boxes, teacher.logits, teacher.boxes)

    def loss(logits, boxes):
        terms = dkl.hungarian_distillation_loss(logits, boxes, teacher.logits, teacher.boxes, assignment)
        return sum(terms.values())

    logits, boxes = (torch.stack([student[field] for student in students]) for field in (0, 1))
    each = torch.func.grad(loss, argnums=(0, 1))
    expected = [each(student.logits, student.boxes) for student in students]
    for together, separate in zip(torch.func.vmap(each)(logits, boxes), zip(*expected, strict=True), strict=True):
        assert_close(together, torch.stack(separate))
    overlaps = torch.func.vmap(dkl.paired_box_iou)(boxes, boxes.flip(0))
    assert_close(overlaps, dkl.paired_box_iou(boxes, boxes.flip(0)))


@pytest.mark.parametrize("variant", PRESETS)
def test_jacobian_of_the_feature_loss(variant):
    """Many gradients in one backward pass, each of another loss: those of the losses one by one."""
    output, teacher = make_output(seed=0), make_output(seed=9)
    quality = torch.ones(teacher.queries.shape[:-1])

    def losses(features):
        each = (
            dkl.target_aware_feature_loss(features, teacher.features + shift, teacher.queries, quality, variant=variant)
            for shift in (0.0, 0.5, 1.0)
        )
        return torch.stack(list(each))

    features = output.features.clone().requires_grad_()
    expected = torch.stack([torch.autograd.grad(losses(features)[index], features)[0] for index in range(3)])
    assert_close(torch.func.jacrev(losses)(output.features), expected)
    (batched,) = torch.autograd.grad(losses(features), features, torch.eye(3), is_grads_batched=True)
    assert_close(batched, expected)


@pytest.mark.parametrize("variant", PRESETS)
def test_vmap_of_the_feature_loss(variant):
    students = torch.stack([make_output(seed=seed).features for seed in range(3)])
    teacher = make_output(seed=9)
    quality = torch.ones(teacher.queries.shape[:-1])

    def loss(features):
        return dkl.target_aware_feature_loss(features, teacher.features, teacher.queries, quality, variant=variant)

    assert_close(torch.func.vmap(loss)(students), torch.stack([loss(student) for student in students]))
    gradients = torch.stack([torch.func.grad(loss)(student) for student in students])
    assert_close(torch.func.vmap(torch.func.grad(loss))(students), gradients)
