"""The runner of the experiments: rows that are kept, and a runner that goes on where it was stopped."""

from __future__ import annotations

import json
import os
from concurrent.futures import Future
from pathlib import Path

import pytest

from experiments import rows, run, tables, training, worlds

from support.small_world import RUN, SMALL


def test_rows_are_read_back_and_a_line_cut_off_is_not_there(tmp_path: Path) -> None:
    done = [{**RUN._replace(seed=seed)._asdict(), "ap": 1.5} for seed in range(3)]
    for row in done[:2]:
        rows.append_row(row, tmp_path)
    path = rows.results_file("demo", tmp_path)
    path.write_text(path.read_text() + json.dumps(done[2])[:20])  # killed while it was written
    assert list(rows.read_rows(["demo"], tmp_path).values()) == done[:2]
    rows.append_row(done[2], tmp_path)
    assert list(rows.read_rows(["demo"], tmp_path).values()) == done


def test_the_runner_goes_on_where_it_was_stopped(
    small_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Here:
        """Runs a job in this process, where the world is small."""

        def __init__(self, *arguments: object, **options: object) -> None: ...
        def __enter__(self) -> Here:
            return self

        def __exit__(self, *exception: object) -> None: ...
        def submit(self, function, *arguments):
            future = Future()
            future.set_result(function(*arguments))
            return future

    monkeypatch.setattr(run, "ProcessPoolExecutor", Here)
    monkeypatch.setenv("EXPERIMENTS_PARENT", str(os.getppid()))
    monkeypatch.setitem(tables.TABLES, "small", tables.Table("demo", (2,), ("alone", "features, decayed"), seeds=2))
    command = ["run.py", "small", "--results", str(tmp_path / "results"), "--cache", str(small_world)]
    monkeypatch.setattr("sys.argv", command)
    run.main()
    path = rows.results_file("demo", tmp_path / "results")
    first = path.read_text().splitlines()
    assert [json.loads(line)["seed"] for line in first] == [0, 0, 1, 1]
    assert {"commit", "versions", "processor", "command"} <= set(json.loads(first[0]))
    path.write_text("\n".join(first[:3]) + "\n")
    run.main()
    again = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["setting"], row["ap"]) for row in again] == [
        (row["setting"], row["ap"]) for row in map(json.loads, first)
    ]
    assert "100%, 0 min left" in capsys.readouterr().out


def test_a_part_of_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tables.TABLES, "small", tables.Table("demo", (2, 4), ("alone", "features"), seeds=2))
    assert len(run.wanted_runs("small")) == 8
    assert run.wanted_runs("small", ["features"], [4], [1, 7]) == [
        rows.Run("demo", "features", 4, 1),
        rows.Run("demo", "features", 4, 7),
    ]
    (only,) = run.wanted_runs("small", ["features"], [4], [7])
    assert run.command_of("small", only).endswith('run "small" --setting "features" --steps 4 --seed 7')


def test_a_missing_teacher_is_trained_before_the_first_run_that_needs_it(small_world: Path, tmp_path: Path) -> None:
    taught, alone = RUN._replace(setting="features"), RUN
    assert run.with_teachers([alone, taught], small_world) == [alone, taught]
    missing = run.with_teachers([alone, taught, taught._replace(seed=1)], tmp_path / "empty")
    assert missing == [alone, training.TeacherOf("demo", "teacher"), taught, taught._replace(seed=1)]


def test_no_run_begins_before_its_teacher_is_trained(tmp_path: Path) -> None:
    class Pool:
        """Notes the jobs, and finishes each at once: a teacher is there then."""

        def __init__(self) -> None:
            self.jobs: list[object] = []

        def submit(self, function: object, job: object, *others: object) -> Future:
            self.jobs.append(job)
            if isinstance(job, training.TeacherOf):
                training.teacher_file(*job, tmp_path).touch()
            future: Future = Future()
            future.set_result({})
            return future

    pool, taught, teacher = Pool(), RUN._replace(setting="features"), training.TeacherOf("demo", "teacher")
    jobs = [teacher, taught, RUN]
    done = [job for job, _ in run.finished(pool, jobs, 2, tmp_path)]
    assert pool.jobs == [teacher, RUN, taught]
    assert sorted(map(str, done)) == sorted(map(str, jobs))


def test_the_teacher_is_trained_again_when_its_recipe_changes(
    small_world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taught = RUN._replace(setting="features")
    assert run.has_what_it_needs(taught, small_world)
    recipe = worlds.Recipe(training.STUDENT, steps=2)
    monkeypatch.setitem(worlds.WORLDS, "demo", worlds.WORLDS["demo"]._replace(teachers={"teacher": recipe}))
    assert not run.has_what_it_needs(taught, small_world)


def test_students_of_another_kind_have_the_same_teacher(small_world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose training is not repeated, neither before nor within a queue."""
    other = worlds.WORLDS["demo"]._replace(student={**SMALL, "num_queries": 4})
    monkeypatch.setitem(worlds.WORLDS, "demo, 8 queries", other)
    taught = [rows.Run(world, "features", 3, 0) for world in ("demo", "demo, 8 queries")]
    assert run.with_teachers(taught, small_world) == taught
    elsewhere = small_world / "empty"
    assert run.with_teachers(taught, elsewhere) == [training.TeacherOf("demo", "teacher"), *taught]
    row = training.train_student(taught[1], small_world, lambda: None)
    assert row["world"] == "demo, 8 queries"
    assert training.detector("demo, 8 queries", other.student).queries.shape[0] == 4
