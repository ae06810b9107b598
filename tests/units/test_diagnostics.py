"""Diagnostics, against loops and by their laws."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

import detr_kd_losses as dkl
from detr_kd_losses.training.diagnostics import (
    assignment_instability,
    loss_magnitudes,
    matched_iou,
    mean_quality,
    positives_per_image,
)

LAYERS, BATCH, QUERIES, PARTNERS = 3, 2, 5, 4
seeds = st.integers(0, 999)


def draw(seed: int, partners: int = PARTNERS) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes of queries and partners, and a partial assignment; some images have none."""
    generator = torch.Generator().manual_seed(seed)
    boxes = [0.2 + 0.6 * torch.rand(LAYERS, BATCH, count, 4, generator=generator) for count in (QUERIES, partners)]
    order = torch.rand(LAYERS, BATCH, QUERIES, generator=generator).argsort(-1)
    assignment = torch.where(order < partners, order, -1)
    hidden = torch.rand(assignment.shape, generator=generator) < 0.3
    return boxes[0], boxes[1], assignment.masked_fill(hidden, -1)


def mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan


@given(seed=seeds)
def test_matched_iou_is_the_mean_over_pairs(seed: int) -> None:
    boxes, partners, assignment = draw(seed)
    iou = dkl.box_iou(dkl.box_cxcywh_to_xyxy(boxes), dkl.box_cxcywh_to_xyxy(partners))
    expected = [
        mean(
            [
                iou[layer, image, query, partner].item()
                for image in range(BATCH)
                for query, partner in enumerate(assignment[layer, image].tolist())
                if partner >= 0
            ]
        )
        for layer in range(LAYERS)
    ]
    actual = matched_iou(boxes.requires_grad_(), partners, assignment)
    assert_close(actual, torch.tensor(expected), equal_nan=True)
    assert not actual.requires_grad
    assert_close(matched_iou(boxes[0], partners[0], assignment[0]), actual[0], equal_nan=True)


def test_matched_iou_of_targets_for_all_layers() -> None:
    boxes, targets, assignment = draw(0)
    expected = matched_iou(boxes, targets[:1].expand(LAYERS, -1, -1, -1), assignment)
    assert_close(matched_iou(boxes, targets[0], assignment), expected)


@given(seed=seeds)
def test_mean_quality_is_the_mean_over_positives(seed: int) -> None:
    _, _, assignment = draw(seed)
    quality = torch.rand(assignment.shape, generator=torch.Generator().manual_seed(seed))
    expected = [quality[layer][assignment[layer] >= 0].mean() for layer in range(LAYERS)]
    assert_close(mean_quality(quality, assignment), torch.stack(expected), equal_nan=True)


@given(seed=seeds)
def test_positives_are_counted_per_image(seed: int) -> None:
    _, _, assignment = draw(seed)
    expected = [mean([sum(x >= 0 for x in image) for image in layer]) for layer in assignment.tolist()]
    assert positives_per_image(assignment).tolist() == expected


class TestInstability:
    """The share of matched queries whose partner changes."""

    @given(first=seeds, second=seeds)
    def test_is_a_symmetric_share(self, first: int, second: int) -> None:
        before, after = draw(first)[2], draw(second)[2]
        share = assignment_instability(before, after)
        assert_close(share, assignment_instability(after, before), equal_nan=True)
        assert ((share >= 0) & (share <= 1) | share.isnan()).all()
        for layer in range(LAYERS):
            pairs = list(zip(before[layer].flatten().tolist(), after[layer].flatten().tolist(), strict=True))
            expected = mean([float(a != b) for a, b in pairs if a >= 0 or b >= 0])
            assert share[layer].item() == pytest.approx(expected, nan_ok=True)

    def test_of_the_same_matching_is_zero(self) -> None:
        assignment = draw(1)[2]
        assert assignment_instability(assignment, assignment).tolist() == [0] * LAYERS

    def test_of_swapped_partners_is_one(self) -> None:
        assert assignment_instability(torch.tensor([[0, 1, -1]]), torch.tensor([[1, 0, -1]])).item() == 1

    def test_moving_a_target_counts_both_queries(self) -> None:
        before, after = torch.tensor([[0, 1, -1]]), torch.tensor([[0, -1, 1]])
        assert assignment_instability(before, after).item() == pytest.approx(2 / 3)


@pytest.mark.parametrize("partners", [PARTNERS, 0])
def test_nothing_to_average_is_nan(partners: int) -> None:
    boxes, others, assignment = draw(0, partners)
    none = torch.full_like(assignment, -1)
    assert matched_iou(boxes, others, none).isnan().all()
    assert mean_quality(torch.rand(none.shape), none).isnan().all()
    assert assignment_instability(none, none).isnan().all()
    assert positives_per_image(none).tolist() == [0] * LAYERS


