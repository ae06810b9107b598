"""Do two short trainings with new seeds, and say whether they fall within the spread of the rows: ten minutes.

`python -m experiments.check`, from the folder `examples`.
"""

from __future__ import annotations

import math
import sys

from scipy.stats import t

from experiments.comparison import ALONE, Sample, of_setting, sample
from experiments.rows import Run, read_rows
from experiments.run import CACHE, do_runs
from experiments.settings import WITH_DECODER
from experiments.tables import TABLES

TABLE, SETTINGS, SEED = "demo, presets", (ALONE, WITH_DECODER), 1000


def main() -> None:
    """Compare a new row of each setting with those of the table."""
    world, (steps,) = TABLES[TABLE].world, TABLES[TABLE].steps
    runs = [Run(world, setting, steps, SEED) for setting in SETTINGS]
    folder = CACHE / "check"
    do_runs(runs, dict.fromkeys(runs, TABLE), workers=1, results=folder, cache=CACHE)
    new, known = read_rows([world], folder), read_rows([world])
    within = []
    for run in runs:
        others = sample(row["test_ap"] for row in of_setting(known, *run[:3]).values())
        low, high = interval(others)
        value = new[run]["test_ap"]
        within.append(low <= value <= high)
        print(f"{run.setting}: {value:.1f}, {'' if within[-1] else 'not '}within {low:.1f} to {high:.1f}")
    sys.exit(not all(within))


def interval(others: Sample) -> tuple[float, float]:
    """Return where 99 of 100 further values fall, if all are normally distributed."""
    width = t.ppf(0.995, others.count - 1) * others.deviation * math.sqrt(1 + 1 / others.count)
    return others.mean - width, others.mean + width


if __name__ == "__main__":
    main()
