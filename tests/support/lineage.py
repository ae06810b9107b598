"""The shapes that RT-DETR and its heirs have, in our own words: signatures, calls, answers; no line of theirs.

What is frozen here is what a tap reads: names and order of the decoder's arguments, who calls by position, where
denoising queries are, what is answered in training and in evaluation, and what is fixed to one size of images.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from support.decoder_parts import (
    CLASSES,
    WIDTH,
    Backbone,
    as_layers,
    flatten,
    heads,
    layers,
    logit,
    sizes_of,
    strengthen,
)

QUERIES, LAYERS, DENOISING, BINS = 6, 3, 4, 8
EVAL_SIZE = (32, 32)


class Decoder(nn.Module):
    """Predicts after each layer in training, after `eval_idx` alone in evaluation."""

    def __init__(self, width: int = WIDTH, number: int = LAYERS, eval_idx: int = -1) -> None:
        super().__init__()
        self.layers = layers(number, width)
        self.hidden_dim = width
        self.eval_idx = eval_idx if eval_idx >= 0 else number + eval_idx

    def run(self, target: Tensor, reference: Tensor, memory: Tensor, given: tuple, blocked: Tensor | None) -> Any:
        bbox_head, score_head, query_pos_head = given
        boxes, all_boxes, all_logits = reference.sigmoid(), [], []
        for index, layer in enumerate(self.layers):
            target = layer(target, query_pos_head(boxes), memory, blocked)
            refined = (bbox_head[index](target) + logit(boxes)).sigmoid()
            if self.training or index == self.eval_idx:
                all_boxes.append(refined)
                all_logits.append(score_head[index](target))
            if not self.training and index == self.eval_idx:
                break
            boxes = refined.detach()
        return torch.stack(all_boxes), torch.stack(all_logits)


class DecoderV1(Decoder):
    def forward(
        self, tgt, ref_points_unact, memory, memory_spatial_shapes, memory_level_start_index, bbox_head, score_head,
        query_pos_head, attn_mask=None, memory_mask=None,
    ):  # fmt: skip
        assert memory_level_start_index[0] == 0
        return self.run(tgt, ref_points_unact, memory, (bbox_head, score_head, query_pos_head), attn_mask)


class DecoderV2(Decoder):
    def forward(
        self, target, ref_points_unact, memory, memory_spatial_shapes, bbox_head, score_head, query_pos_head,
        attn_mask=None, memory_mask=None,
    ):  # fmt: skip
        return self.run(target, ref_points_unact, memory, (bbox_head, score_head, query_pos_head), attn_mask)


class DecoderUltralytics(Decoder):
    def forward(
        self, embed, refer_bbox, feats, shapes, bbox_head, score_head, pos_mlp, attn_mask=None, padding_mask=None
    ):
        return self.run(embed, refer_bbox, feats, (bbox_head, score_head, pos_mlp), attn_mask)


class DecoderDFine(Decoder):
    """Answers distributions as well, and what the first head said before; pydfine adds a None."""

    def forward(
        self, target, ref_points_unact, memory, spatial_shapes, bbox_head, score_head, query_pos_head, pre_bbox_head,
        integral, up, reg_scale, attn_mask=None, memory_mask=None, dn_meta=None, return_queries=False,
    ):  # fmt: skip
        assert attn_mask is None or dn_meta is not None
        bins = weighting_of_the_paper(BINS, float(up), float(reg_scale))
        boxes, corners, answers = ref_points_unact.sigmoid(), 0, []
        for index, layer in enumerate(self.layers):
            target = layer(target, query_pos_head(boxes), memory, attn_mask)
            if index == 0:
                initial = (pre_bbox_head(target) + logit(boxes)).sigmoid()
                first = initial, score_head[0](target)
            corners = corners + bbox_head[index](target)
            refined = moved_edges(initial.detach(), integral(corners, bins), float(reg_scale))
            if self.training or index == self.eval_idx:
                answers.append((refined, score_head[index](target), corners, initial.detach()))
            if not self.training and index == self.eval_idx:
                break
            boxes = refined.detach()
        return (*(torch.stack(parts) for parts in zip(*answers, strict=True)), *first, None)


def weighting_of_the_paper(number: int, up: float, scale: float) -> Tensor:
    """Equation 4 of D-FINE, case by case, times 1/c."""
    a, c, n = up, 1 / scale, number
    values = [-2 * a]
    values += [c - c * (a / c + 1) ** ((n - 2 * i) / (n - 2)) for i in range(1, n // 2)]
    values += [-c + c * (a / c + 1) ** ((2 * i - n) / (n - 2)) for i in range(n // 2, n)]
    return torch.tensor([*values, 2 * a]) * scale


def moved_edges(boxes: Tensor, distances: Tensor, scale: float) -> Tensor:
    """Boxes (..., 4) whose edges are moved, cxcywh, by distances in half widths and sizes over the scale."""
    (x, y, w, h), (left, top, right, bottom) = boxes.unbind(-1), distances.unbind(-1)
    x1, x2 = x - (0.5 * scale + left) * w / scale, x + (0.5 * scale + right) * w / scale
    y1, y2 = y - (0.5 * scale + top) * h / scale, y + (0.5 * scale + bottom) * h / scale
    return torch.stack([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1], -1)


class Integral(nn.Module):
    """Expected bin of each edge."""

    def forward(self, corners: Tensor, bins: Tensor) -> Tensor:
        return corners.unflatten(-1, (4, -1)).softmax(-1) @ bins


class Encoder(nn.Module):
    """Adds positions, in evaluation those of one size of images."""

    def __init__(self, width: int, eval_spatial_size: tuple[int, int] | None) -> None:
        super().__init__()
        self.eval_spatial_size = eval_spatial_size
        self.width = width

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        height, width = maps[0].shape[-2:]
        if not self.training and self.eval_spatial_size:
            height, width = (side // 8 for side in self.eval_spatial_size)
        position = torch.linspace(-1, 1, height * width).reshape(height, width)
        return [maps[0] + position, *maps[1:]]


class Transformer(nn.Module):
    """Chooses queries among the cells, calls the decoder by position, takes its answer apart."""

    def __init__(self, decoder: Decoder, eval_spatial_size: tuple[int, int] | None, queries: int) -> None:
        super().__init__()
        width, number = decoder.hidden_dim, len(decoder.layers)
        self.decoder, self.num_queries, self.eval_spatial_size = decoder, queries, eval_spatial_size
        self.d_fine = isinstance(decoder, DecoderDFine)
        self.enc_score_head, self.enc_bbox_head = nn.Linear(width, CLASSES), nn.Linear(width, 4)
        self.dec_score_head = heads(number, width, CLASSES)
        self.dec_bbox_head = heads(number, width, 4 * (BINS + 1) if self.d_fine else 4)
        self.query_pos_head = nn.Linear(4, width)
        self.denoising_class_embed = nn.Embedding(CLASSES, width)
        if self.d_fine:
            self.pre_bbox_head, self.integral = nn.Linear(width, 4), Integral()
            self.up = nn.Parameter(torch.tensor([0.5]), requires_grad=False)
            self.reg_scale = nn.Parameter(torch.tensor([4.0]), requires_grad=False)

    def forward(self, maps: list[Tensor], targets: Any = None) -> Any:
        memory, shapes = flatten(maps), sizes_of(maps)
        anchors = self.anchors(shapes)
        scores, boxes = self.enc_score_head(memory), self.enc_bbox_head(memory) + anchors
        chosen = scores.max(-1).values.topk(min(self.num_queries, memory.shape[1]), 1).indices.unsqueeze(-1)
        content, reference, enc = (x.gather(1, chosen.expand(-1, -1, x.shape[-1])) for x in (memory, boxes, scores))
        proposals = as_layers(enc.unsqueeze(0), reference.sigmoid().unsqueeze(0))
        content, reference, blocked, meta = content.detach(), reference.detach(), None, None
        if self.training and targets is not None:
            noisy = self.denoising_class_embed(torch.arange(DENOISING) % CLASSES).expand(len(memory), -1, -1)
            content = torch.cat([noisy, content], 1)
            reference = torch.cat(
                [torch.linspace(-1, 1, DENOISING * 4).view(1, -1, 4).expand(len(memory), -1, -1), reference], 1
            )
            blocked = torch.zeros(content.shape[1], content.shape[1], dtype=torch.bool)
            blocked[DENOISING:, :DENOISING] = True
            meta = {"dn_num_split": [DENOISING, content.shape[1] - DENOISING]}
        given = [self.dec_bbox_head, self.dec_score_head, self.query_pos_head]
        given += [self.pre_bbox_head, self.integral, self.up, self.reg_scale] if self.d_fine else []
        options = {"dn_meta": meta} if self.d_fine else {}
        starts = [[0]] if isinstance(self.decoder, DecoderV1) else []
        boxes, logits, *_ = self.decoder(
            content, reference, memory, shapes, *starts, *given, attn_mask=blocked, **options
        )
        if isinstance(self.decoder, DecoderUltralytics) and not self.training:
            return boxes.squeeze(0), logits.squeeze(0)
        if meta is not None:
            boxes, logits = boxes[:, :, DENOISING:], logits[:, :, DENOISING:]
        *earlier, last = as_layers(logits, boxes)
        if not self.training:
            return last
        if isinstance(self.decoder, DecoderV1):
            return {**last, "aux_outputs": [*earlier, *proposals]}
        return {**last, "aux_outputs": earlier, "enc_aux_outputs": proposals}

    def anchors(self, shapes: list[list[int]]) -> Tensor:
        if not self.training and self.eval_spatial_size:
            shapes = [[side // stride for side in self.eval_spatial_size] for stride in (8, 16)]
        return torch.cat([torch.linspace(-2, 2, h * w * 4).view(1, -1, 4) for h, w in shapes], 1)


class Lineage(nn.Module):
    """Images in, a dict of predictions out; with targets in training, denoising queries in front."""

    def __init__(self, decoder: Decoder, eval_spatial_size: tuple[int, int] | None, queries: int) -> None:
        super().__init__()
        self.backbone = Backbone(decoder.hidden_dim)
        self.encoder = Encoder(decoder.hidden_dim, eval_spatial_size)
        self.decoder = Transformer(decoder, eval_spatial_size, queries)

    def forward(self, x: Tensor, targets: Any = None) -> Any:
        return self.decoder(self.encoder(self.backbone(x)), targets)


DECODERS = {"v1": DecoderV1, "v2": DecoderV2, "d_fine": DecoderDFine, "ultralytics": DecoderUltralytics}


def build(
    kind: str, *, seed: int = 0, width: int = WIDTH, number: int = LAYERS, queries: int = QUERIES, eval_idx: int = -1,
    eval_size: tuple[int, int] | None = EVAL_SIZE,
) -> Lineage:  # fmt: skip
    model = Lineage(DECODERS[kind](width, number, eval_idx), eval_size, queries)
    up_and_scale = [] if kind != "d_fine" else [model.decoder.up.clone(), model.decoder.reg_scale.clone()]
    strengthen(model, seed)
    if up_and_scale:
        model.decoder.up.data, model.decoder.reg_scale.data = up_and_scale
    return model
