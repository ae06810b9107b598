"""A small detector, criterion and engine with the interface of facebookresearch/detr, to try the adapter on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

import detr_kd_losses as dkl


class Decoder(nn.Module):
    """Layers of attention, called like the decoder of facebookresearch/detr: sequences first, (M, B, D)."""

    def __init__(self, channels: int, layers: int) -> None:
        super().__init__()
        self.self_attention = nn.ModuleList(nn.MultiheadAttention(channels, 4) for _ in range(layers))
        self.cross_attention = nn.ModuleList(nn.MultiheadAttention(channels, 4) for _ in range(layers))
        self.mlp = nn.ModuleList(nn.Sequential(nn.Linear(channels, channels), nn.ReLU()) for _ in range(layers))
        self.norm = nn.LayerNorm(channels)

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        memory_key_padding_mask: Tensor | None = None,
        pos: Tensor | None = None,
        query_pos: Tensor | None = None,
        tgt_mask: Tensor | None = None,
    ) -> Tensor:
        """Return the normalised outputs of all layers (L, M, B, D)."""
        outputs = []
        for self_attention, cross_attention, mlp in zip(
            self.self_attention, self.cross_attention, self.mlp, strict=True
        ):
            located = tgt + query_pos
            tgt = tgt + self_attention(located, located, tgt, attn_mask=tgt_mask, need_weights=False)[0]
            padding = memory_key_padding_mask
            attended = cross_attention(tgt + query_pos, memory + pos, memory, key_padding_mask=padding)[0]
            tgt = tgt + attended
            tgt = self.norm(tgt + mlp(tgt))
            outputs.append(tgt)
        return torch.stack(outputs)


class Transformer(nn.Module):
    """The part between backbone and heads."""

    def __init__(self, channels: int, layers: int) -> None:
        super().__init__()
        self.d_model = channels
        self.decoder = Decoder(channels, layers)

    def forward(self, src: Tensor, mask: Tensor, query_embed: Tensor, pos_embed: Tensor) -> tuple[Tensor, Tensor]:
        """Return decoder outputs (L, B, M, D) and the image that the decoder has seen (B, D, H, W)."""
        memory = src.flatten(2).permute(2, 0, 1)
        query_embed = query_embed.unsqueeze(1).repeat(1, len(src), 1)
        states = self.decoder(
            torch.zeros_like(query_embed),
            memory,
            memory_key_padding_mask=mask.flatten(1),
            pos=pos_embed.flatten(2).permute(2, 0, 1),
            query_pos=query_embed,
        )
        return states.transpose(1, 2), memory.permute(1, 2, 0).reshape(src.shape)


class StandIn(nn.Module):
    """A DETR for images of 64 x 64, with sigmoid class heads."""

    def __init__(self, *, num_classes: int, num_queries: int, channels: int = 32, layers: int = 3) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 16, 4, 4), nn.ReLU(), nn.Conv2d(16, channels, 2, 2), nn.GroupNorm(4, channels)
        )
        self.transformer = Transformer(channels, layers)
        self.position = nn.Parameter(torch.randn(1, channels, 8, 8) / 4)
        self.query_embed = nn.Embedding(num_queries, channels)
        self.class_embed = nn.Linear(channels, num_classes)
        self.bbox_embed = nn.Sequential(nn.Linear(channels, channels), nn.ReLU(), nn.Linear(channels, 4))
        nn.init.constant_(self.class_embed.bias, -4.0)

    def forward(self, samples: Tensor) -> dict[str, Any]:
        """Detect in images (B, 3, 64, 64)."""
        src = self.backbone(samples)
        mask = torch.zeros(len(src), *src.shape[-2:], dtype=torch.bool, device=src.device)
        states, _ = self.transformer(src, mask, self.query_embed.weight, self.position.expand_as(src))
        logits, boxes = self.class_embed(states), self.bbox_embed(states).sigmoid()
        layers = [{"pred_logits": a, "pred_boxes": b} for a, b in zip(logits, boxes, strict=True)]
        return {**layers[-1], "aux_outputs": layers[:-1]}


class SetCriterion(nn.Module):
    """A detection loss whose terms are weighted by `weight_dict`, as in facebookresearch/detr."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        suffixes = ["", *(f"_{layer}" for layer in range(layers - 1))]
        weights = {"loss_class": 2.0, "loss_bbox": 5.0, "loss_giou": 2.0}
        self.weight_dict = {f"{name}{suffix}": weight for name, weight in weights.items() for suffix in suffixes}

    def forward(self, outputs: dict[str, Any], targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return the terms of all layers."""
        losses = self._terms(outputs, targets, "")
        for index, layer in enumerate(outputs["aux_outputs"]):
            losses |= self._terms(layer, targets, f"_{index}")
        return losses

    def _terms(self, layer: dict[str, Any], targets: list[dict[str, Tensor]], suffix: str) -> dict[str, Tensor]:
        truth = dkl.pad_targets(targets)
        logits, boxes = layer["pred_logits"], layer["pred_boxes"]
        assignment = dkl.match_targets(logits, boxes, *truth)
        terms = dkl.detection_loss(logits, boxes, *truth, assignment, weight_bbox=1.0, weight_giou=1.0)
        return {f"{name}{suffix}": term for name, term in terms.items()}


def train_one_epoch(
    model: nn.Module,
    criterion: nn.Module,
    batches: Iterable[tuple[Tensor, list[dict[str, Tensor]]]],
    optimizer: torch.optim.Optimizer,
    max_norm: float = 0.1,
) -> list[dict[str, float]]:
    """Train as the engines of the convention do; return the weighted terms of each step."""
    model.train()
    criterion.train()
    history = []
    for samples, targets in batches:
        losses = criterion(model(samples), targets)
        weights = criterion.weight_dict
        weighted = {name: losses[name] * weights[name] for name in losses if name in weights}
        optimizer.zero_grad()
        sum(weighted.values()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        history.append({name: term.item() for name, term in weighted.items()})
    return history
