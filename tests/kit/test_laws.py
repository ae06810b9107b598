"""Our own losses, matching and solvers under the laws of `detr_kd_losses.testing`."""

from __future__ import annotations

from functools import partial

import pytest

import detr_kd_losses as dkl
from detr_kd_losses import testing

from support.backends import RUNNABLE
from support.registry import LOSSES
from support.steps import make_criterion


def applied(laws, function, *skipped, **options):
    """One test case per law that the function with these options obeys."""
    name = " ".join([function.__name__, *(f"{key}={value}" for key, value in options.items())])
    return [
        pytest.param(law, partial(function, **options), id=f"{name}-{law}")
        for law in laws.values()
        if law.name not in skipped
    ]


@pytest.mark.parametrize(
    ("law", "loss"),
    [
        case
        for loss in LOSSES.values()
        for held in loss.held_to
        for case in applied(loss.laws, held.adapted, *held.given_up, **held.options)
    ],
)
def test_a_loss_obeys(law, loss):
    law(loss)


@pytest.mark.parametrize(
    "options",
    [
        {"preset": "official"},
        {"preset": "paper"},
        {"preset": "recommended"},
        {"student_activation": "softmax", "teacher_activation": "softmax", "temperature": 2.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("law", testing.CRITERION_LAWS.values(), ids=str)
def test_the_criterion_obeys(law, options):
    law(make_criterion(**options))


@pytest.mark.parametrize(
    ("law", "function"),
    [
        case
        for backend in RUNNABLE
        for case in [
            *applied(testing.ASSIGNMENT_LAWS, dkl.linear_sum_assignment, backend=backend),
            *applied(testing.TARGET_MATCHING_LAWS, dkl.match_targets, backend=backend),
            *applied(testing.TEACHER_MATCHING_LAWS, dkl.match_teacher, backend=backend),
        ]
    ],
)
def test_a_solver_or_matcher_obeys(law, function, lapx_takes_small_problems):
    law(function)
