"""What a step of each setting costs, in turns: `python -m experiments.cost`, from the folder `examples`.

The seconds of the rows depend on what else the machine did. Here a busy moment falls on all settings.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import torch
from runs import STUDENT
from train import train

import detr_kd_losses as dkl
from benchmarks.measure import device_name
from experiments.rows import RESULTS
from experiments.run import CACHE
from experiments.settings import SETTINGS
from experiments.tables import TABLES
from experiments.training import detector, ready_teacher, weight_schedule
from experiments.worlds import all_images

FILE = RESULTS / "cost.json"
WORLD, STEPS, TURNS = "demo", 8, 7
# The tables whose settings are measured.
MEASURED = (
    "main",
    "presets",
    "demo, losses",
    "demo, preset",
    "beside official",
    "demo, controls",
    "demo, all",
    "beginnings",
)


def main() -> None:
    """Measure every setting of some tables, and write what its step costs beside that of a student alone."""
    torch.set_num_threads(1)
    settings = list(dict.fromkeys(setting for name in MEASURED for setting in TABLES[name].settings))
    times: dict[str, list[float]] = {setting: [] for setting in settings}
    for turn in range(TURNS + 1):
        for setting in settings:
            seconds = seconds_of(setting, CACHE)
            if turn > 0:  # the first is a warm-up
                times[setting].append(seconds / STEPS)
    ratios = {
        setting: statistics.median(own / alone for own, alone in zip(times[setting], times["alone"], strict=True))
        for setting in settings
    }
    result = {
        "processor": device_name(),
        "seconds per step alone": round(statistics.median(times["alone"]), 4),
        "relative": {setting: round(ratio, 3) for setting, ratio in ratios.items()},
    }
    FILE.write_text(json.dumps(result, indent=1) + "\n")


def seconds_of(setting: str, cache: Path) -> float:
    """Return the processor time of a training of a few steps, from the beginning of its schedules to their end."""
    parts, change = SETTINGS[setting].parts, SETTINGS[setting].change
    torch.manual_seed(0)
    model = detector(WORLD, STUDENT)
    criterion = dkl.DETRDistillationLoss({name: part.make() for name, part in parts.items()})
    teacher = ready_teacher(WORLD, SETTINGS[setting].teacher, cache) if parts else None
    if change is not None:
        teacher = change(teacher, criterion.terms)
    images = all_images(WORLD)
    history = train(
        model,
        images,
        images.select(torch.arange(20)),
        steps=STEPS,
        seed=0,
        teacher=teacher,
        distillation=criterion if parts else None,
        schedule=weight_schedule(criterion, parts),
        evaluations=1,
    )
    return history.seconds


if __name__ == "__main__":
    main()
