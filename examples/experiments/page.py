"""Write docs/explanation/evidence.md and its figures from the rows: `python -m experiments.page`, from `examples`.

The words are in `evidence.md.in`, where `{{name argument | argument}}` is replaced by what a function here returns.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

from experiments.comparison import (
    ALONE,
    Sample,
    cosine_between,
    gain,
    gain_at_equal_time,
    gain_of_twice,
    gradient_of_term,
    instability_at,
    lengths,
    of_setting,
    plateau,
    sample,
    steps_of_teacher,
    steps_to,
    time_of_step,
)
from experiments.plot import Line, line_plot
from experiments.rows import RESULTS, Row, Run, read_rows
from experiments.settings import RECOMMENDED, SETTINGS, WITH_DECODER
from experiments.tables import TABLES
from experiments.worlds import WORLDS

DOCS = Path(__file__).parents[2] / "docs" / "explanation"
TEMPLATE = Path(__file__).parent / "evidence.md.in"
NO_ROWS = "*No rows yet.*"
COLUMNS = ("setting", "seeds", "AP", "test AP", "test AP50", "gain", "time", "gain at equal time")
GRADIENT_COLUMNS = ("setting", "term", "share of the gradient, in %", "cosine to the detection loss's")
MOMENTS = (1, 3, 5)  # after a tenth, a half and 19 twentieths of the training
IN_FIGURES = {
    ALONE: "student alone",
    RECOMMENDED: "recommended",
    WITH_DECODER: "… with the decoder",
    "paper": "paper",
    "official": "official",
}


class Evidence:
    """All rows, and what a step of each setting costs: every public method answers a marker of the template."""

    def __init__(self, results: Path = RESULTS) -> None:
        self._rows = read_rows(WORLDS, results)
        cost, self._directions = (read_json(results / name) for name in ("cost.json", "directions.json"))
        self._relative_time: dict[str, float] = cost.get("relative", {})
        self._seconds: float = cost.get("seconds per step alone", 0.0)

    def table(self, name: str, reference: str = ALONE) -> str:
        """All settings of a table and the one that they are compared with, the best first."""
        runs = self._runs(name, reference)
        lines = [COLUMNS, ("---",) * len(COLUMNS), *(self._cells(run, reference) for run in runs)]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines) if runs else NO_ROWS

    def gradients(self, name: str, reference: str = ALONE) -> str:
        """How long the gradient of each term of a table is, and in which direction it goes."""
        lines: list[tuple[str, ...]] = [GRADIENT_COLUMNS, ("---",) * len(GRADIENT_COLUMNS)]
        for run in self._runs(name, reference):
            rows = self._of(run)
            for term in SETTINGS[run.setting].parts:
                found = [gradient_of_term(rows, term, moment) for moment in MOMENTS]
                shares = ", ".join(f"{100 * each.share:.0f}" for each in found)
                cosines = ", ".join(f"{each.cosine:.2f}" for each in found)
                lines.append((run.setting, term.replace("_", " "), shares, cosines))
        return "\n".join(f"| {' | '.join(line)} |" for line in lines) if len(lines) > 2 else NO_ROWS

    def between(self, name: str, reference: str = ALONE) -> str:
        """Whether the terms of a setting pull in one direction."""
        lines = ["| setting | terms | cosine between them |", "|---|---|---|"]
        for run in self._runs(name, reference):
            for one, other in combinations(SETTINGS[run.setting].parts, 2):
                found = [cosine_between(self._of(run), f"{one}, {other}", moment) for moment in MOMENTS]
                if None not in found:
                    terms = f"{one} and {other}".replace("_", " ")
                    lines.append(f"| {run.setting} | {terms} | {', '.join(f'{cosine:.2f}' for cosine in found)} |")
        return "\n".join(lines) if len(lines) > 2 else NO_ROWS

    def instability(self, name: str, reference: str = ALONE) -> str:
        """How much the matching of the student to its labels still changes."""
        lines = ["| setting | after a tenth | a half | at the end |", "|---|---|---|---|"]
        for run in self._runs(name, reference):
            found = [instability_at(self._of(run), progress) for progress in (0.1, 0.5, 1.0)]
            if None not in found:
                lines.append(f"| {run.setting} | {' | '.join(percent(each) for each in found)} |")
        return "\n".join(lines) if len(lines) > 2 else NO_ROWS

    def directions(self) -> str:
        """Where the parts of the distillation pull a student that is trained alone."""
        lines = ["| steps | part | length | detection loss | its classes | its boxes |", "|---|---|---|---|---|---|"]
        for steps, parts in self._directions.items():
            for name, (length, *cosines) in parts.items():
                lines.append(
                    f"| {steps} | {name} | {length:.2f} | {' | '.join(f'{cosine:.2f}' for cosine in cosines)} |"
                )
        return "\n".join(lines) if self._directions else NO_ROWS

    def verdicts(self, name: str, reference: str = ALONE) -> str:
        """Which settings are above and below the one that they are compared with."""
        by_verdict: dict[str, list[str]] = {}
        for run in self._runs(name, reference):
            found = gain(self._rows, run, reference)
            if run.setting != reference and found is not None:
                by_verdict.setdefault(found.verdict, []).append(run.setting)
        known = [verdict for verdict in ("above", "not told apart", "below", "too few seeds") if verdict in by_verdict]
        names = {verdict: ", ".join(f"*{name}*" for name in by_verdict[verdict]) for verdict in known}
        lines = [f"- {verdict.capitalize()}: {names[verdict]}." for verdict in known]
        return "\n".join(lines)

    def teachers(self, name: str) -> str:
        """How good the teachers of a table are."""
        teachers = [row["teacher"] for run in self._runs(name, ALONE) for row in self._of(run) if row["teacher"]]
        said: dict[str, dict[str, str]] = {}  # by digest, too: on another machine a recipe gives another teacher
        for each in teachers:
            facts = f"{each['ap']:.1f} AP, {each['test_ap']:.1f} on the test images, after {each['seconds']:.0f} s"
            said.setdefault(each["name"], {})[each["digest"]] = facts
        names = {name: "The teacher" if name == "teacher" else f'The teacher "{name}"' for name in said}
        return " ".join(
            f"{names[name]}{', made anew for some rows,' * (len(facts) > 1)} has {'; and '.join(facts.values())}."
            for name, facts in said.items()
        )

    def teacher_steps(self, world: str) -> str:
        """How many steps of the student alone the training of the teacher of a world takes as long as."""
        steps = steps_of_teacher(self._rows, world)
        return "an unknown number of" if steps is None else f"{round(steps, -2):,.0f}"

    def gain(self, name: str, setting: str, other: str = ALONE) -> str:
        """How far a setting of a table is above another in test AP."""
        table = TABLES[name]
        return gained(gain(self._rows, Run(table.world, setting, table.steps[0], 0), other))

    def equal_time(self, name: str, setting: str) -> str:
        """How far a setting of a table is above the student alone that was trained for as much processor time."""
        table = TABLES[name]
        run, time = Run(table.world, setting, table.steps[0], 0), self._relative_time.get(setting)
        return gained(None if time is None else gain_at_equal_time(self._rows, run, time))

    def lengths(self, world: str) -> str:
        """The student alone at each length, what twice the steps bring it, and what the recommended settings do."""
        lines = [
            "| steps | alone | recommended | gain | with the decoder | gain | twice the steps, alone |",
            "|---" * 7 + "|",
        ]
        for steps in lengths(self._rows, world, ALONE):
            alone, *others = (Run(world, setting, steps, 0) for setting in (ALONE, RECOMMENDED, WITH_DECODER))
            cells = [self._spread(alone, "test_ap")]
            for run in others:
                found = gain(self._rows, run)
                cells += ["", ""] if found is None else [self._spread(run, "test_ap"), difference(found)]
            twice = gain_of_twice(self._rows, alone)
            if any(cells[1:]):
                lines.append(f"| {steps:,} | {' | '.join(cells)} | {'' if twice is None else difference(twice)} |")
        return "\n".join(lines) if len(lines) > 2 else NO_ROWS

    def plateau(self, world: str) -> str:
        """What is gained where twice the steps bring less than 1 AP, and how soon the recommended setting is there."""
        steps, known = plateau(self._rows, world), lengths(self._rows, world, ALONE)
        if not known:
            return NO_ROWS
        alone = Run(world, ALONE, steps or known[-1], 0)
        reached = self._sample(alone, "test_ap").mean
        found = gained(gain(self._rows, alone._replace(setting=RECOMMENDED)))
        words = [
            "At no length here do twice the steps bring the student alone less than 1 AP. "
            f"After the longest, {alone.steps:,} steps, it has {reached:.1f} AP."
            if steps is None
            else f"The student alone is at its plateau after {alone.steps:,} steps, with {reached:.1f} AP: twice the "
            f"steps bring {gained(gain_of_twice(self._rows, alone))}.",
            f"Recommended, there: {found}.",
        ]
        sooner = steps_to(self._rows, world, RECOMMENDED, reached)
        if sooner is not None and RECOMMENDED in self._relative_time:
            share = sooner * self._relative_time[RECOMMENDED] / alone.steps
            words.append(
                f"It has the student's AP after about {round(sooner, -2):,.0f} steps, {100 * share:.0f} % of the time."
            )
        return " ".join(words)

    def plateau_steps(self, world: str) -> str:
        """After how many steps the student alone is at its plateau, or the longest training where it is not."""
        return f"{plateau(self._rows, world) or max(lengths(self._rows, world, ALONE), default=0):,}"

    def cell(self, world: str, steps: str, setting: str) -> str:
        """How far a setting is above the student alone, and in how many seeds."""
        found = gain(self._rows, Run(world, setting, int(steps.replace(",", "")), 0))
        return "" if found is None else f"{difference(found)} ({found.count})"

    def ahead_at_equal_time(self, name: str, setting: str, other: str) -> str:
        """How far a setting that was trained for as much processor time as another took is above that."""
        table, times = TABLES[name], self._relative_time
        if setting not in times or other not in times:
            return gained(None)
        run = Run(table.world, other, table.steps[0], 0)
        behind = gain_at_equal_time(self._rows, run, times[other] / times[setting], setting)
        return gained(None if behind is None else behind._replace(mean=-behind.mean))

    def recommended(self) -> str:
        """The name of the setting that is the preset."""
        return RECOMMENDED

    def with_decoder(self) -> str:
        """The name of the setting that is the preset in a student that begins with its teacher's decoder."""
        return WITH_DECODER

    def time(self, setting: str) -> str:
        """What a step takes beside one of the student alone."""
        return f"{self._relative_time[setting]:.2f}" if setting in self._relative_time else "a time not measured"

    def provenance(self) -> str:
        """What the rows were made with. Each has its own command and commit."""
        rows = list(self._rows.values())
        versions = sorted({", ".join(f"{name} {number}" for name, number in row["versions"].items()) for row in rows})
        facts = [
            f"{len(rows)} rows in `examples/experiments/results`, each with its command, commit, versions and seconds.",
            f"Commits: {', '.join(sorted({row['commit'] for row in rows}))}.",
            f"Versions: {'; '.join(versions)}.",
            f"Processors: {', '.join(sorted({row['processor'] for row in rows}))}, one thread.",
        ]
        return "\n".join(facts)

    def figures(self) -> dict[str, str]:
        """SVGs by name: test AP against steps, and against processor time, for each world that has a plateau."""
        drawn = {}
        for world in ("shapes", "digits"):
            points = {setting: found for setting in IN_FIGURES if (found := self._points(world, setting))}
            lines = [Line(IN_FIGURES[setting], found) for setting, found in points.items()]
            minutes = [
                Line(
                    IN_FIGURES[setting],
                    [(x * self._relative_time[setting] * self._seconds / 60, *y) for x, *y in found],
                )
                for setting, found in points.items()
                if setting in self._relative_time
            ]
            drawn[f"evidence-{world}-steps.svg"] = line_plot(f"Test AP, {world}", "training steps", lines)
            drawn[f"evidence-{world}-time.svg"] = line_plot(f"Test AP, {world}", "minutes of processor time", minutes)
        return drawn

    def _runs(self, name: str, reference: str) -> list[Run]:
        """The settings of a table that have rows, and the reference, the best first."""
        world, (steps,), settings, _ = TABLES[name]
        runs = [Run(world, setting, steps, 0) for setting in dict.fromkeys((reference, *settings))]
        return sorted(filter(self._of, runs), key=lambda run: -self._sample(run, "test_ap").mean)

    def _of(self, run: Run) -> list[Row]:
        return list(of_setting(self._rows, run.world, run.setting, run.steps).values())

    def _sample(self, run: Run, field: str) -> Sample:
        return sample(row[field] for row in self._of(run))

    def _spread(self, run: Run, field: str) -> str:
        return spread(self._sample(run, field))

    def _cells(self, run: Run, reference: str) -> list[str]:
        """A setting as the cells of a line."""
        found = None if run.setting == reference else gain(self._rows, run, reference)
        time = self._time_of(run)
        equal = None if time is None or run.setting == ALONE else gain_at_equal_time(self._rows, run, time)
        return [
            run.setting,
            str(len(self._of(run))),
            *(self._spread(run, field) for field in ("ap", "test_ap", "test_ap50")),
            "" if found is None else difference(found),
            "" if time is None else f"{time:.2f}",
            "" if equal is None else difference(equal),
        ]

    def _time_of(self, run: Run) -> float | None:
        """Time of a step beside that of the student alone: measured in turns, or else by the rows themselves."""
        if not WORLDS[run.world].family:
            return self._relative_time.get(run.setting)
        return time_of_step(self._rows, run.world, run.setting)

    def _points(self, world: str, setting: str) -> list[tuple[float, float, float]]:
        """Length, test AP and two standard errors of a setting."""
        found = [
            (steps, self._sample(Run(world, setting, steps, 0), "test_ap"))
            for steps in lengths(self._rows, world, setting)
        ]
        return [(steps, own.mean, own.two_errors if own.count > 1 else 0.0) for steps, own in found]


