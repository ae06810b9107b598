"""The results: one JSON line for each training, appended when it is done, so that nothing done is ever lost."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path(__file__).parent / "results"

Row = dict[str, Any]


class Run(NamedTuple):
    """Which training: a row is found by these."""

    world: str
    setting: str
    steps: int
    seed: int


def run_of(row: Row) -> Run:
    """Return which training a row is of."""
    return Run(*(row[field] for field in Run._fields))


def results_file(world: str, results: Path = RESULTS) -> Path:
    """Return where the rows of a world are."""
    return results / f"{world.replace(', ', '-').replace(' ', '-')}.jsonl"


def read_rows(worlds: Iterable[str], results: Path = RESULTS) -> dict[Run, Row]:
    """Return all rows of some worlds. A line that was cut off while it was written counts as not there."""
    rows: dict[Run, Row] = {}
    for world in worlds:
        path = results_file(world, results)
        for line in path.read_text().splitlines() if path.exists() else []:
            if line.endswith("}"):
                row = json.loads(line)
                rows[run_of(row)] = row
    return rows


def append_row(row: Row, results: Path = RESULTS) -> None:
    """Add a row behind those that are there, on a line of its own."""
    path = results_file(row["world"], results)
    path.parent.mkdir(exist_ok=True)
    cut_off = path.exists() and not path.read_bytes().endswith(b"\n")
    with path.open("a") as file:
        file.write("\n" * cut_off + json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())
