"""Large batches are matched in parts, with the same result."""

from __future__ import annotations

import math

import pytest
import torch

import detr_kd_losses as dkl
from detr_kd_losses import matching


@pytest.fixture
def costs_built(monkeypatch):
    """Shapes of the costs that are built, at most 100 entries at a time."""
    monkeypatch.setattr(matching, "_BUILT_AT_ONCE", 100)
    monkeypatch.setattr(matching, "_SOLVED_AT_ONCE", 250)
    shapes = []
    for name in ("detection_cost", "distillation_cost", "distillation_costs"):
        function = getattr(matching, name)

        def recorded(*args, function=function, **options):
            costs = function(*args, **options)
            shapes.extend(cost.shape for cost in (costs if isinstance(costs, tuple) else [costs]))
            return costs

        monkeypatch.setattr(matching, name, recorded)
    return shapes


@pytest.mark.parametrize("positives_first", [False, True])
def test_no_larger_cost_is_built(positives_first, costs_built, monkeypatch):
    logits, boxes = torch.randn(3, 4, 7, 5), torch.rand(3, 4, 7, 4)
    positive = torch.rand(3, 4, 6) < 0.4 if positives_first else None
    arguments = logits, boxes, logits[:, :, 1:].flip(2), boxes[:, :, 1:].flip(2)
    in_parts = dkl.match_teacher(*arguments, teacher_positive=positive)
    assert sum(math.prod(shape) for shape in costs_built) == 3 * 4 * 7 * 6 * (1 + positives_first)
    assert all(math.prod(shape) <= 100 for shape in costs_built)
    monkeypatch.undo()
    assert in_parts.equal(dkl.match_teacher(*arguments, teacher_positive=positive))


def test_a_single_problem_may_be_larger_than_a_part(costs_built):
    logits, boxes = torch.randn(2, 20, 5), torch.rand(2, 20, 4)
    assert dkl.match_teacher(logits, boxes, logits, boxes).sort(-1).values.equal(torch.arange(20).expand(2, -1))
    assert len(costs_built) == 2
