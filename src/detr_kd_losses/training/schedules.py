"""Weights that change while training goes on: plain functions from progress in [0, 1] to a factor in [0, 1].

A product of schedules is a schedule. The options of every term are attributes, so a training loop writes

    criterion.terms["feature"].weight = 20 * cosine_decay(step / steps, start=0.5)

or multiplies the sum of the terms by the factor, and need not run the teacher at all where the factor is 0.
"""

from __future__ import annotations

import math

from detr_kd_losses._validation import validate_in_unit_interval

__all__ = ["cosine_decay", "linear_warmup", "stop_after"]


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
