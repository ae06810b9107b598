"""How the engines of the repositories train, in our own words: what is called, what is summed, what is clipped."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

import detr_kd_losses as dkl


class SetCriterion(nn.Module):
    """A detection loss for each layer with weights in `weight_dict`, which it does not apply."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        suffixes = ["", *(f"_{layer}" for layer in range(layers - 1))]
        weights = {"loss_class": 2.0, "loss_bbox": 5.0, "loss_giou": 2.0}
        self.weight_dict = {f"{name}{suffix}": weight for name, weight in weights.items() for suffix in suffixes}
        self.called_with: Any = None

    def forward(self, outputs: Any, targets: Any, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        self.called_with = outputs, args, kwargs
        outputs = outputs[0] if isinstance(outputs, tuple) else outputs
        losses = self.terms(outputs, targets, "")
        for index, layer in enumerate(outputs["aux_outputs"]):
            losses |= self.terms(layer, targets, f"_{index}")
        return losses

    def terms(self, layer: dict[str, Any], targets: Any, suffix: str) -> dict[str, Tensor]:
        truth = dkl.pad_targets(targets)
        logits, boxes = layer["pred_logits"].float(), layer["pred_boxes"].float()
        terms = dkl.detection_loss(logits, boxes, *truth, dkl.match_targets(logits, boxes, *truth))
        return {f"{name}{suffix}": term for name, term in terms.items()}


class WeighingCriterion(SetCriterion):
    """That of RT-DETR and its heirs: it applies its weights itself, and filters by them."""

    def forward(self, outputs: Any, targets: Any, **kwargs: Any) -> dict[str, Tensor]:
        losses = super().forward(outputs, targets, **kwargs)
        return {name: loss * self.weight_dict[name] for name, loss in losses.items() if name in self.weight_dict}


class TotalCriterion(SetCriterion):
    """That of libreyolo: its loop takes what it has summed itself."""

    def forward(self, outputs: Any, targets: Any, **kwargs: Any) -> dict[str, Tensor]:
        losses = super().forward(outputs, targets, **kwargs)
        return {**losses, "total_loss": torch.stack(list(losses.values())).sum()}


Batches = Iterable[tuple[Any, list[dict[str, Tensor]]]]


def train_one_epoch(
    model: nn.Module, criterion: nn.Module, batches: Batches, optimizer: torch.optim.Optimizer,
    call: Callable[[nn.Module, Any, Any], Any] = lambda model, samples, targets: model(samples),
) -> list[Tensor]:  # fmt: skip
    """`engine.py` of DETR and the repositories after it: weighs and filters by `weight_dict`, clips the model."""
    model.train()
    criterion.train()
    history = []
    for samples, targets in batches:
        losses = criterion(call(model, samples, targets), targets)
        weights = criterion.weight_dict
        loss = sum(losses[name] * weights[name] for name in losses if name in weights)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        history.append(loss.detach())
    return history


def solve_one_epoch(
    model: nn.Module,
    criterion: nn.Module,
    batches: Batches,
    optimizer: torch.optim.Optimizer,
    ema: nn.Module | None = None,
) -> list[Tensor]:
    """`det_engine.py` of RT-DETR and its heirs: mixed precision, metas, a sum of all values, an average of weights."""
    model.train()
    criterion.train()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    history = []
    for step, (samples, targets) in enumerate(batches):
        metas = {"epoch": 0, "step": step, "global_step": step}
        with torch.autocast("cpu", torch.bfloat16):
            outputs = model(samples, targets=targets)
        with torch.autocast("cpu", enabled=False):
            losses = criterion(outputs, targets, **metas)
        loss = sum(losses.values())
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()
        if ema is not None:
            update_average(ema, model)
        history.append(loss.detach())
    return history


def average_of(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).eval().requires_grad_(False)


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module) -> None:
    for name, tensor in average.state_dict().items():
        if tensor.is_floating_point():
            tensor.lerp_(model.state_dict()[name], 0.1)
