"""A model that answers its own losses, under a wider teacher in two processes: as one, and none waits for another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from support import decoder_parts
from support.answering import distilled
from support.two_processes import run_together
from support.wrapped import wider_teachers_losses

PARTS = (slice(0, 2), slice(2, 3))  # images of each process, in double precision
OVERFLOW, WEIGHT_ZERO = "overflow on one rank", "weight 0 of the group on one rank"

Movements = dict[str, Tensor]


def batch(part: slice = slice(None)) -> dict[str, Any]:
    labels = [one | {"boxes": one["boxes"].double()} for one in decoder_parts.targets(3)]
    return {"images": decoder_parts.images(3).double()[part], "targets": labels[part]}


class Training:
    """Gradient descent of student and projections; with a rank, in that process of several."""

    def __init__(self, rank: int | None = None, *, sync: bool = True) -> None:
        torch.manual_seed(rank or 0)  # the processes draw other projections, and begin with those of the first
        distillation = wider_teachers_losses(sync=sync)
        self.student, self.distillation = distilled(distillation, queries=10, width=24)
        for part in (self.student, self.distillation, self.distillation.teacher.module):
            part.double()
        self.optimizer = torch.optim.SGD(self.student.parameters(), lr=0.01)
        self.distillation.learn(self.optimizer, max_norm=None)
        self.model = self.student
        if rank is not None:  # with many buckets, as a model of its size has: each is a collective, in one order
            self.model = DistributedDataParallel(self.student, find_unused_parameters=True, bucket_cap_mb=1e-3)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)

    def step(self, samples: dict[str, Any], happening: str = "") -> Movements:
        """How every weight has moved."""
        learned = {**dict(self.student.named_parameters()), **dict(self.distillation.distillation.named_parameters())}
        learned |= dict(self.distillation.query_projection.named_parameters(prefix="query_projection"))
        before = {name: weight.detach().clone() for name, weight in learned.items()}
        self.distillation.distillation.terms["query_group"].weight = 0.0 if happening == WEIGHT_ZERO else 2.0
        loss, _ = self.model(samples)
        self.optimizer.zero_grad()
        self.scaler.scale(loss * float("inf") if happening == OVERFLOW else loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return {name: weight.detach() - before[name] for name, weight in learned.items()}


def be_one_of_two(rank: int, folder: Path) -> None:
    """Leave three steps for each happening in a file; it happens in the second, on rank 1."""
    results = {}
    for happening in (OVERFLOW, WEIGHT_ZERO):
        # A term of weight 0 counts nothing: nothing must be counted together, then.
        training = Training(rank, sync=happening == OVERFLOW)
        own = batch(PARTS[rank])
        results[happening] = [training.step(own, happening if (rank, step) == (1, 1) else "") for step in range(3)]
    torch.save(results, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[Movements]]]:
    folder = tmp_path_factory.mktemp("processes")
    run_together(be_one_of_two, folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_two_processes_take_the_steps_of_one(processes: list[dict[str, list[Movements]]]) -> None:
    """Before and after a step that both skip, since one of them overflowed."""
    alone = Training()
    steps = [alone.step(batch()) for _ in range(2)]
    assert {name for name, movement in steps[0].items() if "projection" in name and movement.any()} == {
        name for name in steps[0] if "projection" in name
    }
    for results in processes:
        before, skipped, after = results[OVERFLOW]
        assert not any(movement.any() for movement in skipped.values())
        for together, expected in zip((before, after), steps, strict=True):
            assert_close(together, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("happening", [OVERFLOW, WEIGHT_ZERO])
def test_processes_stay_alike(happening: str, processes: list[dict[str, list[Movements]]]) -> None:
    first, second = (results[happening] for results in processes)
    assert_close(first, second, rtol=0, atol=0)
    assert all(any(movement.any() for movement in first[step].values()) for step in (0, 2))
    assert all(movement.isfinite().all() for step in first for movement in step.values())
