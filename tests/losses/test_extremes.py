"""Logits at the ends of their range: what is certain costs nothing, and nothing is NaN."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.testing import assert_close

import detr_kd_losses as dkl

INF = float("inf")
HEADS = list(itertools.product(["sigmoid", "softmax"], repeat=2))
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
BOXES = torch.tensor([[0.4, 0.5, 0.3, 0.2], [0.6, 0.5, 0.3, 0.2], [0.5, 0.4, 0.3, 0.3], [0.3, 0.3, 0.2, 0.2]])


def certain(activation, size, dtype):
    """Four queries: certain of a class each, the last one of no object; a softmax head has a channel for it."""
    classes = 3 + (activation == "softmax")
    logits = torch.full((4, classes), -size).masked_fill(torch.eye(4, classes).bool(), size)
    return logits.to(dtype)


def distil(student, teacher, heads, **options):
    student = student.detach().clone().requires_grad_()
    losses = dkl.hungarian_distillation_loss(
        student[None],
        BOXES[None],
        teacher[None],
        BOXES[None],
        torch.arange(4)[None],
        student_activation=heads[0],
        teacher_activation=heads[1],
        **options,
    )
    (gradient,) = torch.autograd.grad(losses["loss_class"], student)
    return losses["loss_class"].detach(), gradient


@pytest.mark.parametrize("class_map", [None, [0, 1, 2], [2, 1, 0], [0, -1, 2], [1, 1, 1]], ids=str)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 20.0])
@pytest.mark.parametrize("size", [50.0, 1e4, 6e4])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS, ids=" of ".join)
def test_distillation_of_certainty_is_finite(heads, dtype, size, temperature, class_map):
    student, teacher = certain(heads[0], size, dtype), certain(heads[1], size, dtype)
    for classes in ("kl", "bce") if heads[0] == "sigmoid" else ("kl",):
        for one, other in ((student, teacher), (-student, teacher), (student, -teacher), (0 * student, teacher)):
            value, gradient = distil(
                one, other, heads, temperature=temperature, class_map=class_map, class_loss=classes
            )
            assert value.isfinite()
            assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
@pytest.mark.parametrize("class_loss", ["kl", "bce"])
def test_a_class_that_both_rule_out_costs_nothing(class_loss, activation, dtype):
    """A logit of minus infinity, as a mask of classes writes it, is the limit of a low one: 0 log 0 is 0."""
    if (class_loss, activation) == ("bce", "softmax"):
        return
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(4, 4, generator=generator).to(dtype) for _ in range(2))
    low = student.clone(), teacher.clone()
    for logits, value in ((student, -INF), (teacher, -INF), (low[0], -1e4), (low[1], -1e4)):
        logits[:, 1] = value
    heads = activation, activation
    value, gradient = distil(student, teacher, heads, class_loss=class_loss)
    assert gradient.isfinite().all()
    assert_close((value, gradient), distil(*low, heads, class_loss=class_loss))
    cost = {"student_activation": activation, "teacher_activation": activation}
    costs = [dkl.distillation_cost(one, BOXES, other, BOXES, **cost) for one, other in ((student, teacher), low)]
    assert_close(*costs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("heads", HEADS, ids=" of ".join)
def test_a_certain_teacher_leaves_a_cost_finite(heads):
    student, teacher = certain(heads[0], 1.0, torch.float32), certain(heads[1], 1e4, torch.float32)
    if heads[1] == "sigmoid":
        teacher = torch.where(teacher > 0, INF, -INF)
    cost = dkl.distillation_cost(
        student, BOXES, teacher, BOXES, student_activation=heads[0], teacher_activation=heads[1], weight_bbox=0.0
    )
    assert cost.isfinite().all()
    assert (cost.argmin(0)[:3] == torch.arange(3)).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("size", [1e4, 3e4, 1e6])
def test_an_unknown_class_stays_out_of_a_softmax_of_low_logits(size, dtype):
    """The student's logits of all known classes are far below zero; a softmax does not depend on their level."""
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(4, 4, generator=generator, dtype=dtype)
    teacher = torch.randn(4, 3, generator=generator, dtype=dtype)
    options = {"class_map": [0, 2], "temperature": 1.0}
    expected = distil(student, teacher, ("softmax", "softmax"), **options)
    shifted = distil(student - size, teacher, ("softmax", "softmax"), **options)
    assert_close(
        shifted, expected, rtol=0.1 if dtype == torch.float32 else 1e-6, atol=0.1 if dtype == torch.float32 else 1e-6
    )
    assert (shifted[1][:, 1] == 0).all()


def test_a_map_of_classes_keeps_low_logits():
    logits = torch.tensor([[-2e4, -1e5, 3.0]])
    assert_close(dkl.map_class_logits(logits, [0, 1, 2], 3), logits)
    assert_close(dkl.map_class_logits(logits, [0, 0, -1], 2), torch.tensor([[-2e4, -1e4]]))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("size", [1e4, 6e4, INF])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("class_loss", ["focal", "cross_entropy"])
