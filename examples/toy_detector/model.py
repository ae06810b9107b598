"""A compact deformable DETR: a convolutional backbone, a transformer encoder, a box-refining decoder."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import detr_kd_losses as dkl


class Group(NamedTuple):
    """Queries (Q, D) and their anchors (Q, 4), logits of cxcywh boxes, beside those that a detector has.

    With a dimension of images in front, each image has its own: `index` (B, Q) says which of a teacher's they are.
    """

    queries: Tensor
    anchors: Tensor
    index: Tensor | None = None


class TinyDETR(nn.Module):
    """A DETR for small images that answers with a `DetectorOutput`.

    A decoder layer refines the boxes of the layer before it, and looks at the image near these boxes only. `forward`
    takes a second group of queries, such as a teacher's, which shares every weight and sees none of the student's own.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        num_queries: int,
        backbone_width: int,
        residual_blocks: int,
        encoder_layers: int,
        decoder_layers: int = 3,
        channels: int = 64,
    ) -> None:
        super().__init__()
        self.backbone = backbone(backbone_width, residual_blocks, channels)
        self.encoder = nn.ModuleList(EncoderLayer(channels) for _ in range(encoder_layers))
        self.decoder = nn.ModuleList(DecoderLayer(channels) for _ in range(decoder_layers))
        self.class_heads = nn.ModuleList(nn.Linear(channels, num_classes) for _ in range(decoder_layers))
        self.box_heads = nn.ModuleList(mlp(channels, channels, 4) for _ in range(decoder_layers))
        self.box_embedding = mlp(2 * channels, channels, channels)
        self.queries = nn.Parameter(torch.randn(num_queries, channels) / 2)
        self.anchors = nn.Parameter(grid_anchors(num_queries).logit())
        for class_head, box_head in zip(self.class_heads, self.box_heads, strict=True):
            nn.init.constant_(class_head.bias, -math.log(99))  # every score starts at 0.01
            nn.init.zeros_(box_head[-1].weight)  # every box starts at its anchor
            nn.init.zeros_(box_head[-1].bias)

    def forward(self, images: Tensor, group: Group | None = None) -> dkl.DetectorOutput:
        """Detect in images (B, 3, H, W), and separately from the own queries with those of a group."""
        features = self.encode(images)
        if group is None:
            boxes, logits, queries = self.decode(features, self.queries, self.anchors)
            return dkl.DetectorOutput(logits=logits, boxes=boxes, queries=queries, features=features)
        sizes = [len(self.queries), group.queries.shape[-2]]
        own_and_group = ((self.queries, group.queries), (self.anchors, group.anchors))
        queries, anchors = (torch.cat([x.expand(len(images), -1, -1) for x in pair], 1) for pair in own_and_group)
        mask = dkl.query_group_attention_mask(sizes)
        boxes, logits, queries = self.decode(features, queries, anchors, mask)
        boxes, group_boxes = boxes.split(sizes, dim=2)
        logits, group_logits = logits.split(sizes, dim=2)
        return dkl.DetectorOutput(
            logits=logits,
            boxes=boxes,
            queries=queries[:, :, : sizes[0]],
            features=features,
            group=dkl.Predictions(group_logits, group_boxes),
            group_index=group.index,
        )

    def own_group(self) -> Group:
        """Return the own queries as a group for another detector, which teaches them nothing."""
        return Group(self.queries.detach(), self.anchors.detach())

    def encode(self, images: Tensor) -> Tensor:
        """Return the encoder's feature map (B, D, h, w)."""
        features = self.backbone(images)
        height, width = features.shape[-2:]
        rows, columns = torch.meshgrid(cell_centres(height), cell_centres(width), indexing="ij")
        position = sine_embedding(torch.stack([columns, rows], -1).flatten(0, 1), features.shape[1])
        tokens = features.flatten(2).transpose(1, 2)
        for layer in self.encoder:
            tokens = layer(tokens, position)
        return tokens.transpose(1, 2).unflatten(2, (height, width))

    def decode(
        self, features: Tensor, queries: Tensor, anchors: Tensor, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return boxes (L, B, Q, 4), logits (L, B, Q, C) and queries (L, B, Q, D) of every layer.

        queries (Q, D) and anchors (Q, 4), logits of cxcywh boxes, are those of all images, or (B, Q, ...) each image's;
        attention_mask (Q, Q) is True where a query must not attend to another.
        """
        queries = queries.expand(len(features), -1, -1)
        reference = anchors.sigmoid().expand(len(features), -1, -1)
        boxes, logits, states = [], [], []
        for layer, class_head, box_head in zip(self.decoder, self.class_heads, self.box_heads, strict=True):
            position = self.box_embedding(sine_embedding(reference, 2 * queries.shape[-1]))
            queries = layer(queries, position, reference, features, attention_mask)
            boxes.append((box_head(queries) + reference.logit(eps=1e-4)).sigmoid())
            logits.append(class_head(queries))
            states.append(queries)
            reference = boxes[-1].detach()
        return torch.stack(boxes), torch.stack(logits), torch.stack(states)


class EncoderLayer(nn.Module):
    """Self-attention between all locations of the feature map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(channels, 4, batch_first=True)
        self.mlp = mlp(channels, 2 * channels, channels)
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(2))

    def forward(self, tokens: Tensor, position: Tensor) -> Tensor:
        """Map tokens (B, h*w, D) to tokens."""
        located = tokens + position
        tokens = self.norms[0](tokens + self.attention(located, located, tokens, need_weights=False)[0])
        return self.norms[1](tokens + self.mlp(tokens))


