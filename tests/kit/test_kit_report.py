"""The table of all laws about one function."""

from __future__ import annotations

import pytest
import torch

import detr_kd_losses as dkl
from detr_kd_losses import testing


def solver(cost):
    """Without masks, and greedy where there is more than one problem."""
    assignment = dkl.linear_sum_assignment(cost)
    return assignment if cost.ndim < 3 or len(cost) < 2 else assignment.flip(-1)


@pytest.fixture(scope="module")
def report():
    return testing.law_report(testing.ASSIGNMENT_LAWS, solver, skip=("planted",), max_examples=100)


def test_every_law_has_a_verdict(report):
    assert list(report.verdicts) == list(testing.ASSIGNMENT_LAWS)
    assert report.names("broken")[0] == "optimal"
    assert report.names("not applicable") == ("masks",)
    assert report.names("skipped") == ("planted",)
    assert "deterministic" in report.names("passed")
    assert not report.kept


def test_a_verdict_has_the_error_and_its_first_line(report):
    verdict = report.verdicts["optimal"]
    assert str(verdict.error).startswith("law broken: optimal: ")
    assert verdict.reason == str(verdict.error).splitlines()[1] != ""
    assert isinstance(report.verdicts["masks"].error, testing.LawNotApplicable)
    assert report.verdicts["masks"].reason.startswith("needs the options row_mask, column_mask")
    assert report.verdicts["deterministic"].error is None


def test_it_is_printed_as_a_table(report):
    lines = str(report).splitlines()
    rows = [line for line in lines[:-1] if not line.startswith(" ")]
    assert [row.split()[0] for row in rows] == list(testing.ASSIGNMENT_LAWS)
    for row, (name, law) in zip(rows, testing.ASSIGNMENT_LAWS.items(), strict=True):
        assert row == f"{name:13}  {report.verdicts[name].outcome:14}  {law.sentence}"
    reasons = [line for line in lines if line.startswith(" ")]
    assert [line.split("> ")[1] for line in reasons] == [v.reason for v in report.verdicts.values() if v.reason]
    assert lines[-1].startswith("solver: ")
    assert "1 not applicable" in lines[-1]


def test_a_good_function_is_kept():
    report = testing.law_report(testing.TARGET_MATCHING_LAWS, dkl.match_targets, max_examples=3)
    assert report.kept
    assert str(report).endswith("match_targets: 7 passed")


def test_what_is_not_applicable_is_not_kept():
    def without_masks(cost):
        return dkl.linear_sum_assignment(cost)

    assert not testing.law_report(testing.ASSIGNMENT_LAWS, without_masks, max_examples=2).kept
    assert testing.law_report(testing.ASSIGNMENT_LAWS, without_masks, skip=("masks",), max_examples=2).kept


def test_a_function_of_another_signature_has_a_table_of_one_line_each():
    report = testing.law_report(testing.DETECTION_LAWS, lambda logits: torch.zeros(()))
    assert set(report.names("not applicable")) == set(testing.DETECTION_LAWS)
    assert len(str(report).splitlines()) == 2 * len(testing.DETECTION_LAWS) + 1


def test_skip_has_names_of_laws():
    with pytest.raises(ValueError, match=r"`skip` must have names among .*, got \['no'\]"):
        testing.law_report(testing.ASSIGNMENT_LAWS, solver, skip=("no",))


@pytest.mark.parametrize("law", testing.ASSIGNMENT_LAWS.values(), ids=str)
def test_one_line_makes_a_test_of_each_law(law, request):
    law(dkl.linear_sum_assignment, max_examples=2)
    assert request.node.name.endswith(f"[{law.name}]")