def read_json(path: Path) -> dict[str, Any]:
    """Return what a file holds, or nothing."""
    return json.loads(path.read_text()) if path.exists() else {}


def spread(numbers: Sample) -> str:
    """Return mean and standard deviation."""
    return f"{numbers.mean:.1f} ± {numbers.deviation:.1f}" if numbers.count > 1 else f"{numbers.mean:.1f}"


def percent(numbers: Sample) -> str:
    """Return mean and standard deviation of shares."""
    return f"{spread(Sample(100 * numbers.mean, 100 * numbers.deviation, numbers.count))} %"


def difference(numbers: Sample) -> str:
    """Return the mean of a difference and two standard errors."""
    return f"{numbers.mean:+.1f} ± {numbers.two_errors:.1f}" if numbers.count > 1 else f"{numbers.mean:+.1f}"


def gained(numbers: Sample | None) -> str:
    """Return a difference in words."""
    if numbers is None:
        return "no rows yet"
    return f"{difference(numbers)} AP ({numbers.count} seed{'s' * (numbers.count > 1)})"


def filled(template: str, answer: Callable[..., str]) -> str:
    """Return the template with `answer(name, *arguments)` in place of each marker."""

    def replaced(marker: re.Match[str]) -> str:
        name, _, arguments = marker[1].partition(" ")
        return answer(name, *(arguments.split(" | ") if arguments else ()))

    innermost = r"\{\{([^{}]*)\}\}"
    while re.search(innermost, template):
        template = re.sub(innermost, replaced, template)
    return template


def pieces(results: Path = RESULTS) -> dict[str, str]:
    """Return the page and its figures by file name."""
    evidence = Evidence(results)
    page = filled(TEMPLATE.read_text(), lambda name, *arguments: getattr(evidence, name)(*arguments))
    page = re.sub(r"\n{3,}", "\n\n", re.sub(r" +\n", "\n", page))  # of what has no rows yet
    return {"evidence.md": page, **evidence.figures()}


if __name__ == "__main__":
    for file, content in pieces().items():
        (DOCS / file).write_text(content)
