"""Partners through the targets that student and teacher share."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import detr_kd_losses as dkl

from support import cases, oracles
from support.comparisons import to_meta


def assignments(seed, lead, students, teachers, num_targets):
    rng = np.random.default_rng(seed)
    everyone = np.ones((*lead, num_targets), dtype=bool)
    return [torch.tensor(cases.random_assignment(rng, lead, rows, everyone)) for rows in (students, teachers)]


@pytest.mark.parametrize("lead", [(), (2,), (3, 2)])
@pytest.mark.parametrize(
    ("students", "teachers", "targets"),
    [(5, 7, 4), (7, 5, 4), (3, 3, 9), (4, 0, 3), (0, 4, 3), (4, 4, 0), (1, 1, 1)],
)
def test_the_partner_has_the_same_target(students, teachers, targets, lead):
    student, teacher = assignments(0, lead, students, teachers, targets)
    partner = dkl.match_through_targets(student, teacher, targets)
    assert partner.dtype == torch.int64
    assert np.array_equal(partner, oracles.match_through_targets(student.numpy(), teacher.numpy(), targets))


def test_it_turns_around():
    """Student and teacher exchanged, the pairs are the same."""
    student, teacher = assignments(1, (3, 2), 6, 8, 7)
    partner = dkl.match_through_targets(student, teacher, 7)
    assert torch.equal(dkl.match_through_targets(teacher, student, 7), dkl.invert_assignment(partner, 8))
    assert (partner >= 0).any()


@pytest.mark.parametrize(
    ("student", "teacher", "number", "error", "match"),
    [
        ([0], torch.tensor([0]), 1, TypeError, "`student_assignment` must be a torch.Tensor, got list"),
        (torch.tensor([0]).int(), torch.tensor([0]), 1, TypeError, "`student_assignment` must have dtype torch.int64"),
        (torch.tensor([0]), torch.tensor([0.0]), 1, TypeError, "`teacher_assignment` must have dtype torch.int64, got"),
        (torch.tensor(0), torch.tensor([0]), 1, ValueError, r"`student_assignment` must have shape \(..., N\), got"),
        (torch.tensor([0]), torch.tensor(0), 1, ValueError, r"`teacher_assignment` must have shape \(..., M\), got"),
        (
            torch.tensor([[0]]),
            torch.tensor([0]),
            1,
            ValueError,
            r"`student_assignment` and `teacher_assignment` must have the same dimensions \(...\), got \(1,\) and \(\)",
        ),
        (torch.tensor([0]), to_meta(torch.tensor([0])), 1, ValueError, "`teacher_assignment` must be on the device of"),
        (torch.tensor([0]), torch.tensor([0]), 1.5, TypeError, "`num_targets` must be a whole number, got 1.5"),
        (torch.tensor([2]), torch.tensor([0]), 2, ValueError, r"`student_assignment` must be in \[-1, 2\), got 2 at"),
        (torch.tensor([0]), torch.tensor([-2]), 2, ValueError, r"`teacher_assignment` must be in \[-1, 2\), got -2 at"),
        (torch.tensor([0]), torch.tensor([0]), -1, ValueError, "`num_targets` must be finite and at least 0, got -1"),
    ],
)
def test_errors(student, teacher, number, error, match):
    with pytest.raises(error, match=match):
        dkl.match_through_targets(student, teacher, number)
