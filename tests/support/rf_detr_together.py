"""RF-DETR that trains under a wider teacher in one process or several, by gradient descent in double precision."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from detr_kd_losses.taps import DistillationCriterion

from support.real_trainers import images, targets
from support.torchvision_on_cpu import import_torchvision

CLASSES = 90
PARTS = (slice(0, 2), slice(2, 3))  # images of each process; the second has more objects than the first


class Training:
    """Student, criterion and optimizer, and the steps that they take."""

    def __init__(self, *, together: bool) -> None:
        from rfdetr.config import RFDETRNanoConfig, TrainConfig
        from rfdetr.models._defaults import MODEL_DEFAULTS
        from rfdetr.models.lwdetr import build_criterion_from_config, build_model_from_config

        offline = dataclasses.replace(MODEL_DEFAULTS, force_no_pretrain=True)
        options = {"device": "cpu", "pretrain_weights": None, "num_queries": 20, "num_select": 20, "group_detr": 3}
        own = RFDETRNanoConfig(**options)
        models = []
        for seed, configuration in enumerate((own, RFDETRNanoConfig(hidden_dim=128, **options))):
            torch.manual_seed(seed)
            models.append(build_model_from_config(configuration, defaults=offline).double())
        self.student, teacher = models
        for part in self.student.train().modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0
        training = TrainConfig(dataset_dir=".", output_dir=".", tensorboard=False)
        criterion = build_criterion_from_config(own, training)[0].train()
        torch.manual_seed(2)
        self.criterion = DistillationCriterion(criterion, self.student, teacher).double()
        self.optimizer = torch.optim.SGD(self.student.parameters(), lr=1.0)
        self.criterion.learn(self.optimizer, max_norm=None)
        self.model = DistributedDataParallel(self.student, find_unused_parameters=True) if together else self.student
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)

    def step(self, samples: Tensor, labels: list[dict[str, Tensor]], *, overflow: bool = False) -> dict[str, Tensor]:
        """How every weight of student and projections has moved."""
        from rfdetr.models.lwdetr import nested_tensor_from_tensor_list

        learned = dict(self.student.named_parameters())
        for part in ("distillation", "query_projection"):
            learned |= {f"{part}.{name}": weight for name, weight in getattr(self.criterion, part).named_parameters()}
        before = {name: weight.detach().clone() for name, weight in learned.items()}
        losses = self.criterion(self.model(nested_tensor_from_tensor_list(list(samples)), labels), labels)
        weights = self.criterion.weight_dict
        loss = torch.stack([losses[name] * weights[name] for name in losses if name in weights]).sum()
        self.optimizer.zero_grad()
        self.scaler.scale(loss * float("inf") if overflow else loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return {name: weight.detach() - before[name] for name, weight in learned.items()}


def batch() -> tuple[Tensor, list[dict[str, Tensor]]]:
    labels: list[dict[str, Any]] = targets(CLASSES, batch=3)
    return images(batch=3).double(), [one | {"boxes": one["boxes"].double()} for one in labels]


def be_one_of_two(rank: int, folder: Path) -> None:
    """Leave three steps in a file, the second with an overflow here or there."""
    import_torchvision()
    training, (samples, labels) = Training(together=True), batch()
    own = samples[PARTS[rank]], labels[PARTS[rank]]
    steps = [training.step(*own, overflow=index == 1 and rank == 1) for index in range(3)]
    torch.save(steps, folder / f"{rank}.pt")
