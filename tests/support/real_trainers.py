"""What the tests of real trainers share: the laws of a tap on any model, and batches."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.testing import assert_close

import detr_kd_losses as dkl
from detr_kd_losses.taps import Tap, check_setup, random_queries

Call = Callable[[nn.Module], Any]


def images(size: int = 128, batch: int = 2, seed: int = 0) -> Tensor:
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def targets(classes: int, batch: int = 2, seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "labels": torch.randint(classes, (count,), generator=generator),
            "boxes": 0.25 + 0.25 * torch.rand(count, 4, generator=generator),
        }
        for count in (2, 1, 3)[:batch]
    ]


def check_reading(student: nn.Module, teacher: nn.Module, call: Call, train: Call, layers: int, queries: int) -> None:
    """All layers in both modes, own queries alone, replays, a teacher that is the student, nothing left behind."""
    plain = call(student.eval())
    with torch.no_grad(), Tap(student) as tap:
        tapped = call(student)
    for one, other in zip(tensors_of(plain), tensors_of(tapped), strict=True):
        assert_close(one, other, rtol=0, atol=0)
    group = random_queries(tap.query_group(), 7, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output = tap.output(group=tap.query_group())
        assert_close(tuple(output.group), (output.logits, output.boxes), rtol=0, atol=1e-5)
        with Tap(copy.deepcopy(student)) as equal:
            call(equal.model)
        terms = [dkl.LogitsTerm(), dkl.FeatureTerm(), dkl.SharedQueryTerm(stage_map="even")]
        truth = dkl.pad_targets(targets(output.logits.shape[-1]))
        losses = dkl.DETRDistillationLoss(terms)(tap.output(group), equal.output(group), truth)
    assert len(losses) == 7
    assert max(losses.values()) < 1e-5
    with Tap(student.train()) as tap:
        train(student)
    output = tap.output(group=tap.query_group())
    assert output.logits.shape[:3] == output.queries.shape[:3] == (layers, 2, queries)
    # Other denoising queries than in a replay make sums of another order.
    assert_close(tuple(output.group), (output.logits, output.boxes), rtol=1e-3, atol=1e-3)
    assert check_setup(student, teacher, call)
    student.eval()
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in student.modules())


def tensors_of(answer: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(answer) if isinstance(leaf, Tensor)]


def check_traces(student: nn.Module, plain: nn.Module, teacher: nn.Module) -> None:
    """Copies and files of a student are those of a plain one."""
    sizes = []
    for model in (student, plain):
        file = io.BytesIO()
        torch.save(model, file)
        sizes.append(file.tell())
    assert sizes[0] < sizes[1] + 10_000
    other = copy.deepcopy(student)
    hooks = [hook for module in other.modules() for hook in (*module._forward_hooks, *module._forward_pre_hooks)]
    assert not hooks
    assert set(other.state_dict()) == set(plain.state_dict())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
