"""Stand-ins for the detectors of the dict convention, with weights at the scale of trained ones, and their batches."""

from __future__ import annotations

import torch
from torch import Tensor

from detr_convention.standin import StandIn
from detr_convention.train import NUM_CLASSES, batches


def stand_in(seed: int, *, queries: int = 12, layers: int = 3, channels: int = 32) -> StandIn:
    torch.manual_seed(seed)
    model = StandIn(num_classes=NUM_CLASSES, num_queries=queries, layers=layers, channels=channels)
    with torch.no_grad():  # at the scale of a trained model: fresh weights make all queries alike
        for name, parameter in model.named_parameters():
            if name.startswith(("class_embed.weight", "bbox_embed")) and parameter.ndim > 1:
                parameter.normal_(std=2 * parameter.shape[1] ** -0.5)
    return model


def batch(seed: int = 0) -> tuple[Tensor, list[dict[str, Tensor]]]:
    return next(batches(1, seed=seed))
