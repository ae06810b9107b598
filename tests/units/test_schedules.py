"""Schedules: factors in [0, 1], continuous where they should be, and errors that name the argument."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from detr_kd_losses.training.schedules import cosine_decay, linear_warmup, stop_after

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
