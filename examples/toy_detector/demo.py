"""Train a teacher, then students with and without it: `python examples/toy_detector/demo.py [--quick | --full]`."""

from __future__ import annotations

import argparse
import queue
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from draw import draw_comparison
from runs import ALONE, RECOMMENDED, SETTINGS, Scale, train_student, train_teacher
from train import Histories, History

QUICK = Scale(images=4000, teacher_steps=1000, student_steps=600)
FULL = Scale(images=6000, teacher_steps=3000, student_steps=2000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="a few minutes on two cores (the default)")
    size.add_argument("--full", action="store_true", help="longer trainings, all settings on all seeds")
    parser.add_argument("--seeds", type=int, help="seeds of each comparison (default: 3, full: 5)")
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--out", type=Path, default=Path("toy_distillation.png"), help="where the picture goes")
    arguments = parser.parse_args()

    seeds = range(arguments.seeds or (5 if arguments.full else 3))
    if arguments.full:
        scale, plan = FULL, dict.fromkeys(SETTINGS, seeds)
    else:  # the other settings get one seed each, which shows no more than their order
        scale, plan = QUICK, {setting: seeds[:1] for setting in SETTINGS if setting != "+ all three"}
        plan |= {ALONE: seeds, RECOMMENDED: seeds}
    with tempfile.TemporaryDirectory() as directory:
        teacher, students = train_all(Path(directory), scale, plan, arguments.workers)
        print_table(teacher, students)
        draw_comparison(students, Path(directory), arguments.out)
    print(f"\nThe picture is in {arguments.out}.")


def train_all(directory: Path, scale: Scale, plan: dict[str, Iterable[int]], workers: int) -> tuple[History, Histories]:
    """Train the teacher and the students alone side by side, then all the students that need the teacher."""
    context = get_context("spawn")
    runs = [(setting, seed) for setting, seeds in plan.items() for seed in seeds]
    total = scale.teacher_steps + scale.student_steps * len(runs)
    # One thread a process: small tensors gain nothing from more, and the numbers are the same each time.
    with (
        context.Manager() as manager,
        ProcessPoolExecutor(workers, context, initializer=torch.set_num_threads, initargs=(1,)) as pool,
    ):
        steps_done = manager.Queue()
        bar = ProgressBar(total, steps_done)
        shared = (directory, scale, partial(steps_done.put, 1))
        teacher = pool.submit(train_teacher, *shared)
        futures = {run: pool.submit(train_student, *run, *shared) for run in runs if run[0] == ALONE}
        bar.watch([teacher], "teacher and students alone")
        teacher.result()  # raises here what went wrong there
        futures |= {run: pool.submit(train_student, *run, *shared) for run in runs if run[0] != ALONE}
        bar.watch(list(futures.values()), "students with the teacher")
        students: Histories = {setting: {} for setting in plan}
        for (setting, seed), future in futures.items():
            students[setting][seed] = future.result()
        return teacher.result(), students


class ProgressBar:
    """A bar on stderr that moves with the steps reported to a queue."""

    def __init__(self, total: int, steps_done: queue.Queue[int]) -> None:
        self.total, self.steps_done = total, steps_done
        self.done, self.tenths = 0, 0
        self.start = time.monotonic()

    def watch(self, futures: list[Future[Any]], label: str) -> None:
        """Draw until the futures are done."""
        while not all(future.done() for future in futures):
            time.sleep(0.5)
            while not self.steps_done.empty():
                self.done += self.steps_done.get()
            self.draw(label)

    def draw(self, label: str) -> None:
        """Redraw the bar in a terminal; in a log, add a line for every tenth of the work."""
        part = self.done / self.total
        minutes, seconds = divmod(int(time.monotonic() - self.start), 60)
        bar = f"[{'#' * round(32 * part):.<32}] {part:4.0%}  {minutes}:{seconds:02}  {label}"
        if sys.stderr.isatty():
            print(f"\r{bar:<80}", end="\n" if self.done == self.total else "", file=sys.stderr, flush=True)
        elif int(10 * part) > self.tenths:
            self.tenths = int(10 * part)
            print(bar, file=sys.stderr, flush=True)


def print_table(teacher: History, students: Histories) -> None:
    """Print AP and AP50, mean over seeds, the cost of a run, and the gain of each seed over the student alone."""
    print(f"{'setting':<22}{'seeds':>5}{'AP':>7}{'AP50':>7}{'seconds':>9}   gain in AP over the student alone, by seed")
    print(table_row("teacher", [teacher]))
    for setting, runs in students.items():
        gains = [run.ap[-1] - students[ALONE][seed].ap[-1] for seed, run in runs.items() if setting != ALONE]
        print((table_row(setting, list(runs.values())) + "   " + "  ".join(f"{gain:+.1f}" for gain in gains)).rstrip())


def table_row(name: str, runs: list[History]) -> str:
    """Return the means of some runs as a line of the table."""
    ap, ap50, seconds = (
        mean(values) for values in zip(*((run.ap[-1], run.ap50[-1], run.seconds) for run in runs), strict=True)
    )
    return f"{name:<22}{len(runs):>5}{ap:>7.1f}{ap50:>7.1f}{seconds:>9.0f}"


if __name__ == "__main__":
    main()