def test_detection_of_certainty(class_loss, dtype, size, gamma):
    """Right and certain costs 0; wrong and certain is large, and infinite only where a logit is."""
    activation = "softmax" if class_loss == "cross_entropy" else "sigmoid"
    logits = certain(activation, size, dtype)
    if activation == "softmax":
        logits = logits.clamp(max=6e4)  # two logits of plus infinity have no softmax
    labels, mask = torch.arange(3)[None], torch.ones(1, 3, dtype=torch.bool)
    for sign in (1, -1):
        student = (sign * logits).clamp(max=6e4 if activation == "softmax" else INF).requires_grad_()
        assignment = torch.tensor([[0, 1, 2, -1]])
        losses = dkl.detection_loss(
            student[None], BOXES[None], labels, BOXES[None, :3], mask, assignment, class_loss=class_loss, gamma=gamma
        )
        (gradient,) = torch.autograd.grad(losses["loss_class"], student)
        assert not losses["loss_class"].isnan()
        assert gradient.isfinite().all() or losses["loss_class"].isinf()
        assert sign < 0 or losses["loss_class"] == 0
        assert size == INF or losses["loss_class"].isfinite()
        cost = dkl.detection_cost(
            student.detach(), BOXES, labels[0], BOXES[:3], class_cost="softmax" if activation == "softmax" else "focal"
        )
        assert size == INF or cost.isfinite().all()


def test_queries_of_no_weight_have_no_part():
    """`no_object_weight=0` and a query that is infinitely sure of an object."""
    logits = torch.tensor([[[3.0, 0.0, 0.0], [0.0, 1.0, -INF]]], requires_grad=True)
    labels, mask, assignment = torch.tensor([[0]]), torch.tensor([[True]]), torch.tensor([[0, -1]])
    losses = dkl.detection_loss(
        logits,
        BOXES[None, :2],
        labels,
        BOXES[None, :1],
        mask,
        assignment,
        class_loss="cross_entropy",
        no_object_weight=0.0,
    )
    losses["loss_class"].backward()
    assert losses["loss_class"].isfinite()
    assert logits.grad.isfinite().all()
    assert not logits.grad[0, 1].any()


@pytest.mark.parametrize("boxes", [None, BOXES[None]], ids=["all cells", "within boxes"])
@pytest.mark.parametrize("size", [(4, 4), (7, 5)], ids=["as large", "resized"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_cell_that_a_mask_rules_out(dtype, size, boxes):
    """Minus infinity is the limit of a low logit, and plus infinity of a high one, for teacher and student."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(1, 4, *cells, generator=generator).to(dtype) for cells in ((4, 4), size))
    infinite = []
    for masks in (student, teacher):
        masks[:, :, 2:], masks[:, :, :1] = -60, 60
        infinite.append(torch.where(masks == -60, -INF, torch.where(masks == 60, INF, masks)))
    results = []
    for own, others in ((student, teacher), infinite):
        leaf = own.detach().requires_grad_()
        loss = dkl.mask_distillation_loss(leaf, others, torch.arange(4)[None], boxes=boxes)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
    assert results[1][0].isfinite()
    assert results[1][1].isfinite().all()
    if size == (4, 4):  # resized, a cell between infinity and a number is infinite
        assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("distance", ["cosine", "pearson"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-14, 1e-18, 1e-30, 0.0])
def test_features_of_nearly_no_length_have_finite_gradients(size, dtype, distance):
    """The third power of the inverse of a length is in its gradient."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 6, 5, 5, generator=generator) for _ in range(2))
    student = (student * size).to(dtype).requires_grad_()
    loss = dkl.feature_distillation_loss(student, teacher.to(dtype), distance=distance)
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("variant", ["paper", "official"])
@pytest.mark.parametrize("size", [1e-15, 1e-20, 1e-21, 1e-22, 1e-30])
def test_a_teacher_whose_maps_are_next_to_nothing(size, variant, dtype):
    """As that of an untrained model in evaluation mode: squares of its features are not of full precision any more."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 6, 5, 5, generator=generator, dtype=dtype) for _ in range(2))
    queries, quality = torch.randn(2, 4, 6, generator=generator, dtype=dtype), torch.rand(2, 4, generator=generator)
    student.requires_grad_()
    loss = dkl.target_aware_feature_loss(
        student, teacher * size, queries, quality.to(dtype), variant=variant, relative=True
    )
    loss.backward()
    assert 0 <= loss <= 200
    assert student.grad.isfinite().all()
    assert student.grad.abs().max() < 100


def test_a_mask_without_a_partner_has_no_part_whatever_it_holds():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(1, 3, 4, 4, generator=generator) for _ in range(2))
    assignment, results = torch.tensor([[1, -1, 0]]), []
    for fill in (0.0, float("nan"), INF):
        leaf, others = student.clone(), teacher.clone()
        leaf[:, 1], others[:, 2] = fill, fill
        loss = dkl.mask_distillation_loss(leaf.requires_grad_(), others, assignment)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
    assert results[0][0] > 0
    for result in results[1:]:
        assert_close(result, results[0], rtol=0, atol=0)
