"""The numbers of the pages on cost are those of the results that their commands write."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/explanation/cost.md").read_text()


def results(name):
    return json.loads((ROOT / f"examples/benchmarks/results/{name}--cpu.json").read_text())


COSTS = results("kd_cost_table")
FAMILIES = ("Deformable DETR", "Conditional DETR")
WAYS = {
    "concatenated group": "concatenation",
    "replayed group, memory projected once": "replay, memory kept",
    "replayed by the adapter": "replay by the adapter",
    "replayed group, memory projected again": "replay",
}
CRITERIA = ("default", "Eq. 9", "official")


def table(heading):
    """The rows of the tables below a heading, as lists of cells without emphasis."""
    section = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0].split("\n### ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    return [[cell.replace("*", "").replace("`", "").replace('"', "").strip() for cell in row] for row in rows]


def shares(row, group):
    """What the results say of a row, as the page writes it, family by family."""
    way = next(way for name, way in WAYS.items() if row[0].startswith(name))
    criterion = next(name for name in CRITERIA if name in row[0])
    entries = [COSTS["images"]["800 x 1333"][f]["groups"][group]["share"][criterion][way] for f in FAMILIES]
    return [f"{entry['distillation'] / 1e9:.2f} G, {100 * entry['share']:.2f} %" for entry in entries]


@pytest.mark.parametrize(
    ("heading", "group", "count"),
    [("Operations", "all queries", 9), ("With the best third of the teacher's queries", "best third", 6)],
)
def test_shares(heading, group, count):
    rows = [row for row in table(heading) if row[0].startswith(tuple(WAYS))]
    assert len(rows) == count
    for row in rows:
        assert [cell for cell in row[1:] if cell] == shares(row, group), row[0]


def test_what_the_operations_are_of():
    rows = {row[0]: row for row in table("Operations")}
    for column, family in zip((1, 3), FAMILIES, strict=True):
        result = COSTS["images"]["800 x 1333"][family]
        sides = result["parameters"], result["basic"]
        trained, basic = (
            " / ".join(f"{side[role][key] / unit:.{digits}f}" for role in ("teacher", "student"))
            for side, key, unit, digits in zip(sides, ("trained", "total"), (1e6, 1e9), (2, 1), strict=True)
        )
        assert rows["parameters, teacher / student, M"][column] == trained
        assert rows["basic cost, teacher / student, G"][column] == basic


def test_where_it_goes():
    rows = {row[0]: row[1:3] for row in table("Where it goes")}
    for name, path in {
        "query group, concatenated": ("query_group", "concatenation"),
        "query group, replayed, memory projected once": ("query_group", "replay, memory kept"),
        "query group, replayed, memory projected again": ("query_group", "replay"),
        "feature loss, default": ("criterion", "default", "feature"),
        "feature loss, Eq. 9": ("criterion", "Eq. 9", "feature"),
        "feature loss, official": ("criterion", "official", "feature"),
    }.items():
        for family, cell in zip(FAMILIES, rows[name], strict=True):
            value = COSTS["images"]["800 x 1333"][family]["groups"]["all queries"]
            for key in path:
                value = value[key]
            assert cell == f"{value / 1e9:.2f}", name


def test_memory_of_single_losses():
    cases = results("loss_memory")["cases"].values()
    measured = {
        (f"{case['float32']['inputs'] / 1e6:.1f}", *(f"{case[dtype]['ratio']:.2f}" for dtype in case)) for case in cases
    }
    rows = [tuple(row[1:]) for row in table("Memory of single losses") if re.match(r"\d", row[1])]
    assert len(rows) == 8
    assert set(rows) <= measured


def test_time_and_memory():
    parts = results("criterion")["parts"]
    rows = {row[0]: row[1:] for row in table("Time and memory")}
    for name, part in {"logits": "logits", "features": "feature", "query group": "group", "all": "all"}.items():
        (times, peaks), result = (parts[part][key] for key in ("milliseconds", "peak_bytes")), parts[part]
        assert rows[name] == [
            *(f"{times[form]['median']:.0f}" for form in ("plain", "package")),
            f"{result['speed_up']:.1f} \N{MULTIPLICATION SIGN}",
            *(f"{peaks[form] / 1e6:.0f}" for form in ("plain", "package")),
            f"{100 * result['memory_share']:.0f} %",
        ]


def test_a_teacher_on_disk():
    settings = results("offline")["settings"]
    rows = [row for row in table("A teacher on disk") if "image" in row[1]]
    assert len(rows) == len(settings)
    for kept, files, *numbers in rows:
        result = settings[f"{kept}, files {files}"]
        size = result["bytes_per_image"]
        rates = [
            f"{result[key]:.0f}" for key in ("written_per_second", "read_per_second", "read_per_second_by_2_workers")
        ]
        assert numbers == [f"{size / 1e3:.1f}", numbers[1], *rates]
        assert float(numbers[1]) == pytest.approx(size * 118287 / 1e9, abs=0.05)  # the images of COCO's training set
