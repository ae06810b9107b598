"""What the stand-ins for repositories are built of: small, of trained scale, so that no two queries are alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

WIDTH = 16
CLASSES = 5


class CrossAttention(nn.Module):
    """Attention to the memory; what it projects of it depends on no query."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query_proj, self.value_proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, query: Tensor, memory: Tensor, padding: Tensor | None = None) -> Tensor:
        value = self.value_proj(memory)  # (B, S, D)
        scores = self.query_proj(query) @ value.transpose(1, 2) / value.shape[-1] ** 0.5
        if padding is not None:
            scores = scores.masked_fill(padding.unsqueeze(1), -torch.inf)
        return scores.softmax(-1) @ value


class Layer(nn.Module):
    """A decoder layer, batch first. True in `blocked` (N, N) keeps a query from seeing another."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(width, 2, batch_first=True)
        self.cross_attn = CrossAttention(width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(
        self, target: Tensor, position: Tensor, memory: Tensor, blocked: Tensor | None, padding: Tensor | None = None
    ) -> Tensor:
        target = self.attend_to_each_other(target, position, blocked)
        return self.norm2(target + self.cross_attn(target + position, memory, padding))

    def attend_to_each_other(self, target: Tensor, position: Tensor, blocked: Tensor | None) -> Tensor:
        located = target + position
        seen = self.self_attn(located, located, target, attn_mask=blocked, need_weights=False)[0]
        return self.norm1(target + seen)


def layers(number: int, width: int) -> nn.ModuleList:
    return nn.ModuleList(Layer(width) for _ in range(number))


def heads(number: int, width: int, outputs: int) -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(width, outputs) for _ in range(number))


class Backbone(nn.Module):
    """Maps at stride 8 and 16."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.levels = nn.ModuleList([nn.Conv2d(3, width, 8, 8), nn.Conv2d(width, width, 2, 2)])

    def forward(self, images: Tensor) -> list[Tensor]:
        first = self.levels[0](images)
        return [first, self.levels[1](first)]


def flatten(maps: Sequence[Tensor]) -> Tensor:
    return torch.cat([level.flatten(2).transpose(1, 2) for level in maps], 1)


def sizes_of(maps: Sequence[Tensor]) -> list[list[int]]:
    return [list(level.shape[-2:]) for level in maps]


def logit(boxes: Tensor) -> Tensor:
    boxes = boxes.clamp(0, 1)
    return (boxes.clamp(min=1e-5) / (1 - boxes).clamp(min=1e-5)).log()


@torch.no_grad()
def strengthen(model: nn.Module, seed: int) -> nn.Module:
    """Draw all weights at the scale of a trained model."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        fan = parameter[0].numel() if parameter.ndim > 1 else 25
        centre = 1.0 if parameter.ndim == 1 and (parameter == 1).all() else 0.0
        parameter.copy_(centre + fan**-0.5 * torch.randn(parameter.shape, generator=generator))
    return model


def as_layers(logits: Tensor, boxes: Tensor) -> list[dict[str, Any]]:
    return [{"pred_logits": one, "pred_boxes": two} for one, two in zip(logits, boxes, strict=True)]


def images(batch: int = 2, size: tuple[int, int] = (48, 32), seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed))


def targets(batch: int = 2, seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    counts = [2 - image % 2 for image in range(batch)]
    return [
        {
            "labels": torch.randint(CLASSES, (count,), generator=generator),
            "boxes": 0.2 + 0.3 * torch.rand(count, 4, generator=generator),
        }
        for count in counts
    ]


class NestedTensor:
    """Images and their padding, as most of the repositories pass them: no tensor, with a device of none."""

    def __init__(self, tensors: Tensor, padded: int = 0) -> None:
        self.tensors = tensors
        self.mask = torch.zeros(tensors[:, 0].shape, dtype=torch.bool, device=tensors.device)
        if padded:
            self.mask[-1, :, -padded:] = True
