"""Which teacher stage teaches which student stage."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

from detr_kd_losses import select_stages


def stages(depth, num_student_stages, **options):
    return select_stages(torch.arange(depth), num_student_stages, **options).tolist()


@pytest.mark.parametrize("depth", range(1, 8))
@pytest.mark.parametrize("num_student_stages", range(1, 8))
def test_even(depth, num_student_stages):
    exact = [Fraction((k + 1) * depth, num_student_stages) for k in range(num_student_stages)]
    nearest = [math.floor(stage + Fraction(1, 2)) - 1 for stage in exact]
    selected = stages(depth, num_student_stages)
    assert selected == [max(stage, 0) for stage in nearest]
    assert selected[-1] == depth - 1
    assert selected == sorted(selected)


@pytest.mark.parametrize(
    ("depth", "num_student_stages", "stage_map", "expected"),
    [
        (6, 3, "even", [1, 3, 5]),
        (3, 6, "even", [0, 0, 1, 1, 2, 2]),
        (4, 4, "even", [0, 1, 2, 3]),
        (6, 3, "last", [5, 5, 5]),
        (6, 3, [5, 0, 5], [5, 0, 5]),
        (6, 2, (-1, -6), [5, 0]),
        (2, 2, [0, 1], [0, 1]),
    ],
)
def test_maps(depth, num_student_stages, stage_map, expected):
    assert stages(depth, num_student_stages, stage_map=stage_map) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64, torch.bool])
def test_any_tensor(dtype):
    teacher = torch.randint(0, 2, (6, 2, 3), generator=torch.Generator().manual_seed(0)).to(dtype)
    selected = select_stages(teacher, 3)
    assert selected.dtype == dtype
    torch.testing.assert_close(selected, teacher[[1, 3, 5]], rtol=0, atol=0)


def test_default_is_even():
    assert stages(6, 4) == stages(6, 4, stage_map="even") != stages(6, 4, stage_map="last")


@pytest.mark.parametrize(
    ("teacher", "num_student_stages", "stage_map", "error", "match"),
    [
        ([1.0], 1, "even", TypeError, "`teacher` must be a torch.Tensor, got list"),
        (torch.tensor(1.0), 1, "even", ValueError, r"`teacher` must have shape \(L, \.\.\.\), got \(\)"),
        (torch.ones(0, 2), 1, "even", ValueError, "`teacher` must have at least one stage in dimension 0, got shape"),
        (torch.ones(6), 0, "even", ValueError, "`num_student_stages` must be greater than 0, got 0"),
        (torch.ones(6), 3, "first", ValueError, "`stage_map` must be one of 'even', 'last', got 'first'"),
        (torch.ones(6), 3, [0, 1], ValueError, "`stage_map` must have one teacher stage for each of the 3 student"),
        (torch.ones(6), 2, [0, 6], ValueError, r"`stage_map` must have stages in \[-6, 6\), got \[0, 6\]"),
        (torch.ones(6), 2, [-7, 0], ValueError, r"`stage_map` must have stages in \[-6, 6\), got \[-7, 0\]"),
    ],
)
def test_errors(teacher, num_student_stages, stage_map, error, match):
    with pytest.raises(error, match=match):
        select_stages(teacher, num_student_stages, stage_map=stage_map)
