"""What the rows of the experiments say together, and the page that is written from them."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from experiments import check, comparison, page, plot, rows, training, worlds
from experiments.settings import RECOMMENDED

# --------------------------------------------------------------------------------------------------------- comparison


def made_rows(values: dict[tuple[str, int, int], float]) -> dict[rows.Run, rows.Row]:
    """Rows of one world by setting, steps and seed, with a test AP."""
    made = {rows.Run("shapes", *key): {"test_ap": value} for key, value in values.items()}
    return {run: {**run._asdict(), **row} for run, row in made.items()}


def test_gains_are_paired_by_seed() -> None:
    values = {("alone", 2000, seed): ap for seed, ap in enumerate((50.0, 54.0, 58.0))}
    values |= {("better", 2000, seed): ap for seed, ap in enumerate((53.0, 58.0, 63.0, 90.0))}
    found = comparison.gain(made_rows(values), rows.Run("shapes", "better", 2000, 0))
    assert (found.mean, found.deviation, found.count) == (4.0, 1.0, 3)
    assert found.two_errors == pytest.approx(2 / 3**0.5)  # the fourth seed has no partner
    assert found.verdict == "above"


@pytest.mark.parametrize(
    ("numbers", "verdict"),
    [
        ((1.0, 1.1), "too few seeds"),
        ((1.0, 1.1, 0.9), "above"),
        ((-1.0, -1.1, -0.9), "below"),
        ((1.0, -1.0, 2.0), "not told apart"),
    ],
)
def test_verdicts(numbers: tuple[float, ...], verdict: str) -> None:
    assert comparison.sample(numbers).verdict == verdict


def test_equal_time_is_a_longer_training_of_the_student_alone() -> None:
    values = {("alone", 2000, 0): 50.0, ("alone", 8000, 0): 60.0, ("alone", 2000, 1): 50.0, ("twice", 2000, 0): 57.0}
    values |= {("twice", 2000, 1): 58.0}  # whose student alone was not trained longer
    run = rows.Run("shapes", "twice", 2000, 0)
    found = comparison.gain_at_equal_time(made_rows(values), run, relative_time=2.0)
    assert (found.mean, found.count) == (pytest.approx(2.0), 1)  # 4,000 steps are half of the way: 55
    assert comparison.gain_at_equal_time(made_rows(values), run, relative_time=5.0) is None
    quick = {("quick", 2000, 0): 52.0, ("quick", 4000, 0): 59.0}
    found = comparison.gain_at_equal_time(made_rows(values | quick), run, relative_time=2.0, other="quick")
    assert (found.mean, found.count) == (-2.0, 1)


def test_a_plateau_is_where_twice_the_steps_bring_less_than_1_ap() -> None:
    values = {("alone", 1000, 0): 40.0, ("alone", 2000, 0): 50.0, ("alone", 2000, 1): 52.0, ("alone", 3000, 0): 50.1}
    values |= {("alone", 4000, 0): 52.0, ("alone", 4000, 1): 52.5}  # 1.25 more than half of it
    assert comparison.gain_of_twice(made_rows(values), rows.Run("shapes", "alone", 2000, 0)).mean == 1.25
    assert comparison.plateau(made_rows(values), "shapes") is None  # 3,000 steps have no 6,000 beside them
    values |= {("alone", 8000, 0): 52.5, ("alone", 8000, 1): 53.9, ("alone", 16000, 0): 52.5}
    assert comparison.plateau(made_rows(values), "shapes") == 4000
    assert comparison.plateau(made_rows(values), "shapes", less_than=0.5) == 8000
    assert comparison.plateau(made_rows(values), "shapes", "features") is None


def test_steps_to_an_ap_are_interpolated_in_the_logarithm() -> None:
    values = {("better", 1000, 0): 40.0, ("better", 1000, 1): 42.0, ("better", 4000, 0): 51.0}
    assert comparison.steps_to(made_rows(values), "shapes", "better", 46.0) == pytest.approx(2000)
    assert comparison.steps_to(made_rows(values), "shapes", "better", 51.0) == pytest.approx(4000)
    assert comparison.steps_to(made_rows(values), "shapes", "better", 51.1) is None
    assert comparison.steps_to(made_rows(values), "shapes", "better", 40.0) is None  # before the shortest


def test_the_time_of_a_step_is_that_of_rows_made_side_by_side() -> None:
    """A row of a slower machine, whose commit has no row of the student alone, says nothing."""
    made = {
        ("alone", 1000, 0): ("a", 100.0),
        ("features", 1000, 0): ("a", 120.0),
        ("alone", 3000, 1): ("b", 600.0),
        ("features", 1000, 1): ("b", 220.0),
        ("features", 3000, 1): ("b", 660.0),
        ("features", 1000, 2): ("c", 900.0),
    }
    found = {rows.Run("RT-DETR", *key): {"commit": commit, "seconds": spent} for key, (commit, spent) in made.items()}
    assert comparison.time_of_step(found, "RT-DETR", "features") == pytest.approx(1.15)  # of 1.2 and 1.1
    assert comparison.time_of_step(found, "RT-DETR", "alone") == 1.0
    assert comparison.time_of_step(found, "RT-DETR", "logits") is None
    assert comparison.time_of_step(found, "D-FINE", "features") is None


def test_a_teacher_took_as_long_as_so_many_steps_of_the_student_beside_it() -> None:
    def row(setting: str, steps: int, seed: int, commit: str, seconds: float, teacher: dict | None = None) -> rows.Row:
        run = rows.Run("shapes", setting, steps, seed)
        return {**run._asdict(), "commit": commit, "seconds": seconds, "teacher": teacher}

    slow, quick = {"digest": "a", "seconds": 900.0}, {"digest": "b", "seconds": 350.0}
    made = [row("alone", 1000, 0, "slow", 100.0), row("features", 1000, 0, "slow", 110.0, slow)]
    made += [row("alone", 2000, 1, "quick", 100.0), row("features", 2000, 1, "quick", 110.0, quick)]
    made += [row("features", 1000, 2, "alone nowhere", 50.0, quick)]
    found = {rows.run_of(each): each for each in made}
    assert comparison.steps_of_teacher(found, "shapes") == pytest.approx(8000)  # of 9,000 and 7,000
    assert comparison.steps_of_teacher(found, "digits") is None


def test_the_gradient_of_a_term_is_a_share_of_all_and_has_a_direction() -> None:
    norms = {"detection": [3.0, 1.0], "logits": [1.0, 2.0], "feature": [2.0, 1.0]}
    cosines = {"detection": [1.0, 1.0], "logits": [0.5, 0.25], "feature": [0.0, -0.5]}
    other = {"norms": {**norms, "logits": [5.0, 0.0]}, "cosines": {**cosines, "logits": [0.1, 0.25]}}
    found = [{"gradients": {"norms": norms, "cosines": cosines}}, {"gradients": other}]
    assert comparison.gradient_of_term(found, "logits", 0) == pytest.approx(((1 / 6 + 0.5) / 2, 0.3))
    assert comparison.gradient_of_term(found[:1], "feature", 1) == pytest.approx((0.25, -0.5))


def test_older_rows_have_not_noted_cosines_between_terms_or_changes_of_the_matching() -> None:
    noted = {"gradients": {"between": {"a, b": [0.5, -0.5]}}, "steps": 100, "instability": [[10, 0.4], [50, 0.2]]}
    other = {"gradients": {"between": {"a, b": [0.1, -0.1]}}, "steps": 200, "instability": [[20, 0.2], [200, 0.1]]}
    older = {"gradients": {}, "steps": 100}
    assert comparison.cosine_between([noted, older, other], "a, b", 1) == pytest.approx(-0.3)
    assert comparison.cosine_between([older], "a, b", 1) is None
    found = comparison.instability_at([noted, older, other], 0.1)
    assert (found.mean, found.count) == (pytest.approx(0.3), 2)
    assert comparison.instability_at([noted, other], 1.0).mean == pytest.approx(0.15)
    assert comparison.instability_at([older], 0.1) is None


# --------------------------------------------------------------------------------------------------------------- page


def test_page_and_figures_are_those_of_the_rows() -> None:
    """They are generated: `python -m experiments.page`, in the folder `examples`."""
    pieces = page.pieces()
    assert set(pieces) == {path.name for path in page.DOCS.glob("evidence*")}
    for name, piece in pieces.items():
        assert piece == (page.DOCS / name).read_text(), f"{name} is not that of the rows: run the command above"


def test_settings_are_what_they_were_when_their_rows_were_made() -> None:
    """Where a loss has changed since, its rows have to be made anew, or the setting needs another name."""
    made = {
        run.setting: row["fingerprint"] for run, row in rows.read_rows(worlds.WORLDS).items() if "fingerprint" in row
    }
    assert made
    for setting, losses in made.items():
        found = training.fingerprint(setting)
        assert found == pytest.approx(losses, rel=1e-3, abs=1e-6), f"{setting} has changed since its rows were made"


def test_the_page_says_what_is_gained_at_the_plateau_and_how_soon(tmp_path: Path) -> None:
    values = {("alone", 1000): 40.0, ("alone", 2000): 50.0, ("alone", 4000): 50.5}
    values |= {(RECOMMENDED, 1000): 48.0, (RECOMMENDED, 2000): 52.0, (RECOMMENDED, 4000): 52.0}
    for (setting, steps), ap in values.items():
        for seed in (0, 1):
            run = rows.Run("shapes", setting, steps, seed)
            rows.append_row({**run._asdict(), "test_ap": ap + seed}, tmp_path)
    (tmp_path / "cost.json").write_text(json.dumps({"relative": {RECOMMENDED: 1.25}}))
    evidence = page.Evidence(tmp_path)
    said = evidence.plateau("shapes")
    assert "after 2,000 steps, with 50.5 AP: twice the steps bring +0.5 ± 0.0 AP (2 seeds)." in said
    assert "Recommended, there: +2.0 ± 0.0 AP (2 seeds)." in said
    assert "after about 1,400 steps, 88 % of the time." in said  # half of the way, 1.25 times as long a step
    assert "| 2,000 | 50.5 ± 0.7 | 52.5 ± 0.7 | +2.0 ± 0.0 |  |  | +0.5 ± 0.0 |" in evidence.lengths("shapes")
    assert evidence.cell("shapes", evidence.plateau_steps("shapes"), RECOMMENDED) == "+2.0 ± 0.0 (2)"
    assert evidence.cell("shapes", "8,000", RECOMMENDED) == ""
    assert evidence.plateau("digits") == page.NO_ROWS
    (tmp_path / "cost.json").unlink()
    assert page.Evidence(tmp_path).plateau("shapes").endswith("(2 seeds).")  # nothing is known of time


def test_a_setting_that_is_quicker_is_ahead_at_equal_time(tmp_path: Path) -> None:
    for setting, steps, ap in (("paper", 2000, 50.0), (RECOMMENDED, 2000, 52.0), (RECOMMENDED, 4000, 55.0)):
        rows.append_row({**rows.Run("shapes", setting, steps, 0)._asdict(), "test_ap": ap}, tmp_path)
    (tmp_path / "cost.json").write_text(json.dumps({"relative": {RECOMMENDED: 1.0, "paper": 2.0}}))
    evidence = page.Evidence(tmp_path)
    assert evidence.ahead_at_equal_time("presets", RECOMMENDED, "paper") == "+5.0 AP (1 seed)"
    assert evidence.ahead_at_equal_time("presets", RECOMMENDED, "official") == "no rows yet"
    assert evidence.lengths("digits") == page.NO_ROWS


def test_the_page_says_that_no_length_is_the_plateau(tmp_path: Path) -> None:
    for (setting, steps), ap in {("alone", 1000): 40.0, ("alone", 2000): 50.0, (RECOMMENDED, 2000): 53.0}.items():
        rows.append_row({**rows.Run("shapes", setting, steps, 0)._asdict(), "test_ap": ap}, tmp_path)
    evidence = page.Evidence(tmp_path)
    assert (evidence.plateau_steps("shapes"), evidence.plateau_steps("digits")) == ("2,000", "0")
    said = evidence.plateau("shapes")
    assert said.startswith("At no length here do twice the steps bring the student alone less than 1 AP")
    assert said.endswith("After the longest, 2,000 steps, it has 50.0 AP. Recommended, there: +3.0 AP (1 seed).")


@pytest.mark.parametrize(
    ("numbers", "ticks"),
    [([0.9, 5.0], [0.5, 1, 2, 4, 8]), ([1000, 6000], [1000, 2000, 4000, 8000]), ([2.0], [2, 4]), ([], [1, 2])],
)
def test_ticks_are_doublings_around_all_numbers(numbers: list[float], ticks: list[float]) -> None:
    assert plot.doublings(numbers) == ticks


def test_a_marker_is_replaced_by_what_its_function_says() -> None:
    template = "a {{gain demo, controls | 5 | x}} b {{provenance}}"
    assert page.filled(template, lambda *words: repr(words)) == (
        "a ('gain', 'demo, controls', '5', 'x') b ('provenance',)"
    )


def test_a_marker_may_have_another_as_its_argument() -> None:
    assert page.filled("{{gain main | {{recommended}}}}", lambda *words: "/".join(words)) == "gain/main/recommended"


def test_a_figure_has_each_line_and_no_label_on_another() -> None:
    lines = [plot.Line(name, [(1000, y, 1.0), (2000, y + 1, 0.5)]) for name, y in (("first", 50.0), ("second", 50.1))]
    svg = ElementTree.fromstring(plot.line_plot("AP", "steps", lines))
    space = "{http://www.w3.org/2000/svg}"
    assert len(svg.findall(f"{space}polyline")) == 2
    heights = [float(label.get("y")) for label in svg.iter(f"{space}text") if label.text in ("first", "second")]
    assert abs(heights[0] - heights[1]) >= 15


# -------------------------------------------------------------------------------------------------------------- check


def test_an_interval_is_where_99_of_100_further_values_fall() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(4000, 6, generator=generator)
    inside = 0
    for *known, new in draws.tolist():
        low, high = check.interval(comparison.sample(known))
        inside += low <= new <= high
    assert inside / len(draws) == pytest.approx(0.99, abs=0.006)