class DecoderLayer(nn.Module):
    """Self-attention between the queries, then deformable attention of each query to the image near its box."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.self_attention = nn.MultiheadAttention(channels, 4, batch_first=True)
        self.cross_attention = BoxAttention(channels, heads=4, points=4)
        self.mlp = mlp(channels, 2 * channels, channels)
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(3))

    def forward(
        self, queries: Tensor, position: Tensor, boxes: Tensor, features: Tensor, attention_mask: Tensor | None
    ) -> Tensor:
        """Map queries (B, Q, D) to queries."""
        located = queries + position
        attended = self.self_attention(located, located, queries, attn_mask=attention_mask, need_weights=False)[0]
        queries = self.norms[0](queries + attended)
        queries = self.norms[1](queries + self.cross_attention(queries + position, boxes, features))
        return self.norms[2](queries + self.mlp(queries))


class BoxAttention(nn.Module):
    """Deformable attention on one feature map: every head reads a few points, given in units of half the box."""

    def __init__(self, channels: int, heads: int, points: int) -> None:
        super().__init__()
        self.heads, self.points = heads, points
        self.offsets = nn.Linear(channels, heads * points * 2)
        self.weights = nn.Linear(channels, heads * points)
        self.values = nn.Conv2d(channels, channels, 1)
        self.output = nn.Linear(channels, channels)
        # At first each head looks into its own direction, with its last point on the edge of the box.
        angles = torch.arange(heads) * 2 * math.pi / heads
        directions = torch.stack([angles.cos(), angles.sin()], -1)
        distances = (torch.arange(points) + 1) / points
        nn.init.zeros_(self.offsets.weight)
        self.offsets.bias.data = (directions[:, None] * distances[:, None]).flatten()
        nn.init.zeros_(self.weights.weight)
        nn.init.zeros_(self.weights.bias)
        # At first a query adds to itself what it reads: so queries and features share one space, and their similarity
        # tells where an object is.
        nn.init.dirac_(self.values.weight)
        nn.init.eye_(self.output.weight)

    def forward(self, queries: Tensor, boxes: Tensor, features: Tensor) -> Tensor:
        """Return what queries (B, Q, D) with boxes (B, Q, 4) read from features (B, D, h, w)."""
        split = (self.heads, self.points)
        values = self.values(features).unflatten(1, (self.heads, -1)).flatten(0, 1)  # (B * heads, D / heads, h, w)
        offsets = self.offsets(queries).unflatten(-1, (*split, 2)) / 2  # (B, Q, heads, points, 2)
        weights = self.weights(queries).unflatten(-1, split).softmax(-1)
        places = boxes[:, :, None, None, :2] + offsets * boxes[:, :, None, None, 2:]
        grid = (2 * places - 1).transpose(1, 2).flatten(0, 1)  # (B * heads, Q, points, 2)
        read = F.grid_sample(values, grid, align_corners=False)  # (B * heads, D / heads, Q, points)
        read = (read * weights.transpose(1, 2).flatten(0, 1)[:, None]).sum(-1)
        return self.output(read.unflatten(0, (-1, self.heads)).flatten(1, 2).transpose(1, 2))


def backbone(width: int, residual_blocks: int, channels: int) -> nn.Sequential:
    """Three convolutions of stride 2, with residual blocks after the second and the third."""
    layers: list[nn.Module] = [conv_block(3, width, stride=2)]
    for scale in (1, 2):
        layers.append(conv_block(scale * width, 2 * scale * width, stride=2))
        layers.extend(ResidualBlock(2 * scale * width) for _ in range(residual_blocks))
    return nn.Sequential(*layers, nn.Conv2d(4 * width, channels, 1), nn.GroupNorm(8, channels))


def conv_block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """A 3x3 convolution, batch normalisation and ReLU."""
    convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


class ResidualBlock(nn.Module):
    """Two convolutions around a skip connection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(conv_block(width, width), conv_block(width, width))

    def forward(self, features: Tensor) -> Tensor:
        """Add to the features what the convolutions find in them."""
        return features + self.body(features)


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """A perceptron with one hidden layer."""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


def grid_anchors(count: int) -> Tensor:
    """Return `count` cxcywh boxes (count, 4), evenly spread: training is far noisier from random ones."""
    rows = math.isqrt(count)
    columns = math.ceil(count / rows)
    index = torch.arange(count)
    x, y = (index % columns + 0.5) / columns, (index // columns + 0.5) / rows
    return torch.stack([x, y, torch.full_like(x, 0.3), torch.full_like(x, 0.3)], -1)


def cell_centres(count: int) -> Tensor:
    """Return the centres of `count` equal cells of [0, 1]."""
    return (torch.arange(count) + 0.5) / count


def sine_embedding(coordinates: Tensor, channels: int) -> Tensor:
    """Embed coordinates (..., K) in [0, 1] as sines and cosines of several frequencies (..., channels)."""
    frequencies = 4 * math.pi / 20 ** torch.linspace(0, 1, channels // (2 * coordinates.shape[-1]))
    phase = 2 * coordinates[..., None] * frequencies
    return torch.cat([phase.sin(), phase.cos()], -1).flatten(-2)
