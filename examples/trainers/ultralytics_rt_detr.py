"""Ultralytics' RT-DETR with a teacher. Ultralytics is under the AGPL-3.0, and so is what one builds on it."""

from typing import Any

import torch
from torch import nn
from ultralytics.models.rtdetr.train import RTDETRTrainer

import detr_kd_losses as dkl
from detr_kd_losses.taps import ModelDistillation


class DistillingTrainer(RTDETRTrainer):
    """DistillingTrainer.teacher = RTDETR("rtdetr-x.pt").model; then DistillingTrainer(overrides=...).train()."""

    teacher: nn.Module

    def build_optimizer(self, model: nn.Module, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer = super().build_optimizer(model, *args, **kwargs)
        call = lambda teacher, batch: teacher(batch["img"])  # noqa: E731
        ModelDistillation(model, self.teacher, read_targets=targets_of, teacher_call=call).learn(optimizer)
        return optimizer


def targets_of(batch: dict) -> dkl.Targets:
    parts = [batch["batch_idx"] == image for image in range(len(batch["img"]))]
    labels, boxes = batch["cls"].long().view(-1), batch["bboxes"]
    return dkl.pad_targets([{"labels": labels[part], "boxes": boxes[part]} for part in parts])
