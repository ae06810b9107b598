"""Distillation of box distributions, and a teacher's distributions in the bins of a student."""

from __future__ import annotations

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

STUDENT = ("student_distributions",)
loss = dkl.box_distribution_loss


def assert_agrees(case, dtype=torch.float64, **options):
    return assert_agrees_with_oracle(loss, oracles.box_distribution_loss, case, dtype, wrt=STUDENT, **options)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("stages", [None, 1, 3])
@pytest.mark.parametrize(("students", "teachers"), [(1, 1), (5, 3), (3, 6)])
@pytest.mark.parametrize("own_bins", [True, False])
def test_sizes(stages, students, teachers, own_bins, dtype):
    case = cases.box_distributions(stages=stages, students=students, teachers=teachers, own_bins=own_bins, seed=2)
    assert_agrees(case, dtype)


@pytest.mark.parametrize("stages", [True, False])
@pytest.mark.parametrize("temperature", [0.5, 5.0])
def test_weights_and_temperature(temperature, stages):
    assert_agrees(cases.weighted(cases.box_distributions(), stages=stages), temperature=temperature)


def rebinned(student_bins, teacher_bins, *, student=(0.5, 0.5, 0.2, 0.4), teacher=(0.5, 0.5, 0.2, 0.4), scales=(4, 4)):
    """One distribution a teacher bin, all in it, of each edge -> (teacher bins, 4, student bins)."""
    number = len(teacher_bins)
    return dkl.rebin_box_distribution(
        torch.eye(number, dtype=torch.float64).unsqueeze(1).expand(-1, 4, -1),
        torch.tensor(teacher, dtype=torch.float64).expand(number, 4),
        torch.tensor(student, dtype=torch.float64).expand(number, 4),
        teacher_bins=teacher_bins,
        student_bins=student_bins,
        teacher_scale=scales[0],
        student_scale=scales[1],
    )


def test_the_place_of_a_bin():
    """By hand: a box of width 0.2 and scale 4 has a bin 1 further at 0.05 further from its left edge."""
    # The student's centre is 0.05 to the right: what was at the edge is one bin of 0.05 further left of its own.
    moved = rebinned([-1, 0, 1], [-1, 0, 1], student=(0.55, 0.5, 0.2, 0.4)).numpy()
    np.testing.assert_allclose(moved[:, 0], [[0, 1, 0], [0, 0, 1], [0, 0, 1]], atol=1e-12)  # the last is cut off
    np.testing.assert_allclose(moved[:, 2], [[1, 0, 0], [1, 0, 0], [0, 1, 0]], atol=1e-12)
    np.testing.assert_array_equal(moved[:, 1], np.eye(3))  # above and below nothing has moved
    # Between two of the student's bins each gets half.
    coarser = rebinned([-2, 0, 2], [-2, -1, 0, 1, 2])[:, 0]
    np.testing.assert_allclose(coarser, [[1, 0, 0], [0.5, 0.5, 0], [0, 1, 0], [0, 0.5, 0.5], [0, 0, 1]])
    # A bin of twice the scale is half as far away.
    np.testing.assert_allclose(rebinned([-2, 0, 2], [-4, 0, 4], scales=(8, 4))[:, 3], np.eye(3))


def test_the_same_grid_leaves_every_bit():
    bins = torch.tensor([-4.0, -0.3, 0.0, 0.1, 4.0])
    probabilities, boxes = torch.rand(7, 4, 5).softmax(-1), torch.rand(7, 4) * 1e-3
    grid = {
        f"{model}_{what}": value for model in ("teacher", "student") for what, value in (("bins", bins), ("scale", 4))
    }
    assert torch.equal(dkl.rebin_box_distribution(probabilities, boxes, boxes, **grid), probabilities)


@pytest.mark.parametrize("bins", [[0.5], [-1, 1], [-1, 0, 0, 1]])
def test_mass_stays(bins):
    mass = rebinned(bins, [-9, -1, 0, 0.3, 9], student=(0.3, 0.2, 0.1, 0.9), scales=(2, 5))
    torch.testing.assert_close(mass.sum(-1), torch.ones_like(mass[..., 0]))
    assert (mass >= 0).all()


