"""A detector that answers its own losses, as those of Ultralytics do, and one under a teacher."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import detr_kd_losses as dkl
from detr_kd_losses.taps import ModelDistillation

from support import lineage
from support.engines import SetCriterion


class Answering(nn.Module):
    """A detector that answers its loss, and what is logged of it."""

    def __init__(self, seed: int = 0, **options: Any) -> None:
        super().__init__()
        self.detector = lineage.build("v2", seed=seed, **options)

    def forward(self, batch: dict[str, Any]) -> Any:
        answer = self.detector(batch["images"], batch["targets"])
        if not self.training:
            return answer
        losses = SetCriterion()(answer, batch["targets"])
        return torch.stack(list(losses.values())).sum(), {name: loss.detach() for name, loss in losses.items()}


def distilled(
    distillation: dkl.DETRDistillationLoss | None = None, **options: Any
) -> tuple[Answering, ModelDistillation]:
    """A student under a teacher of `options`."""
    student, teacher = Answering().train(), Answering(seed=1, **options)
    return student, ModelDistillation(
        student,
        teacher,
        read_targets=lambda batch: dkl.pad_targets(batch["targets"]),
        teacher_call=lambda teacher, batch: teacher(batch),
        distillation=distillation,
        levels=([0, 1], [0, 1]),
    )
