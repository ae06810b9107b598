"""Distillation of the masks of matched queries."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import detr_kd_losses as dkl

from support import cases, oracles
from support.comparisons import (
    assert_agrees_with_oracle,
    assert_rejects,
    assert_same_evaluation,
    assert_vanishes,
    evaluate,
    to_meta,
    to_tensors,
)
from support.tolerances import TOLERANCES

STUDENT = ("student_masks",)
loss = dkl.mask_distillation_loss


def assert_agrees(case, dtype=torch.float64, **options):
    return assert_agrees_with_oracle(loss, oracles.mask_distillation_loss, case, dtype, wrt=STUDENT, **options)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("stages", [None, 1, 3])
@pytest.mark.parametrize(("students", "teachers"), [(1, 1), (4, 3), (3, 5)])
@pytest.mark.parametrize("boxed", [True, False])
def test_numbers_of_queries(stages, students, teachers, boxed, dtype):
    assert_agrees(cases.masks(stages=stages, students=students, teachers=teachers, boxed=boxed, seed=2), dtype)


@pytest.mark.parametrize(
    ("size", "teacher_size"),
    [((3, 4), (3, 4)), ((2, 5), (4, 3)), ((5, 2), (3, 4)), ((1, 6), (6, 1)), ((3, 3), (1, 1)), ((1, 1), (4, 2))],
)
@pytest.mark.parametrize("boxed", [True, False])
def test_sizes(size, teacher_size, boxed):
    assert_agrees(cases.masks(size=size, teacher_size=teacher_size, boxed=boxed))


@pytest.mark.parametrize("stages", [True, False])
@pytest.mark.parametrize("temperature", [0.5, 5.0])
def test_weights_and_temperature(temperature, stages):
    assert_agrees(cases.weighted(cases.masks(), stages=stages), temperature=temperature)


def score_divergence(teacher, student):
    """KL of two scores."""
    p, q = (1 / (1 + math.exp(-logit)) for logit in (teacher, student))
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


def test_a_number_by_hand():
    """A box over the upper left of 2 x 4 cells: two cells of one row."""
    student = torch.tensor([[[[1.0, 2.0, 9.0, 9.0], [9.0, 9.0, 9.0, 9.0]]]], dtype=torch.float64)
    teacher = torch.tensor([[[[0.5, -1.0, 3.0, 3.0], [3.0, 3.0, 3.0, 3.0]]]], dtype=torch.float64)
    box = torch.tensor([[[0.25, 0.25, 0.4, 0.4]]], dtype=torch.float64)
    expected = (score_divergence(0.5, 1.0) + score_divergence(-1.0, 2.0)) / 2
    assert loss(student, teacher, torch.tensor([[0]]), boxes=box).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    case = to_tensors(cases.masks(), dtype)
    whole = {name: x.detach().float().requires_grad_() if x.is_floating_point() else x for name, x in case.items()}
    (terms, gradients), (expected, expected_gradients) = evaluate(loss, case), evaluate(loss, whole)
    assert terms["loss"].dtype == torch.float32
    torch.testing.assert_close(terms, expected, rtol=0, atol=0)
    assert gradients["student_masks"][0].dtype == dtype
    torch.testing.assert_close(gradients["student_masks"][0], expected_gradients["student_masks"][0].to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("boxed", [True, False])
def test_the_teacher_itself_has_exactly_no_loss(dtype, boxed):
    case = to_tensors(cases.masks(students=3, teacher_size=(3, 4), boxed=boxed), dtype)
    case["assignment"] = torch.arange(3).expand_as(case["assignment"])
    case["student_masks"] = case["teacher_masks"].detach().clone().requires_grad_()
    terms, gradients = evaluate(loss, case)
    assert terms["loss"] == 0
    assert gradients["student_masks"][0].abs().max() <= torch.finfo(torch.float32).eps


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("signs", [(1, 1), (1, -1), (-1, -1)])
def test_huge_masks(dtype, signs):
    case = to_tensors(cases.masks(), dtype)
    with torch.no_grad():
        for name, sign in zip(("student_masks", "teacher_masks"), signs, strict=True):
            case[name].fill_(sign * 3e4)
    terms, gradients = evaluate(loss, case)
    assert terms["loss"].isfinite()
    assert (terms["loss"] == 0) == (signs[0] == signs[1])
    assert gradients["student_masks"][0].isfinite().all()


@pytest.mark.parametrize(
    "case",
    [
        cases.masks(students=0),
        cases.masks(teachers=0),
        cases.masks(stages=0),
        {**cases.masks(), "assignment": np.full((2, 2, 4), -1)},
        {**cases.masks(), "teacher_weight": np.zeros((2, 3))},
        {**cases.masks(), "boxes": np.broadcast_to([1.5, 0.5, 0.2, 0.2], (2, 2, 3, 4))},
    ],
    ids=["no queries", "no teacher queries", "no stages", "no pairs", "no weight", "no cells"],
)
def test_nothing_to_distil(case):
    assert_vanishes(loss, to_tensors(case), wrt=STUDENT)


def test_no_images():
    case = {name: array[:, :0] for name, array in cases.masks().items()}
    assert_vanishes(loss, to_tensors(case), wrt=STUDENT)


def partners(case):
    """Which teacher queries are one's partner."""
    found = np.zeros(case["teacher_masks"].shape[:3], dtype=bool)
    for place in np.argwhere(case["assignment"] >= 0):
        found[(*place[:2], case["assignment"][tuple(place)])] = True
    return found