def test_rebinning_agrees_with_its_oracle():
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.ones(4), (3, 6, 4))
    arguments = probabilities, *(cases.random_boxes(rng, 3, 6) for _ in range(2))
    grid = {name: array for name, array in cases.box_distributions().items() if name.endswith(("bins", "scale"))}
    actual = dkl.rebin_box_distribution(
        *map(torch.tensor, arguments), **{name: torch.tensor(array) for name, array in grid.items()}
    )
    np.testing.assert_allclose(actual, oracles.rebin_box_distribution(*arguments, **grid), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("model", ["student", "teacher", "both"])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_references_without_size(model, dtype):
    case = to_tensors(cases.box_distributions(own_bins=False), dtype)
    for name in ("student", "teacher") if model == "both" else (model,):
        with torch.no_grad():
            case[f"{name}_references"][..., 2:] = 0
    terms, gradients = evaluate(loss, case)
    assert terms["loss"].isfinite()
    assert gradients["student_distributions"][0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_teacher_itself_has_exactly_no_loss(dtype):
    case = to_tensors(cases.box_distributions(students=4, teachers=4, own_bins=False), dtype)
    case["assignment"] = torch.arange(4).expand_as(case["assignment"])
    for kind in ("distributions", "references"):
        case[f"student_{kind}"] = case[f"teacher_{kind}"].detach().clone().requires_grad_()
    terms, gradients = evaluate(loss, case)
    assert terms["loss"] == 0
    assert gradients["student_distributions"][0].abs().max() < torch.finfo(dtype).eps


@pytest.mark.parametrize(
    "case",
    [
        cases.box_distributions(students=0),
        cases.box_distributions(teachers=0),
        cases.box_distributions(stages=0),
        {**cases.box_distributions(), "assignment": np.full((2, 2, 5), -1)},
        {**cases.box_distributions(), "teacher_weight": np.zeros((2, 4))},
    ],
    ids=["no queries", "no teacher queries", "no stages", "no pairs", "no weight"],
)
def test_nothing_to_distil(case):
    assert_vanishes(loss, to_tensors(case), wrt=STUDENT)


@pytest.mark.parametrize("name", ["student_distributions", "student_references"])
def test_a_query_without_partner_may_hold_anything(name):
    case = cases.box_distributions()
    assert_same_evaluation(
        loss, case, cases.filled(case, name, case["assignment"] < 0, np.nan), torch.float64, wrt=STUDENT
    )


@pytest.mark.parametrize(
    ("argument", "change", "error", "match"),
    [
        ("student_distributions", lambda x: x.long(), TypeError, "`student_distributions` must have a floating-point"),
        ("student_distributions", lambda x: x[..., 1:], ValueError, "`student_distributions` must have 4 x 5 channels"),
        ("student_distributions", lambda x: x[0, 0], ValueError, r"must have shape \(L, B, N, 4 \(R \+ 1\)\) or"),
        (
            "student_references",
            lambda x: x[..., :3],
            ValueError,
            r"`student_references` must have shape",
        ),
        (
            "teacher_references",
            lambda x: x[:, :, 1:],
            ValueError,
            "`teacher_distributions` and `teacher_ref",
        ),
        ("teacher_distributions", to_meta, ValueError, "`teacher_references` must be on the device of"),
        ("assignment", lambda x: x.int(), TypeError, "`assignment` must have dtype torch.int64, got torch.int32"),
        ("assignment", lambda x: x + 9, ValueError, "`assignment` must"),
        (
            "teacher_bins",
            lambda x: x[1:],
            ValueError,
            "`teacher_distributions` must have 4 x 3 channels, as",
        ),
        ("student_bins", [-1, 0, 2, 1, 3], ValueError, r"`student_bins` must ascend, got \[-1, 0, 2, 1, 3\]"),
        ("student_bins", 5, TypeError, "`student_bins` must be a tensor or a sequence of numbers, got 5 of type int"),
        ("student_bins", None, TypeError, "`student_bins` must be a tensor or a sequence of numbers, got None"),
        ("student_bins", [], ValueError, r"`student_bins` must have shape \(R \+ 1,\), at least one bin, got \(0,\)"),
        ("student_bins", lambda x: x.long(), TypeError, "`student_bins` must have a floating-point dtype"),
        ("student_scale", 0, ValueError, "`student_scale` must be greater than 0, got 0"),
        (
            "teacher_scale",
            torch.ones(2),
            ValueError,
            "`teacher_scale` must be a number or a tensor of one",
        ),
        ("temperature", 0.0, ValueError, "`temperature` must be greater than 0, got 0.0"),
        (
            "teacher_weight",
            torch.ones(3),
            ValueError,
            "`teacher_weight` must have the dimensions",
        ),
    ],
)
def test_errors(argument, change, error, match):
    case = cases.box_distributions()
    arguments = to_tensors(case)
    if argument in case:
        assert_rejects(loss, case, argument, change, error, match)
    else:
        with pytest.raises(error, match=match):
            loss(**arguments, **{argument: change})


def test_rebinning_names_what_does_not_fit():
    probabilities, box = torch.rand(4, 3), torch.rand(4)
    grid = {"teacher_bins": [-1, 0, 1], "student_bins": [-1, 1], "teacher_scale": 4.0, "student_scale": 4.0}
    with pytest.raises(ValueError, match=r"`probabilities` must have 2 channels, as `teacher_bins`, got 3"):
        dkl.rebin_box_distribution(probabilities, box, box, **{**grid, "teacher_bins": [0, 1]})
    with pytest.raises(ValueError, match=r"`student_reference` and `probabilities` must have the same dimensions"):
        dkl.rebin_box_distribution(probabilities, box, box.expand(2, 4), **grid)
    with pytest.raises(TypeError, match="`probabilities` must have a floating-point dtype"):
        dkl.rebin_box_distribution(probabilities.long(), box, box, **grid)
