"""Ultralytics' RT-DETR with a teacher. Ultralytics is under the AGPL-3.0, and so is what one builds on it."""

import torch
from torch import Tensor, nn
from ultralytics.models.rtdetr.train import RTDETRTrainer
from ultralytics.nn.tasks import RTDETRDetectionModel

import detr_kd_losses as dkl
from detr_kd_losses.taps import QueryProjection, Tap, distillation_loss


class DistilledModel(RTDETRDetectionModel):
    """Its projections are parts of it: the optimizer learns them, checkpoints have them. The teacher is in none."""

    def teach(self, teacher: nn.Module) -> None:
        self.teacher = dkl.FrozenTeacher(teacher)
        self.distillation = distillation_loss(self, teacher)
        self.query_projection = QueryProjection(self, teacher)

    def loss(self, batch: dict, preds: tuple | None = None) -> tuple[Tensor, dict]:
        if preds is not None or not self.training:
            return super().loss(batch, preds)
        with torch.no_grad(), Tap(self.teacher.module) as teacher_tap:
            self.teacher(batch["img"])
        with Tap(self) as tap:
            loss, items = super().loss(batch)
        output = tap.output(group=self.query_projection(teacher_tap.query_group()))
        terms = self.distillation(output, teacher_tap.output(), targets_of(batch))
        return loss + sum(terms.values()), items | {name: term.detach() for name, term in terms.items()}


def targets_of(batch: dict) -> dkl.Targets:
    owner = batch["batch_idx"]
    parts = [owner == image for image in range(len(batch["img"]))]
    labels, boxes = batch["cls"].long().view(-1), batch["bboxes"]
    return dkl.pad_targets([{"labels": labels[part], "boxes": boxes[part]} for part in parts]).to(batch["img"].device)


class DistillingTrainer(RTDETRTrainer):
    """DistillingTrainer.teacher = RTDETR("rtdetr-x.pt").model; then DistillingTrainer(overrides=...).train()."""

    teacher: nn.Module

    def get_model(
        self, cfg: str | None = None, weights: nn.Module | None = None, verbose: bool = True
    ) -> DistilledModel:
        model = self.set_model_names_for_load(DistilledModel(cfg, nc=self.data["nc"], verbose=verbose))
        if weights:
            model.load(weights)
        model.teach(self.teacher)
        return model