@pytest.mark.parametrize("name", ["student_masks", "teacher_masks", "boxes", "teacher_weight"])
def test_a_query_without_partner_may_hold_anything(name):
    case = cases.weighted(cases.masks(students=3, teachers=5), stages=True)
    unmatched = case["assignment"] < 0 if name == "student_masks" else ~partners(case)
    case["assignment"][0, 0, 0] = -1
    unmatched = case["assignment"] < 0 if name == "student_masks" else ~partners(case)
    assert unmatched.any()
    assert_same_evaluation(loss, case, cases.filled(case, name, unmatched, np.nan), torch.float64, wrt=STUDENT)


def test_cells_outside_of_the_box_may_hold_anything():
    case = cases.masks(students=3, teachers=3, size=(4, 4), teacher_size=(4, 4))
    case["assignment"][:] = np.arange(3)
    case["boxes"][:] = [0.25, 0.25, 0.4, 0.4]
    changed = {name: array.copy() for name, array in case.items()}
    for name in ("student_masks", "teacher_masks"):
        changed[name][..., 2:, :] = np.nan
        changed[name][..., :, 2:] = np.nan
    assert_same_evaluation(loss, case, changed, torch.float64, wrt=STUDENT)


def test_the_partners_of_weight_0_may_hold_anything():
    case = cases.masks()
    case["teacher_weight"] = np.ones((2, 2, 3))
    case["teacher_weight"][..., 1] = 0
    changed = cases.filled(case, "teacher_masks", case["teacher_weight"] == 0, np.nan)
    assert_same_evaluation(loss, case, changed, torch.float64, wrt=STUDENT)


@pytest.mark.parametrize(
    ("argument", "change", "error", "match"),
    [
        (
            "student_masks",
            lambda x: x.long(),
            TypeError,
            "`student_masks` must have a floating-point dtype, got torch.int64",
        ),
        (
            "teacher_masks",
            lambda x: x > 0,
            TypeError,
            "`teacher_masks` must have a floating-point dtype, got torch.bool",
        ),
        (
            "student_masks",
            lambda x: x[0, 0],
            ValueError,
            r"`student_masks` must have shape \(L, B, N, H, W\) or \(B, N, H, W\), got \(4, 3, 4\)",
        ),
        (
            "teacher_masks",
            lambda x: x[None],
            ValueError,
            r"`teacher_masks` must have shape \(L, B, N, H, W\) or \(B, N, H, W\), got \(1, 2, 2, 3, 5, 6\)",
        ),
        (
            "student_masks",
            lambda x: x[..., :0],
            ValueError,
            r"`student_masks` must have at least one cell, got \(2, 2, 4, 3, 0\)",
        ),
        (
            "teacher_masks",
            lambda x: x[..., :0, :],
            ValueError,
            r"`teacher_masks` must have at least one cell, got \(2, 2, 3, 0, 6\)",
        ),
        (
            "teacher_masks",
            lambda x: x[:1],
            ValueError,
            r"`student_masks` and `teacher_masks` must have the same dimensions \(L, B\), got \(2, 2\) and \(1, 2\)",
        ),
        (
            "teacher_masks",
            to_meta,
            ValueError,
            "`teacher_masks` must be on the device of `student_masks` cpu, got meta",
        ),
        ("assignment", lambda x: x.int(), TypeError, "`assignment` must have dtype torch.int64, got torch.int32"),
        (
            "assignment",
            lambda x: x[:, :, 1:],
            ValueError,
            r"`assignment` and `student_masks` must have the same dimensions \(..., N\), got",
        ),
        ("assignment", lambda x: x + 9, ValueError, "`assignment` must"),
        ("assignment", to_meta, ValueError, "`assignment` must be on the device of `student_masks` cpu, got meta"),
        ("boxes", lambda x: x.long(), TypeError, "`boxes` must have a floating-point dtype"),
        ("boxes", lambda x: x[..., :3], ValueError, r"`boxes` must have shape \(..., N, 4\), got \(2, 2, 3, 3\)"),
        (
            "boxes",
            lambda x: x[:, :, 1:],
            ValueError,
            r"`boxes` and `teacher_masks` must have the same dimensions \(..., M\), got \(2, 2, 2\) and \(2, 2, 3\)",
        ),
        ("boxes", to_meta, ValueError, "`boxes` must be on the device of `teacher_masks` cpu, got meta"),
        ("temperature", 0.0, ValueError, "`temperature` must be greater than 0, got 0.0"),
        ("temperature", "hot", TypeError, "`temperature` must be a"),
        ("sync_normalizer", 1, TypeError, "`sync_normalizer` must be"),
        ("teacher_weight", torch.ones(3, dtype=torch.int64), TypeError, "`teacher_weight` must have a floating-point"),
        (
            "teacher_weight",
            torch.ones(3),
            ValueError,
            r"`teacher_weight` must have the dimensions \(L, B, M\) or \(B, M\) of `teacher_masks` \(2, 2, 3\)",
        ),
        ("teacher_weight", torch.ones(2, 3, device="meta"), ValueError, "`teacher_weight` must be on the device of"),
    ],
)
def test_errors(argument, change, error, match):
    case = cases.masks()
    if argument in case:
        assert_rejects(loss, case, argument, change, error, match)
    else:
        with pytest.raises(error, match=match):
            loss(**to_tensors(case), **{argument: change})
