"""Projections outside the model: learned, averaged over processes whatever a step does, saved and restored."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from detr_kd_losses.taps import DistillationCriterion

from support import decoder_parts, lineage
from support.engines import SetCriterion, train_one_epoch
from support.two_processes import run_together
from support.wrapped import batch, criterion_and_student


def test_projections_of_another_width_are_learned() -> None:
    criterion, student = criterion_and_student()
    before = copy.deepcopy(criterion.distillation.state_dict())
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    criterion.learn(optimizer)
    train_one_epoch(student, criterion, [batch()], optimizer)
    assert before
    assert all((tensor != before[name]).any() for name, tensor in criterion.distillation.state_dict().items())


@pytest.mark.parametrize("max_norm", [0.1, 1e-3, None])
def test_clipped_by_a_norm_of_their_own(max_norm: float | None) -> None:
    """Where engines clip the model alone."""
    criterion, student = criterion_and_student()
    optimizer = torch.optim.SGD(student.parameters(), lr=1.0)
    criterion.learn(optimizer, max_norm=max_norm)
    learned = [*criterion.distillation.parameters(), *criterion.query_projection.parameters()]
    assert len(learned) == 5
    before = [parameter.detach().clone() for parameter in learned]
    images, targets = batch()
    torch.stack(list(criterion(student(images), targets).values())).sum().backward()
    whole = torch.stack([parameter.grad.norm() for parameter in learned]).norm()
    optimizer.step()
    moved = torch.stack([(a - b).norm() for a, b in zip(before, learned, strict=True)]).norm()
    assert_close(moved, whole if max_norm is None else whole.clamp(max=max_norm), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("max_norm", [0, -0.1, float("nan")])
def test_a_norm_at_which_nothing_is_learned(max_norm: float) -> None:
    """Trainers that take 0 for "not at all" are told of None."""
    criterion, student = criterion_and_student()
    optimizer = torch.optim.SGD(student.parameters(), lr=1.0)
    with pytest.raises(ValueError, match="`max_norm` must be greater than 0"):
        criterion.learn(optimizer, max_norm=max_norm)
    assert len(optimizer.param_groups) == 1


def test_nothing_to_learn() -> None:
    student = lineage.build("v2")
    criterion = DistillationCriterion(SetCriterion(), student, lineage.build("v2", seed=1))
    optimizer = torch.optim.SGD(student.parameters(), lr=1.0)
    criterion.learn(optimizer)
    assert len(optimizer.param_groups) == 1


def step_of_gradient_descent(
    images: Tensor, targets: list[dict[str, Tensor]], *, rank: int | None, micro_batches: int = 1
) -> dict[str, Tensor]:
    """How one step at learning rate 1 moves every weight; with a rank, in that process of several."""
    criterion, student = criterion_and_student()
    if rank:
        nn.init.normal_(criterion.distillation.terms["feature"].projections[0].weight)  # as with a seed of its own
    learned = dict(student.named_parameters()) | dict(criterion.distillation.named_parameters())
    learned |= dict(criterion.query_projection.named_parameters())
    optimizer = torch.optim.SGD(student.parameters(), lr=1.0)
    criterion.learn(optimizer)
    before = {name: parameter.detach().clone() for name, parameter in learned.items()}
    model = student if rank is None else DistributedDataParallel(student, find_unused_parameters=True)
    for _ in range(micro_batches):
        losses = criterion(model(images), targets)
        weighted = [losses[name] * weight for name, weight in criterion.weight_dict.items() if name in losses]
        (sum(weighted) / micro_batches).backward()
    optimizer.step()
    return {name: before[name] - parameter.detach() for name, parameter in learned.items()}


MICRO_BATCHES = (1, 3)
HAPPENINGS = (
    "weight 0 on one rank",
    "weight 0 on all ranks",
    "weight 0 of the group on one rank",
    "no objects on one rank",
    "no objects on all ranks",
    "overflow on one rank",
    "overflow on all ranks",
    "validation on one rank",
    "check of the set-up on one rank",
    "pass without a loss on one rank",
    "copy of all on one rank",
)


def be_one_of_two(rank: int, folder: Path, micro_batches: tuple[int, ...], happenings: tuple[str, ...]) -> None:
    """Do in one pair of processes, which take long to start, what several tests below look at."""
    images, targets = batch()
    half = slice(rank, rank + 1)
    results: dict[Any, Any] = {
        count: step_of_gradient_descent(images[half], targets[half], rank=rank, micro_batches=count)
        for count in micro_batches
    }
    for happening in happenings:
        print(f"rank {rank}: {happening}", flush=True)  # noqa: T201 - where it hangs, the last of these says at what
        results[happening] = train_with(rank, happening)
    torch.save(results, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    results: list[dict[Any, Any]] = [{}, {}]
    # Two pairs: each has its time, which on a busy machine is not enough for all.
    for part in ((MICRO_BATCHES, HAPPENINGS[:5]), ((), HAPPENINGS[5:])):
        folder = tmp_path_factory.mktemp("processes")
        run_together(be_one_of_two, folder, *part)
        for rank, known in enumerate(results):
            known.update(torch.load(folder / f"{rank}.pt", weights_only=True))
    return results


@pytest.mark.parametrize("micro_batches", MICRO_BATCHES)
def test_two_processes_take_the_step_of_one(micro_batches: int, processes: list[dict[Any, Any]]) -> None:
    """Accumulated or not; the processes draw other projections, and begin with those of the first."""
    images, targets = batch()
    assert len(targets[0]["labels"]) != len(targets[1]["labels"])
    joined = step_of_gradient_descent(images[:2], targets[:2], rank=None)
    for results in processes:
        for name, expected in joined.items():
            atol = 1e-5 + 1e-5 * expected.abs().max().item()
            assert_close(results[micro_batches][name], expected, rtol=0, atol=atol)


def train_with(rank: int, happening: str) -> dict[str, Any]:
    """Three steps, in the second of which something happens on one rank or on all."""
    # A term of weight 0 counts nothing: where weights differ, what is counted together must not be this term's.
    criterion, student = criterion_and_student(sync="weight 0" not in happening)
    term = criterion.distillation.terms["query_group" if "of the group" in happening else "feature"]
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    criterion.learn(optimizer)
    # Many buckets, as a model of its size has: their averages are collectives, too, and have one order everywhere.
    model = DistributedDataParallel(student, find_unused_parameters=True, bucket_cap_mb=1e-3)
    scaler = torch.amp.GradScaler("cpu", enabled="overflow" in happening, init_scale=2.0)
    moved = []
    for step in range(3):
        before = [parameter.detach().clone() for parameter in criterion.distillation.parameters()]
        images, targets = batch(10 * step + rank)
        here = step == 1 and (rank == 0 or happening.endswith("all ranks"))
        if happening.startswith("weight 0"):
            term.weight = 0.0 if here else 2.0
        if happening.startswith("no objects") and here:
            targets = [{name: tensor[:0] for name, tensor in target.items()} for target in targets]
        losses = criterion(model(images), targets)
        weights = criterion.weight_dict
        loss = sum(losses[name] * weights[name] for name in losses if name in weights)
        if happening.startswith("overflow") and here:
            loss = loss * float("inf")
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()
        if happening.startswith("validation") and here:
            with torch.no_grad():
                student.eval()(
                    decoder_parts.images(size=lineage.EVAL_SIZE)
                )  # whose criterion counts over all processes, and so is not called here
            student.train()
        if happening.startswith("check") and here:
            criterion.check(lambda model: model(images), targets)  # noqa: B023 - called at once
        if happening.startswith("pass") and here:
            student(decoder_parts.images(seed=5))
        if happening.startswith("copy") and here:
            criterion.criterion.called_with = None  # outputs with a graph, which are not ours
            _, other = copy.deepcopy(nn.ModuleList([criterion, student]))
            other(images)
        after = criterion.distillation.parameters()
        moved.append(any(not torch.equal(a, b) for a, b in zip(before, after, strict=True)))
    return {"state": dict(criterion.distillation.state_dict()), "moved": moved}


@pytest.mark.parametrize("happening", HAPPENINGS)
def test_no_process_waits_for_another(happening: str, processes: list[dict[Any, Any]]) -> None:
    first, second = (results[happening] for results in processes)
    assert_close(first["state"], second["state"], rtol=0, atol=0)
    assert all(tensor.isfinite().all() for tensor in first["state"].values())
    skipped = happening.startswith("overflow")
    assert first["moved"] == second["moved"] == [True, not skipped, True]
