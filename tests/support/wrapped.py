"""Students of every kind under a teacher, as a trainer's criterion has them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import detr_kd_losses as dkl
from detr_kd_losses.taps import DistillationCriterion

from support import decoder_parts, lineage, repositories
from support.decoder_parts import images, targets
from support.engines import (
    SetCriterion,
)
from support.repositories import NestedTensor

KINDS = [*(f"lineage {kind}" for kind in lineage.DECODERS if kind != "ultralytics"), *repositories.KINDS]
SIZES = [(48, 32), (32, 32), (64, 48)]


def build(kind: str, seed: int = 0, **options: Any) -> nn.Module:
    family, _, name = kind.rpartition(" ")
    return lineage.build(name, seed=seed, **options) if family else repositories.build(kind, seed=seed)


def call(model: nn.Module, samples: Any, labels: Any) -> Any:
    """As the engine of the model's own repository does."""
    if isinstance(model, lineage.Lineage):
        return model(samples, targets=labels)
    if isinstance(model, repositories.Detr):
        return model(samples, dn_args=labels) if model.denoising else model(samples)
    return model(samples, labels) if model.kind == "DinoDecoder" else model(samples)


def batches(kind: str) -> list[tuple[Any, Any]]:
    drawn = [(images(size=size, seed=seed), targets(seed=seed)) for seed, size in enumerate(SIZES)]
    return drawn if kind.startswith("lineage") else [(NestedTensor(x, padded=8), labels) for x, labels in drawn]


def wrapped(kind: str = "lineage v2", criterion: nn.Module | None = None, **options: Any) -> tuple[Any, nn.Module]:
    student, teacher = build(kind), build(kind, seed=1)
    if kind == "dn":
        options = {"teacher_call": lambda model, samples, **_: model(samples, dn_args=0)} | options
    criterion = criterion or SetCriterion()
    return DistillationCriterion(criterion, student, teacher, **options), student


IMAGES = 2  # with different numbers of objects


def batch(seed: int = 0) -> tuple[Tensor, list[dict[str, Tensor]]]:
    return decoder_parts.images(IMAGES, seed=seed), decoder_parts.targets(IMAGES, seed=seed)


def wider_teachers_losses(*, sync: bool = True) -> dkl.DETRDistillationLoss:
    """Of a teacher of width 24: features of two levels are projected."""
    options = {"sync_normalizer": sync}
    return dkl.DETRDistillationLoss(
        [
            dkl.LogitsTerm(**options),
            dkl.FeatureTerm([16, 16], [24, 24], **options),
            dkl.QueryGroupTerm(**options),
        ]
    )


def criterion_and_student(*, sync: bool = True) -> tuple[DistillationCriterion, nn.Module]:
    """A wider teacher: features of two levels and the content of queries are projected."""
    student, teacher = lineage.build("v2"), lineage.build("v2", seed=1, queries=10, width=24)
    torch.manual_seed(2)
    distillation = wider_teachers_losses(sync=sync)
    return DistillationCriterion(SetCriterion(), student, teacher, distillation=distillation), student
