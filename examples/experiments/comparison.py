"""What rows say together: means with their spread, and differences paired by seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import NamedTuple

from experiments.rows import Row, Run

ALONE = "alone"


class Sample(NamedTuple):
    """Numbers, one of each seed."""

    mean: float
    deviation: float  # NaN for one number
    count: int

    @property
    def two_errors(self) -> float:
        """Two standard errors of the mean."""
        return 2 * self.deviation / math.sqrt(self.count)

    @property
    def verdict(self) -> str:
        """Whether the mean differs from 0 by more than two standard errors."""
        if self.count < 3:
            return "too few seeds"
        return "not told apart" if abs(self.mean) <= self.two_errors else "above" if self.mean > 0 else "below"


def sample(numbers: Iterable[float]) -> Sample | None:
    """Return mean and standard deviation (of n - 1), or None of nothing."""
    numbers = list(numbers)
    if not numbers:
        return None
    deviation = statistics.stdev(numbers) if len(numbers) > 1 else math.nan
    return Sample(statistics.fmean(numbers), deviation, len(numbers))


def of_setting(rows: Mapping[Run, Row], world: str, setting: str, steps: int) -> dict[int, Row]:
    """Return the rows of a setting by seed."""
    return {run.seed: row for run, row in sorted(rows.items()) if run[:3] == (world, setting, steps)}


def gain(rows: Mapping[Run, Row], run: Run, other: str = ALONE, field: str = "test_ap") -> Sample | None:
    """Return how far a setting is above another of the same world and length, paired by seed."""
    own, base = (of_setting(rows, run.world, setting, run.steps) for setting in (run.setting, other))
    return sample(own[seed][field] - base[seed][field] for seed in own if seed in base)


def gain_at_equal_time(rows: Mapping[Run, Row], run: Run, relative_time: float, other: str = ALONE) -> Sample | None:
    """Return how far a setting is above another (the student alone) that trained as long, its own schedule ending then.

    `relative_time` is that of a step of the setting beside one of the other. Between the two nearest lengths at which
    the other was trained, its AP is interpolated linearly in the logarithm of the length; only seeds with both count.
    """
    differences = []
    for seed, row in of_setting(rows, run.world, run.setting, run.steps).items():
        reached = ap_at(rows, run._replace(setting=other, seed=seed), run.steps * relative_time)
        if reached is not None:
            differences.append(row["test_ap"] - reached)
    return sample(differences)


def ap_at(rows: Mapping[Run, Row], run: Run, steps: float) -> float | None:
    """Return the test AP of a setting and seed after some steps; None beyond its longest or shortest training."""
    known = sorted(
        (other.steps, row["test_ap"]) for other, row in rows.items() if other._replace(steps=run.steps) == run
    )
    for (shorter, low), (longer, high) in pairwise(known):
        if shorter <= steps <= longer:
            part = math.log(steps / shorter) / math.log(longer / shorter)
            return low + part * (high - low)
    return None


def lengths(rows: Mapping[Run, Row], world: str, setting: str) -> list[int]:
    """Return at which lengths a setting was trained, the shortest first."""
    return sorted({run.steps for run in rows if (run.world, run.setting) == (world, setting)})


def gain_of_twice(rows: Mapping[Run, Row], run: Run) -> Sample | None:
    """Return what twice the steps bring, paired by seed, where there are rows of both."""
    short, long = (of_setting(rows, run.world, run.setting, steps) for steps in (run.steps, 2 * run.steps))
    return sample(long[seed]["test_ap"] - short[seed]["test_ap"] for seed in short if seed in long)


def plateau(rows: Mapping[Run, Row], world: str, setting: str = ALONE, less_than: float = 1.0) -> int | None:
    """Return the first length of which twice the steps bring less AP than that, or None where none is."""
    for steps in lengths(rows, world, setting):
        found = gain_of_twice(rows, Run(world, setting, steps, 0))
        if found is not None and found.mean < less_than:
            return steps
    return None


def steps_to(rows: Mapping[Run, Row], world: str, setting: str, ap: float) -> float | None:
    """Return after how many steps the mean of a setting reaches a test AP, interpolated as in `ap_at`."""
    known = [
        (steps, statistics.fmean(row["test_ap"] for row in of_setting(rows, world, setting, steps).values()))
        for steps in lengths(rows, world, setting)
    ]
    for (shorter, low), (longer, high) in pairwise(known):
        if low < ap <= high:
            return shorter * (longer / shorter) ** ((ap - low) / (high - low))
    return None


def time_of_step(rows: Mapping[Run, Row], world: str, setting: str) -> float | None:
    """Return the processor time of a step beside one of the student alone, or None where no two rows can be compared.

    Rows of one commit are compared, whatever their length: those of another may have been made on another machine.
    """
    seconds: dict[str, dict[str, list[float]]] = {}
    for run, row in rows.items():
        if run.world == world and run.setting in (setting, ALONE):
            of_commit = seconds.setdefault(row["commit"], {})
            of_commit.setdefault(run.setting, []).append(row["seconds"] / run.steps)
    found = sample(
        statistics.fmean(each[setting]) / statistics.fmean(each[ALONE])
        for each in seconds.values()
        if setting in each and ALONE in each
    )
    return None if found is None else found.mean


def steps_of_teacher(rows: Mapping[Run, Row], world: str) -> float | None:
    """Return how many steps of the student alone a teacher's training takes, compared as in `time_of_step`."""
    here = [row for run, row in rows.items() if run.world == world]
    teachers = {(row["commit"], row["teacher"]["digest"]): row["teacher"]["seconds"] for row in here if row["teacher"]}
    found = []
    for (commit, _), seconds in teachers.items():
        alone = [row["seconds"] / row["steps"] for row in here if (row["setting"], row["commit"]) == (ALONE, commit)]
        found += [seconds / statistics.fmean(alone)] if alone else []
    return statistics.fmean(found) if found else None


class TermGradient(NamedTuple):
    """What the gradient of a term is beside the others' at one moment of the training."""

    share: float  # of its length in the sum of all lengths, the detection loss's included
    cosine: float  # of the angle to the gradient of the detection loss


def gradient_of_term(rows: Iterable[Row], term: str, moment: int) -> TermGradient:
    """Return the means over some rows."""
    found = [row["gradients"] for row in rows]
    lengths = [{name: values[moment] for name, values in each["norms"].items()} for each in found]
    return TermGradient(
        statistics.fmean(each[term] / sum(each.values()) for each in lengths),
        statistics.fmean(each["cosines"][term][moment] for each in found),
    )


def cosine_between(rows: Iterable[Row], pair: str, moment: int) -> float | None:
    """Return the mean cosine of the angle between two terms, of the rows that have noted it."""
    found = [row["gradients"]["between"][pair][moment] for row in rows if "between" in row["gradients"]]
    return statistics.fmean(found) if found else None


def instability_at(rows: Iterable[Row], progress: float) -> Sample | None:
    """Return how much of the matching has changed within a twentieth of the training, up to that progress."""
    noted = [(row["steps"], row["instability"]) for row in rows if row.get("instability")]
    return sample(min(seen, key=lambda point: abs(point[0] - progress * steps))[1] for steps, seen in noted)