class TestMagnitudes:
    """Values and gradients of terms beside a task's loss."""

    @pytest.fixture
    def parameters(self) -> list[Tensor]:
        torch.manual_seed(0)
        return [torch.randn(3, 2, requires_grad=True), torch.randn(4, requires_grad=True)]

    def test_against_backward(self, parameters: list[Tensor]) -> None:
        first, second = parameters
        task, term = (first**2).sum() + second.sum(), (first.sum() * second).square().sum()
        magnitude = loss_magnitudes({"term": term}, task, parameters)["term"]
        norms = []
        for loss in (term, task):
            for parameter in parameters:
                parameter.grad = None
            loss.backward(retain_graph=True)
            norms.append(torch.cat([parameter.grad.flatten() for parameter in parameters]).norm())
        assert_close(magnitude.value, term.detach())
        assert_close(magnitude.gradient_norm, norms[0])
        assert_close(magnitude.relative_value, (term / task).detach())
        assert_close(magnitude.relative_gradient_norm, norms[0] / norms[1])
        assert not any(value.requires_grad for value in magnitude)

    @given(scale=st.floats(0.01, 100))
    def test_scales_with_the_weight(self, scale: float) -> None:
        weight = torch.ones(3, requires_grad=True)
        loss = (weight**3).sum()
        magnitude = loss_magnitudes({"term": scale * loss}, loss, [weight])["term"]
        assert_close(magnitude.relative_value.item(), scale, rtol=1e-4, atol=0)
        assert_close(magnitude.relative_gradient_norm.item(), scale, rtol=1e-4, atol=0)

    def test_training_goes_on(self, parameters: list[Tensor]) -> None:
        loss = sum(parameter.square().sum() for parameter in parameters)
        loss_magnitudes({"term": loss}, loss, parameters)
        assert all(parameter.grad is None for parameter in parameters)
        loss.backward()
        assert all(parameter.grad is not None for parameter in parameters)

    def test_independent_terms_have_no_gradient(self, parameters: list[Tensor]) -> None:
        other = torch.ones(2, requires_grad=True)
        terms = {"constant": torch.tensor(3.0), "other": other.sum(), "one": parameters[0].sum()}
        magnitudes = loss_magnitudes(terms, parameters[1].sum(), [*parameters, torch.ones(1)])
        assert magnitudes["constant"].gradient_norm == 0
        assert magnitudes["other"].gradient_norm == 0
        assert magnitudes["one"].gradient_norm == pytest.approx(6**0.5)

    def test_nothing_to_differentiate_by(self) -> None:
        with pytest.raises(ValueError, match="`parameters` must have at least one that requires a gradient"):
            loss_magnitudes({}, torch.tensor(0.0), [torch.ones(2)])

    def test_of_the_criterion(self) -> None:
        boxes, partners, _ = draw(0)
        student = dkl.DetectorOutput(torch.randn(LAYERS, BATCH, QUERIES, 3, requires_grad=True), boxes)
        teacher = dkl.DetectorOutput(torch.randn(LAYERS, BATCH, PARTNERS, 3), partners)
        targets = dkl.Targets(torch.tensor([[0], [1]]), partners[0, :, :1], torch.tensor([[True], [True]]))
        terms = dkl.DETRDistillationLoss()(student, teacher, targets)
        magnitudes = loss_magnitudes(terms, student.logits.square().mean(), [student.logits])
        assert magnitudes.keys() == terms.keys()
        assert magnitudes["loss_kd_class"].gradient_norm > 0


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda b, p, a: matched_iou(b, p, a.int()), TypeError, "`assignment` must have dtype"),
        (lambda b, p, a: matched_iou(b, p, a[..., 1:]), ValueError, "`assignment` and `student_boxes`"),
        (lambda _, p, a: matched_iou(p.long(), p, a), TypeError, "`student_boxes` must have a floating"),
        (lambda b, p, a: mean_quality(b[..., 0], a[..., 1:]), ValueError, "`quality` and `teacher_assignment`"),
        (lambda b, p, a: mean_quality(b[..., 0], a.float()), TypeError, "`teacher_assignment` must have dtype"),
        (lambda b, p, a: positives_per_image(a.bool()), TypeError, "`assignment` must have dtype"),
        (lambda b, p, a: positives_per_image(a[0, 0]), ValueError, r"`assignment` must have shape \(..., B, N\)"),
        (lambda b, p, a: assignment_instability(a, a[:-1]), ValueError, "`before` and `after`"),
        (lambda b, p, a: assignment_instability(a, a.int()), TypeError, "`after` must have dtype"),
    ],
)
def test_errors(call: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(*draw(0))
