"""Schedules: factors in [0, 1], continuous where they should be, and errors that name the argument."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import detr_kd_losses as dkl
from detr_kd_losses.training.schedules import WeightSchedule, cosine_decay, linear_warmup, stop_after

unit = st.floats(0, 1)


@given(progress=unit, end=unit)
def test_warmup_rises_to_one_and_stays(progress: float, end: float) -> None:
    factor = linear_warmup(progress, end=end)
    assert 0 <= factor <= 1
    assert factor == 1 if progress >= end else factor < 1
    assert factor * end == pytest.approx(min(progress, end))


@given(progress=unit, limits=st.tuples(unit, unit).map(sorted), floor=unit)
def test_decay_stays_falls_and_stays(progress: float, limits: list[float], floor: float) -> None:
    start, end = limits
    factor = cosine_decay(progress, start=start, end=end, floor=floor)
    assert floor <= factor <= 1 or factor == pytest.approx(floor)
    if progress <= start:
        assert factor == 1
    elif progress >= end:
        assert factor == floor


@given(first=unit, second=unit, start=st.floats(0, 0.4), floor=unit)
def test_decay_never_rises(first: float, second: float, start: float, floor: float) -> None:
    early, late = (cosine_decay(progress, start=start, end=0.9, floor=floor) for progress in sorted([first, second]))
    assert late <= early + 1e-12


def test_decay_is_half_a_cosine() -> None:
    for progress in (0.3, 0.45, 0.5, 0.7):
        expected = 0.1 + 0.9 * math.cos(math.pi / 2 * (progress - 0.2) / 0.6) ** 2
        assert cosine_decay(progress, start=0.2, end=0.8, floor=0.1) == pytest.approx(expected)


@given(progress=unit, end=unit)
def test_stop_is_a_step(progress: float, end: float) -> None:
    assert stop_after(progress, end=end) == float(progress < end)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: linear_warmup(1.1), r"`progress` must be in \[0, 1\], got 1.1"),
        (lambda: linear_warmup(0.5, end=2), r"`end` must be in \[0, 1\], got 2"),
        (lambda: cosine_decay(-0.1), r"`progress` must be in \[0, 1\], got -0.1"),
        (lambda: cosine_decay(0.5, start=-1), r"`start` must be in \[0, 1\], got -1"),
        (lambda: cosine_decay(0.5, floor=2), r"`floor` must be in \[0, 1\], got 2"),
        (lambda: cosine_decay(0.5, start=0.6, end=0.5), r"`end` must not be before `start` 0.6, got 0.5"),
        (lambda: stop_after(0.5, end=100), r"`end` must be in \[0, 1\], got 100"),
        (lambda: stop_after(float("nan"), end=1), r"`progress` must be in \[0, 1\], got nan"),
    ],
)
def test_refuses_what_is_no_share(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def two_terms() -> dkl.DETRDistillationLoss:
    return dkl.DETRDistillationLoss({"one": dkl.FeatureTerm(weight=20.0), "other": dkl.SharedQueryTerm(weight=0.5)})


def weights_of(criterion: nn.Module) -> dict[str, float]:
    return {name: term.weight for name, term in criterion.terms.items()}


@given(visited=st.lists(unit, max_size=4), last=unit)
def test_weights_depend_on_the_progress_alone(visited: list[float], last: float) -> None:
    criterion = two_terms()
    schedule = WeightSchedule(criterion, cosine_decay)
    for progress in [*visited, last]:
        schedule.update(progress)
    factor = math.cos(math.pi / 2 * last) ** 2
    assert weights_of(criterion) == {"one": pytest.approx(20 * factor), "other": pytest.approx(0.5 * factor)}


def test_unless_told_otherwise_groups_stop_at_half_time_and_all_else_falls() -> None:
    terms = [dkl.LogitsTerm(), dkl.QueryGroupTerm(), dkl.FeatureTerm(weight=2.0), dkl.SharedQueryTerm(weight=0.0)]
    criterion = dkl.DETRDistillationLoss(terms)
    schedule = WeightSchedule(criterion)
    seen = []
    for progress in (0.25, 0.5):
        schedule.update(progress)
        seen.append({name: round(weight, 6) for name, weight in weights_of(criterion).items()})
    falling = round(math.cos(math.pi / 8) ** 2, 6)
    assert seen == [
        {
            "logits": falling,
            "query_group": 1.0,
            "feature": round(2 * math.cos(math.pi / 8) ** 2, 6),
            "shared_query": 0.0,
        },
        {"logits": 0.5, "query_group": 0.0, "feature": 1.0, "shared_query": 0.0},
    ]
    assert criterion.needs == {"features"}  # so that nobody runs the group any longer


def test_another_training_begins_with_the_first_weights() -> None:
    criterion = two_terms()
    schedule = WeightSchedule(criterion, {"one": cosine_decay})
    schedule.update(1.0)
    criterion.terms["other"].weight = 3.0  # of no schedule
    schedule.restore()
    assert weights_of(criterion) == {"one": 20.0, "other": 3.0}


def test_a_comparison_is_a_schedule() -> None:
    criterion = two_terms()
    schedule = WeightSchedule(criterion, lambda progress: progress < 0.5)
    schedule.update(0.4)
    assert weights_of(criterion) == {"one": 20.0, "other": 0.5}
    schedule.update(0.6)
    assert weights_of(criterion) == {"one": 0.0, "other": 0.0}


def test_a_schedule_must_give_a_number() -> None:
    criterion = two_terms()
    with pytest.raises(TypeError, match=r"`schedules\['one'\]\(0.5\)` must be a number, got None"):
        WeightSchedule(criterion, {"one": lambda progress: None}).update(0.5)
    assert weights_of(criterion) == {"one": 20.0, "other": 0.5}


def test_a_term_without_a_schedule_keeps_its_weight() -> None:
    criterion = two_terms()
    schedule = WeightSchedule(criterion, {"other": lambda progress: 2 * progress})
    criterion.terms["one"].weight = 3.0
    schedule.update(0.75)
    assert weights_of(criterion) == {"one": 3.0, "other": 0.75}


def test_nothing_changes_until_the_first_update_and_a_copy_goes_its_own_way() -> None:
    criterion = two_terms()
    schedule = WeightSchedule(criterion, cosine_decay)
    assert weights_of(criterion) == {"one": 20.0, "other": 0.5}
    copied, copied_schedule = copy.deepcopy((criterion, schedule))
    copied_schedule.update(1.0)
    assert weights_of(copied) == {"one": 0.0, "other": 0.0}
    assert weights_of(criterion) == {"one": 20.0, "other": 0.5}


def test_a_resumed_run_has_the_weights_of_one_that_went_on() -> None:
    criterion, resumed = two_terms(), two_terms()
    schedule = WeightSchedule(criterion, cosine_decay)
    for progress in (0.0, 0.3, 0.6):
        schedule.update(progress)
    WeightSchedule(resumed, cosine_decay).update(0.6)
    assert weights_of(resumed) == weights_of(criterion)


@pytest.mark.parametrize(
    ("schedules", "error", "message"),
    [
        ({"feature": cosine_decay}, ValueError, r"`schedules` must name terms .*\['one', 'other'\], got \['feature'\]"),
        ({}, ValueError, r"`schedules` must name terms of the criterion, \['one', 'other'\], got none"),
        (0.5, TypeError, r"`schedules\['one'\]` must be a function of the progress, got float"),
        ({"other": None}, TypeError, r"`schedules\['other'\]` must be a function of the progress, got NoneType"),
    ],
)
def test_refuses_what_is_no_schedule(schedules: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        WeightSchedule(two_terms(), schedules)


def test_refuses_what_has_no_terms() -> None:
    with pytest.raises(TypeError, match="`criterion` must be a DETRDistillationLoss with terms, got Linear"):
        WeightSchedule(nn.Linear(1, 1), cosine_decay)


@pytest.mark.parametrize(
    ("schedule", "progress", "message"),
    [
        (cosine_decay, 2, r"`progress` must be in \[0, 1\], got 2"),
        (lambda progress: 1.0, -0.1, r"`progress` must be in \[0, 1\], got -0.1"),
        (lambda progress: -progress, 0.5, r"`schedules\['other'\]` must give a factor >= 0, got -0.5 at 0.5"),
        (lambda progress: math.nan, 0.5, r"`schedules\['other'\]` must give a factor >= 0, got nan at 0.5"),
        (lambda progress: math.inf, 0.5, r"`schedules\['other'\]` must give a factor >= 0, got inf at 0.5"),
    ],
)
def test_a_bad_factor_changes_no_weight(schedule: Callable[[float], float], progress: float, message: str) -> None:
    criterion = two_terms()
    follower = WeightSchedule(criterion, {"other": schedule})
    with_another = WeightSchedule(criterion, {"one": stop_at_once, "other": schedule})
    for each in (follower, with_another):
        with pytest.raises(ValueError, match=message):
            each.update(progress)
    assert weights_of(criterion) == {"one": 20.0, "other": 0.5}


def stop_at_once(progress: float) -> float:
    return stop_after(progress, end=0.0)
