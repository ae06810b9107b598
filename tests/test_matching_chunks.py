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
    monkeypatch.setattr(matching, "_LARGEST_COST_CPU", 100)
    shapes = []
    for name in ("detection_cost", "distillation_cost", "box_cost"):
        function = getattr(matching, name)

        def recorded(*args, function=function, **options):
            cost = function(*args, **options)
            shapes.append(cost.shape)
            return cost

        monkeypatch.setattr(matching, name, recorded)
    return shapes


@pytest.mark.parametrize("positives_first", [False, True])
def test_match_teacher(positives_first, costs_built, monkeypatch):
    logits, boxes = torch.randn(3, 4, 7, 5), torch.rand(3, 4, 7, 4)
    positive = torch.rand(3, 4, 6) < 0.4 if positives_first else None
    arguments = logits, boxes, logits[:, :, 1:].flip(2), boxes[:, :, 1:].flip(2)
    in_parts = dkl.match_teacher(*arguments, teacher_positive=positive)
    assert all(math.prod(shape) <= 100 for shape in costs_built)
    assert len(costs_built) == 6 * (1 + positives_first)
    monkeypatch.undo()
    assert in_parts.equal(dkl.match_teacher(*arguments, teacher_positive=positive))


def test_match_targets(costs_built, monkeypatch):
    logits, boxes, mask = torch.randn(3, 4, 7, 5), torch.rand(3, 4, 7, 4), torch.rand(4, 6) < 0.5
    arguments = logits, boxes, torch.randint(0, 5, (4, 6)), torch.rand(4, 6, 4), mask
    in_parts = dkl.match_targets(*arguments)
    assert len(costs_built) == 6
    monkeypatch.undo()
    assert in_parts.equal(dkl.match_targets(*arguments))


def test_a_single_problem_may_be_larger_than_a_part(costs_built):
    logits, boxes = torch.randn(2, 20, 5), torch.rand(2, 20, 4)
    assert dkl.match_teacher(logits, boxes, logits, boxes).sort(-1).values.equal(torch.arange(20).expand(2, -1))
    assert len(costs_built) == 2
