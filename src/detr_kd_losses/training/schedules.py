"""Weights that change while training goes on: plain functions from progress in [0, 1] to a factor in [0, 1].

A product of schedules is a schedule. `WeightSchedule` lets the weights of a criterion's terms follow them; the teacher
need not run at all where all of them are 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from detr_kd_losses._validation import validate_in_unit_interval, validate_number, validate_terms

__all__ = ["WeightSchedule", "cosine_decay", "linear_warmup", "stop_after"]

Schedule = Callable[[float], float]


def linear_warmup(progress: float, *, end: float = 0.05) -> float:
    """Rise linearly from 0 to 1 at `end`, then stay.

    Args:
        progress: Share of the training that is done, in [0, 1].
        end: Progress at which the factor is 1. 0: no warm-up.

    Returns:
        A factor in [0, 1].

    Raises:
        ValueError: If an argument is not in [0, 1].

    Examples:
        >>> [linear_warmup(progress, end=0.5) for progress in (0.0, 0.25, 0.5, 1.0)]
        [0.0, 0.5, 1.0, 1.0]
    """
    validate_in_unit_interval("progress", progress)
    validate_in_unit_interval("end", end)
    return 1.0 if progress >= end else progress / end


def cosine_decay(progress: float, *, start: float = 0.0, end: float = 1.0, floor: float = 0.0) -> float:
    """Stay at 1 until `start`, fall along half a cosine to `floor` at `end`, then stay.

    Args:
        progress: Share of the training that is done, in [0, 1].
        start: Progress at which the fall begins.
        end: Progress at which it ends, not before `start`.
        floor: Factor after the fall.

    Returns:
        A factor in [floor, 1].

    Raises:
        ValueError: If an argument is not in [0, 1], or `end` is before `start`.

    Examples:
        >>> [round(cosine_decay(progress, start=0.5), 2) for progress in (0.0, 0.5, 0.75, 1.0)]
        [1.0, 1.0, 0.5, 0.0]
    """
    for name, value in (("progress", progress), ("start", start), ("end", end), ("floor", floor)):
        validate_in_unit_interval(name, value)
    if end < start:
        msg = f"`end` must not be before `start` {start!r}, got {end!r}"
        raise ValueError(msg)
    if progress <= start:
        return 1.0
    if progress >= end:
        return floor
    return floor + (1 - floor) * (1 + math.cos(math.pi * (progress - start) / (end - start))) / 2


def stop_after(progress: float, *, end: float) -> float:
    """Stay at 1 before `end`, then be 0: the student finishes on its own.

    Args:
        progress: Share of the training that is done, in [0, 1].
        end: Progress from which the factor is 0.

    Returns:
        0 or 1.

    Raises:
        ValueError: If an argument is not in [0, 1].

    Examples:
        >>> [stop_after(progress, end=0.9) for progress in (0.0, 0.8, 0.9, 1.0)]
        [1.0, 1.0, 0.0, 0.0]
        >>> [linear_warmup(progress, end=0.1) * stop_after(progress, end=0.9) for progress in (0.0, 0.5, 0.9)]
        [0.0, 1.0, 0.0]
    """
    validate_in_unit_interval("progress", progress)
    validate_in_unit_interval("end", end)
    return 1.0 if progress < end else 0.0


class WeightSchedule:
    r"""Lets the weights of terms follow schedules, each from the weight that it has now.

    .. math:: w_t(p) = w_t \, s_t(p)

    Constant weights accelerate a training, and may then hold it back: a student that is nearly as good as it will be
    has little to gain from a teacher's mistakes. Nobody calls it unless you do, at the beginning of a step or an epoch:

        schedule = WeightSchedule(criterion)
        schedule.update(epoch / epochs)

    It has no state but the first weights: a run that is resumed makes it anew, from the weights that it began with, and
    goes on at its progress; :meth:`restore` sets them again, before another training with the same criterion. A weight
    that is set in between is overwritten. A term has a schedule, or a share that :class:`ShareController` holds.

    Args:
        criterion: :class:`DETRDistillationLoss` or another Module, whose ``terms`` have the weights.
        schedules: From progress in [0, 1] to a factor that is not negative, for all terms; or by name of the term, and
            others keep their weights. None: what did best in our experiments: all fall along :func:`cosine_decay`, but
            terms that need a group of queries, which costs another pass of the student's decoder, stop at half time.

    Raises:
        TypeError: If the criterion has no terms, or a schedule cannot be called.
        ValueError: If a name is no term.

    Examples:
        >>> from detr_kd_losses import DETRDistillationLoss, FeatureTerm, SharedQueryTerm
        >>> criterion = DETRDistillationLoss([FeatureTerm(weight=20.0), SharedQueryTerm()])
        >>> schedule = WeightSchedule(criterion)
        >>> schedule.update(0.5)
        >>> {name: round(term.weight, 6) for name, term in criterion.terms.items()}
        {'feature': 10.0, 'shared_query': 0.0}
    """

    def __init__(self, criterion: nn.Module, schedules: Schedule | Mapping[str, Schedule] | None = None) -> None:
        terms = validate_terms(criterion)
        self.schedules = _by_term(schedules, terms)
        self.weights = {name: float(terms[name].weight) for name in self.schedules}
        self._terms = terms

    def update(self, progress: float) -> None:
        """Set the weights to those at a progress; nothing else changes.

        Args:
            progress: Share of the training that is done, in [0, 1].

        Raises:
            ValueError: If it is not in [0, 1], or a factor is negative or not finite: then no weight changes.
            TypeError: If a factor is no number.
        """
        validate_in_unit_interval("progress", progress)
        factors = {name: schedule(progress) for name, schedule in self.schedules.items()}
        for name, factor in factors.items():
            if not isinstance(factor, bool):  # a comparison will do
                validate_number(f"schedules[{name!r}]({progress!r})", factor)
            if not 0 <= factor < math.inf:
                msg = f"`schedules[{name!r}]` must give a factor >= 0, got {factor!r} at {progress!r}"
                raise ValueError(msg)
        self._set({name: self.weights[name] * float(factor) for name, factor in factors.items()})

    def restore(self) -> None:
        """Set the weights to those from which it began."""
        self._set(self.weights)

    def _set(self, weights: Mapping[str, float]) -> None:
        for name, weight in weights.items():
            self._terms[name].weight = weight


def _first_half(progress: float) -> float:
    return stop_after(progress, end=0.5)


def _by_term(schedules: Schedule | Mapping[str, Schedule] | None, terms: Mapping[str, Any]) -> dict[str, Schedule]:
    """A schedule for each term that has one."""
    if schedules is None:
        schedules = {name: _first_half if "group" in term.needs else cosine_decay for name, term in terms.items()}
    by_name = dict(schedules) if isinstance(schedules, Mapping) else dict.fromkeys(terms, schedules)
    unknown = sorted(map(str, set(by_name) - set(terms)))
    if unknown or not by_name:
        msg = f"`schedules` must name terms of the criterion, {sorted(terms)}, got {unknown or 'none'}"
        raise ValueError(msg)
    for name, schedule in by_name.items():
        if not callable(schedule):
            msg = f"`schedules[{name!r}]` must be a function of the progress, got {type(schedule).__name__}"
            raise TypeError(msg)
    return by_name
