"""Which trainings belong to which table."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from experiments.rows import Run
from experiments.settings import RECOMMENDED, WITH_DECODER


class Table(NamedTuple):
    """Settings and lengths of training in one world, each with so many seeds."""

    world: str
    steps: tuple[int, ...]
    settings: tuple[str, ...]
    seeds: int = 5

    def runs(self) -> Iterator[Run]:
        """Yield seed by seed, so that whenever the runner stops some seeds are complete."""
        for seed in range(self.seeds):
            for setting in self.settings:
                for steps in self.steps:
                    yield Run(self.world, setting, steps, seed)


FIRST = (
    "alone",
    "features, decayed",
    "logits + features",
    "best queries + features, decayed",
    "shared queries + features, decayed",
    "features / 2, decayed",
    "features",
    "logits + features, decayed",
    "logits / 4 + features, decayed",
    "logits through targets / 4 + features, decayed",
    "assigned group, decayed",
)
LOSSES = (  # one at a time
    "alone",
    "features, decayed",
    "logits, decayed",
    "logits / 4, decayed",
    "logits, joint, decayed",
    "logits, through targets, decayed",
    "logits of positives, decayed",
    "logits, classes of negatives too, decayed",
    "logits by confidence, decayed",
    "features, not relative, decayed",
    "features, official, decayed",
    "features, normaliser of the paper, decayed",
    "plain features, decayed",
    "plain features x3, decayed",
    "plain features, pearson, decayed",
    "plain features, cosine, decayed",
    "plain features, channel, decayed",
    "assigned group, decayed",
    "shared queries, decayed",
    "shared queries, uniform, decayed",
    "random queries, decayed",
)
BESIDE_OFFICIAL = (  # to be ahead of it at equal steps, too
    RECOMMENDED,
    WITH_DECODER,
    "features, official, decayed",
    "plain features x3, decayed",
    "plain features, pearson, x3, decayed",
    "features x3 + plain features x3, decayed",
    "features x3 + logits, joint, decayed",
    "features x3, decayed from the half on",
    "teacher's decoder and encoder at the beginning; features x3, decayed",
    "teacher's decoder at the beginning; features x3, decayed from the half on",
    "teacher's decoder at the beginning; features x3 + plain features, pearson, decayed",
    "teacher's decoder at the beginning; features x3 + logits, joint, decayed",
)
CANDIDATES = (  # compared on validation images, to choose a preset
    "best queries + features, decayed",
    "features x3, decayed",
    "features x6, decayed",
    "features x12, decayed",
    "features x24, decayed",
    "features x6",
    "best queries in the first quarter + features x6, decayed",
    "best queries in the first half + features x6, decayed",
    "best queries, assigned, in the first half + features x6, decayed",
    "best queries + features x6, decayed",
    "best queries in the first half + features, decayed",
    "best queries in the first quarter + features x3, decayed",
    "best queries in the first half + features x3, decayed",
    "best queries x2 in the first half + features x3, decayed",
    "best queries + features x3, decayed",
    "best queries x2 + features, decayed",
    "best queries + logits / 4 + features, decayed",
)
LONG = (
    "alone",
    RECOMMENDED,
    WITH_DECODER,
    "teacher's decoder at the beginning",
    "features, decayed",
    "best queries + features x3, decayed",
    "logits + features",
)
PRESETS = (*LONG, "best queries + features, decayed", "paper", "official")
PROBES = (
    "features, decayed; logits",
    "features, decayed; logits of positives",
    "features, decayed; logits, joint",
    "features, decayed; logits, classes of negatives too",
    "features, decayed; classes",
    "features, decayed; boxes",
    "features, decayed; boxes of negatives",
    "features, decayed; true classes",
    "features, decayed; true boxes",
    "features, decayed; logits through targets",
    "features, decayed; logits in the first half",
    "features, decayed; logits from the half on",
    "features, decayed; logits / 4",
    "features, decayed; logits of the last layer",
    "features, decayed; classes at temperature 2",
)
FEW_LABELS = (
    "alone",
    "features, decayed",
    "teacher's boxes too",
    "teacher's boxes too; features, decayed",
    "teacher's boxes too; logits + features, decayed",
    "logits + features, decayed",
)
CONTROLS = (
    "own group",
    "own group, decayed",
    "teacher's boxes as labels",
    "features of other images, decayed",
    "logits of other images, decayed",
    "teacher's boxes too",
    "teacher's boxes too; features, decayed",
    "a barely better teacher: features, decayed",
    "a barely better teacher: logits + features, decayed",
    "a student as teacher: features, decayed",
    "a student as teacher: logits + features, decayed",
)
GROUPS = (
    "alone",
    "teacher's queries at the beginning",
    "own group",
    "teacher's queries, matched afresh",
    "assigned group",
    "shared queries, decayed",
)
MODERN = (
    "alone",
    "features, decayed",
    RECOMMENDED,
    "teacher's decoder at the beginning; features, decayed",
    "teacher's decoder at the beginning",
    "logits, decayed",
    "best queries + features, decayed",
    "box distributions, decayed",
    "features + box distributions, decayed",
)
ALL = (
    "alone",
    "best queries + features, decayed",
    "logits + features, decayed",
    "all, decayed",
    "all, queries in the first half",
    "all, at held shares",
)
BEGINNINGS = (
    "alone",
    "features x3, decayed",
    "teacher's queries at the beginning",
    "teacher's decoder at the beginning",
    "teacher's decoder and best queries at the beginning",
    "teacher's decoder at the beginning; features x3, decayed",
    "teacher's decoder at the beginning; features x6, decayed",
    "teacher's decoder and best queries at the beginning; features x3, decayed",
    "teacher's decoder and encoder at the beginning; features x3, decayed",
)
STUDENTS = ("alone", "features, decayed", "best queries + features, decayed")
TABLES = {
    "demo": Table("demo", (600,), FIRST),
    "demo, losses": Table("demo", (600,), LOSSES),
    "demo, equal time": Table("demo", (700, 1200), ("alone",)),
    "main": Table("shapes", (2000,), FIRST),
    "main, equal time": Table("shapes", (2400, 4000), ("alone",), seeds=3),
    "logits alone": Table("shapes", (2000,), ("alone", "logits, decayed", "logits, joint, decayed")),
    "presets": Table("shapes", (2000,), PRESETS),
    "demo, presets": Table("demo", (600,), PRESETS),
    "demo, preset": Table("demo", (600,), CANDIDATES, seeds=2),
    "preset": Table("shapes", (2000,), CANDIDATES, seeds=2),
    "beside official": Table("shapes", (2000,), BESIDE_OFFICIAL, seeds=2),
    "curves": Table("shapes", (1000, 4000, 8000, 16000), ("alone", RECOMMENDED, WITH_DECODER), seeds=3),
    "long": Table("shapes", (6000,), LONG, seeds=3),
    "demo, controls": Table("demo", (600,), CONTROLS),
    "demo, beginnings": Table("demo", (600,), BEGINNINGS, seeds=3),
    "beginnings": Table("shapes", (2000,), BEGINNINGS, seeds=3),
    "demo, all": Table("demo", (600,), ALL),
    "why logits harm": Table("shapes", (2000,), PROBES, seeds=3),
    "demo, groups": Table("demo, 48 queries", (600,), GROUPS),
    **{
        f"demo, {student}": Table(f"demo, {student}", (600,), STUDENTS)
        for student in ("48 queries", "8 queries", "1 decoder layer", "half a backbone")
    },
    "RT-DETR": Table("RT-DETR", (1000,), MODERN[:7], seeds=3),
    "D-FINE": Table("D-FINE", (1000,), MODERN, seeds=3),
    "RT-DETR, 3x": Table("RT-DETR", (3000,), MODERN[:7], seeds=3),
    "digits": Table("digits", (2000,), PRESETS),
    "digits, equal time": Table("digits", (2400, 4000), ("alone",), seeds=3),
    "digits, long": Table("digits", (6000,), LONG, seeds=3),
    "digits, curves": Table("digits", (12000, 24000, 48000), ("alone", RECOMMENDED, WITH_DECODER), seeds=3),
    "crowds": Table("crowds", (2000,), PRESETS),
    "crowds, equal time": Table("crowds", (2400, 4000), ("alone",), seeds=3),
    "few labels": Table("shapes, few labels", (2000,), FEW_LABELS),
    "labels": Table(
        "shapes, jittered, gaps", (2000,), ("alone", "features, decayed", "logits + features, decayed"), seeds=3
    ),
}
