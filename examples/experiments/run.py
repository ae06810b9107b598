"""Do the trainings of some tables that have not been done yet: `python -m experiments.run TABLE ... [--workers 2]`.

From the folder `examples`. A row is written when its training is done: stop this whenever you like, and call it again.
All tables of one seed come before the next seed, so that a comparison is complete for the seeds that there are.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import device_name
from experiments.rows import RESULTS, Row, Run, append_row, read_rows
from experiments.settings import SETTINGS
from experiments.tables import TABLES
from experiments.training import TeacherOf, teacher_file, train_student, train_teacher
from experiments.worlds import WORLDS

CACHE = Path(__file__).parent / "cache"
ROOT = Path(__file__).parents[2]

Job = Run | TeacherOf


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", help=f"of {', '.join(TABLES)}; without one: what there is and is missing")
    parser.add_argument("--workers", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--setting", action="append", help="these settings alone")
    parser.add_argument("--seed", type=int, action="append", help="these seeds alone, others than a table's, too")
    parser.add_argument("--steps", type=int, action="append", help="these lengths alone")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the rows")
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder of the trained teachers")
    arguments = parser.parse_args()
    if not arguments.tables:
        show_what_is_missing(arguments.results)
        return
    done = read_rows(WORLDS, arguments.results)
    missing: dict[Run, str] = {}  # and the table that asks for it first
    for name in arguments.tables:
        for run in wanted_runs(name, arguments.setting, arguments.steps, arguments.seed):
            if run not in done:
                missing.setdefault(run, name)
    runs = sorted(missing, key=lambda run: run.seed)
    do_runs(runs, missing, workers=arguments.workers, results=arguments.results, cache=arguments.cache)


def wanted_runs(
    table: str, settings: list[str] | None = None, steps: list[int] | None = None, seeds: list[int] | None = None
) -> list[Run]:
    """Return the runs of a table, or a part of them, or the same with other seeds."""
    runs = list(TABLES[table].runs())
    if seeds is not None:
        runs = [run._replace(seed=seed) for seed in seeds for run in runs if run.seed == 0]
    return [run for run in runs if run.setting in (settings or [run.setting]) and run.steps in (steps or [run.steps])]


def show_what_is_missing(results: Path) -> None:
    """Print how many rows of each table there are."""
    done = read_rows(WORLDS, results)
    for name, table in TABLES.items():
        runs = list(table.runs())
        print(f"{name:<24}{sum(run in done for run in runs):>4} of {len(runs)} rows")


def do_runs(runs: list[Run], tables: dict[Run, str], *, workers: int, results: Path, cache: Path) -> None:
    """Train the students, each teacher before the first of them that needs it, and append a row for each."""
    jobs = with_teachers(runs, cache)
    facts = provenance()
    progress = Progress(sum(steps_of(job) for job in jobs))
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=start_worker, initargs=(os.getpid(),)) as pool:
        for job, row in finished(pool, jobs, workers, cache):
            if isinstance(job, Run):
                append_row({**row, **facts, "command": command_of(tables[job], job)}, results)
            progress.say(steps_of(job), summary(row))


def with_teachers(runs: list[Run], cache: Path) -> list[Job]:
    """Return the runs, with each teacher that is missing before the first run that needs it."""
    jobs: list[Job] = []
    planned: set[Path] = set()
    for run in runs:
        if not has_what_it_needs(run, cache):
            teacher = teacher_of(run)
            file = teacher_file(*teacher, cache)
            jobs += [] if file in planned else [teacher]
            planned.add(file)
        jobs.append(run)
    return jobs


def teacher_of(run: Run) -> TeacherOf | None:
    """Return the teacher that a run needs."""
    setting = SETTINGS[run.setting]
    return TeacherOf(run.world, setting.teacher) if setting.needs_teacher else None


def has_what_it_needs(run: Run, cache: Path) -> bool:
    """Return whether the teacher of a run is trained, if it has one."""
    teacher = teacher_of(run)
    return teacher is None or teacher_file(*teacher, cache).exists()


def steps_of(job: Job) -> int:
    """Return how many steps a job takes."""
    return job.steps if isinstance(job, Run) else WORLDS[job.world].teachers[job.name].steps


def finished(pool: ProcessPoolExecutor, jobs: list[Job], workers: int, cache: Path) -> Iterator[tuple[Job, Row]]:
    """Yield each job that is done with its row, and keep the workers busy with those whose teacher is there."""
    running: dict[Future[Row], Job] = {}
    while jobs or running:
        ready = [job for job in jobs if isinstance(job, TeacherOf) or has_what_it_needs(job, cache)]
        for job in ready[: workers - len(running)]:
            running[pool.submit(trainer_of(job), job, cache, end_with_parent)] = job
            jobs = [other for other in jobs if other != job]
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            yield running.pop(future), future.result()


def trainer_of(job: Job) -> Callable[[Any, Path, Callable[[], None]], Row]:
    """Return what trains a job's model."""
    if not WORLDS[job.world].family:
        return train_student if isinstance(job, Run) else train_teacher
    from experiments import modern  # noqa: PLC0415 - transformers takes seconds to import

    return modern.train_student if isinstance(job, Run) else modern.train_teacher


def start_worker(parent: int) -> None:
    """Use one thread: small tensors gain nothing from more, and the numbers are the same each time."""
    torch.set_num_threads(1)
    os.environ["EXPERIMENTS_PARENT"] = str(parent)


def end_with_parent() -> None:
    """End this worker when whoever started it is gone: nobody would write its row."""
    if os.getppid() != int(os.environ["EXPERIMENTS_PARENT"]):
        os._exit(1)


def command_of(table: str, run: Run) -> str:
    """Return what repeats a row."""
    return f'python -m experiments.run "{table}" --setting "{run.setting}" --steps {run.steps} --seed {run.seed}'


def provenance() -> Row:
    """Return what the numbers of a row depend on, beside its run: the commit, and "+" where code is not committed."""
    head = git("rev-parse", "--short=10", "HEAD")
    changed = git("status", "--porcelain", "--", "src", "examples/toy_detector", "examples/experiments/*.py")
    versions = {name: version(name) for name in ("torch", "numpy", "scipy", "detr_kd_losses")}
    return {"commit": head + "+" * bool(changed), "versions": versions, "processor": device_name()}


def git(*arguments: str) -> str:
    """Return what git prints in this repository."""
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def summary(row: Row) -> str:
    """Return what came out of a training in a few words."""
    who = ", ".join(str(value) for name, value in row.items() if name in ("world", "setting", "name", "steps", "seed"))
    return f"{who}: AP {row['ap']:.1f}, test {row['test_ap']:.1f}, {row['seconds']:.0f} s"


class Progress:
    """A line for each training that is done, and how long the rest will take at this pace."""

    def __init__(self, steps: int) -> None:
        self.steps, self.done = steps, 0
        self.start = time.monotonic()

    def say(self, steps: int, what: str) -> None:
        """Count the steps of a training, and print it."""
        self.done += steps
        left = (time.monotonic() - self.start) * (self.steps / self.done - 1) / 60
        print(f"[{self.done / self.steps:4.0%}, {left:.0f} min left] {what}", flush=True)


if __name__ == "__main__":
    main()
