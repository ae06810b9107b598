"""The shapes of DETR and the repositories after it, in our own words: signatures, calls, answers; no line of theirs.

What is frozen here is what a tap reads: names of the decoder's arguments, whether sequences come first, the unit of a
reference, where heads are, where denoising queries and copies of group DETR are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from support.decoder_parts import (
    CLASSES,
    WIDTH,
    Backbone,
    Layer,
    NestedTensor,
    as_layers,
    flatten,
    heads,
    layers,
    logit,
    sizes_of,
    strengthen,
)

QUERIES, LAYERS, DENOISING, GROUPS = 6, 3, 4, 3


class Decoder(nn.Module):
    def __init__(self, number: int = LAYERS) -> None:
        super().__init__()
        self.layers, self.norm = layers(number, WIDTH), nn.LayerNorm(WIDTH)
        self.d_model = WIDTH


class DetrDecoder(Decoder):
    """Sequences first; answers the normalised states of all layers."""

    def forward(
        self, tgt, memory, tgt_mask=None, memory_mask=None, tgt_key_padding_mask=None, memory_key_padding_mask=None,
        pos=None, query_pos=None,
    ):  # fmt: skip
        states = []
        image, target, position = (x.transpose(0, 1) for x in (memory + pos, tgt, query_pos))
        for layer in self.layers:
            target = layer(target, position, image, tgt_mask, memory_key_padding_mask)
            states.append(self.norm(target).transpose(0, 1))
        return torch.stack(states)


class ConditionalDecoder(DetrDecoder):
    """As DETR, with the points that queries look at: (B, N, 2), of their positions."""

    def __init__(self, number: int = LAYERS) -> None:
        super().__init__(number)
        self.ref_point_head = nn.Linear(WIDTH, 2)

    def forward(
        self, tgt, memory, tgt_mask=None, memory_mask=None, tgt_key_padding_mask=None, memory_key_padding_mask=None,
        pos=None, query_pos=None,
    ):  # fmt: skip
        padding = {"memory_key_padding_mask": memory_key_padding_mask}
        states = super().forward(tgt, memory, tgt_mask, **padding, pos=pos, query_pos=query_pos)
        return [states.transpose(1, 2), self.ref_point_head(query_pos).sigmoid().transpose(0, 1)]


class DabDecoder(Decoder):
    """Sequences first, anchors before the sigmoid; answers states and the anchors of each layer."""

    def __init__(self, number: int = LAYERS) -> None:
        super().__init__(number)
        self.ref_point_head = nn.Linear(4, WIDTH)
        self.bbox_embed = None

    def forward(
        self, tgt, memory, tgt_mask=None, memory_mask=None, tgt_key_padding_mask=None, memory_key_padding_mask=None,
        pos=None, refpoints_unsigmoid=None,
    ):  # fmt: skip
        image, target, anchors = ((memory + pos).transpose(0, 1), tgt.transpose(0, 1), refpoints_unsigmoid.sigmoid())
        anchors, states, all_anchors = anchors.transpose(0, 1), [], []
        for layer in self.layers:
            target = layer(target, self.ref_point_head(anchors), image, tgt_mask, memory_key_padding_mask)
            states.append(self.norm(target))
            all_anchors.append(anchors)
            anchors = (self.bbox_embed(target) + coarse_logit(anchors)).sigmoid().detach()
        return [torch.stack(states), torch.stack(all_anchors)]


class DeformableDecoder(Decoder):
    """Batch first, references in [0, 1], of points or boxes; all by position; refines them where it has heads."""

    def __init__(self, number: int = LAYERS) -> None:
        super().__init__(number)
        self.bbox_embed = self.class_embed = None

    def forward(
        self, tgt, reference_points, src, src_spatial_shapes, src_level_start_index, src_valid_ratios, query_pos=None,
        src_padding_mask=None,
    ):  # fmt: skip
        states, references = [], []
        for index, layer in enumerate(self.layers):
            tgt = layer(tgt, query_pos + reference_points.sum(-1, keepdim=True), src, None, src_padding_mask)
            if self.bbox_embed is not None:
                size = reference_points.shape[-1]
                moved = self.bbox_embed[index](tgt)
                moved = torch.cat([moved[..., :size] + logit(reference_points), moved[..., size:]], -1)
                reference_points = moved.sigmoid().detach()
            states.append(tgt)
            references.append(reference_points)
        return torch.stack(states), torch.stack(references)


class DinoDecoder(Decoder):
    """Sequences first, by name; answers lists, batch first: states, and one reference more."""

    def __init__(self, number: int = LAYERS) -> None:
        super().__init__(number)
        self.ref_point_head = nn.Linear(4, WIDTH)
        self.bbox_embed: Any = None

    def forward(
        self, tgt, memory, tgt_mask=None, memory_mask=None, tgt_key_padding_mask=None, memory_key_padding_mask=None,
        pos=None, refpoints_unsigmoid=None, level_start_index=None, spatial_shapes=None, valid_ratios=None,
    ):  # fmt: skip
        image, target = memory.transpose(0, 1), tgt.transpose(0, 1)
        references = [refpoints_unsigmoid.sigmoid().transpose(0, 1)]
        states = []
        for index, layer in enumerate(self.layers):
            position = self.ref_point_head(references[-1].detach())
            target = layer(target, position, image, tgt_mask, memory_key_padding_mask)
            moved = self.bbox_embed[index](target) + coarse_logit(references[-1].detach())
            states.append(self.norm(target))
            references.append(moved.sigmoid())
        return [states, references]


class GroupLayer(Layer):
    """Its queries see those of their own group alone while it trains, as in LW-DETR and RF-DETR."""

    def attend_to_each_other(self, target: Tensor, position: Tensor, blocked: Tensor | None) -> Tensor:
        groups = GROUPS if self.training else 1
        parts = zip(target.chunk(groups, 1), position.chunk(groups, 1), strict=True)
        see = super().attend_to_each_other
        return torch.cat([see(one, two, blocked) for one, two in parts], 1)


class RfDetrDecoder(Decoder):
    """Batch first; one reference box for all layers, of which heads say shifts and log-scales."""

    def __init__(self, number: int = LAYERS) -> None:
        super().__init__(number)
        self.layers = nn.ModuleList(GroupLayer(WIDTH) for _ in range(number))
        self.ref_point_head = nn.Linear(4, WIDTH)
        self.lite_refpoint_refine, self.bbox_reparam = True, True

    def forward(
        self, tgt, memory, tgt_mask=None, memory_mask=None, tgt_key_padding_mask=None, memory_key_padding_mask=None,
        pos=None, refpoints_unsigmoid=None, level_start_index=None, spatial_shapes=None, spatial_shapes_hw=None,
        valid_ratios=None,
    ):  # fmt: skip
        states = []
        for layer in self.layers:
            tgt = layer(tgt, self.ref_point_head(refpoints_unsigmoid), memory, None, memory_key_padding_mask)
            states.append(self.norm(tgt))
        return torch.stack(states), refpoints_unsigmoid.unsqueeze(0)


def coarse_logit(boxes: Tensor) -> Tensor:
    """DAB-DETR, DN-DETR and DINO clamp at 1e-3."""
    return (boxes.clamp(min=1e-3) / (1 - boxes).clamp(min=1e-3)).log()


class SingleScale(nn.Module):
    """Around DETR, Conditional DETR and DAB-DETR: one map, which it flattens to (S, B, D)."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder, self.num_queries, self.num_patterns = decoder, QUERIES, 0

    def forward(self, src, mask, query_embed, pos_embed, tgt=None, attn_mask=None):
        memory, position = (x.flatten(2).permute(2, 0, 1) for x in (src, pos_embed))
        if query_embed.ndim == 2:
            query_embed = query_embed.unsqueeze(1).repeat(1, len(src), 1)
        name = "refpoints_unsigmoid" if isinstance(self.decoder, DabDecoder) else "query_pos"
        tgt = query_embed.new_zeros(*query_embed.shape[:2], WIDTH) if tgt is None else tgt
        options = {"pos": position, name: query_embed} | ({} if attn_mask is None else {"tgt_mask": attn_mask})
        return self.decoder(tgt, memory, memory_key_padding_mask=mask.flatten(1), **options)


class Detr(nn.Module):
    """DETR, Conditional DETR, DAB-DETR, and DN-DETR, which answers a tuple and takes arguments of denoising."""

    def __init__(self, decoder: Decoder, *, denoising: bool = False) -> None:
        super().__init__()
        anchored = isinstance(decoder, DabDecoder)
        self.backbone, self.transformer = Backbone(WIDTH), SingleScale(decoder)
        self.query_embed = nn.Embedding(QUERIES, 4 if anchored else WIDTH)
        self.label_enc = nn.Embedding(CLASSES, WIDTH)
        self.denoising = denoising
        self.class_embed, self.bbox_embed = (
            nn.Linear(WIDTH, CLASSES + (type(decoder) is DetrDecoder)),
            nn.Linear(WIDTH, 4),
        )
        if anchored:
            decoder.bbox_embed = self.bbox_embed

    def forward(self, samples: NestedTensor, dn_args: Any = None) -> Any:
        src = self.backbone(samples.tensors)[0]
        mask = samples.mask[:, ::8, ::8]
        queries, content, blocked = self.query_embed.weight, None, None
        if self.denoising:
            queries = queries.unsqueeze(1).expand(-1, len(src), -1)
            content = torch.zeros(QUERIES, len(src), WIDTH)
            if self.training:
                noisy = self.label_enc.weight[:DENOISING, None].expand(-1, len(src), -1)
                queries, content = torch.cat([noisy[..., :4], queries]), torch.cat([noisy, content])
                blocked = torch.zeros(len(queries), len(queries), dtype=torch.bool)
                blocked[DENOISING:, :DENOISING] = True
        answer = self.transformer(src, mask, queries, torch.zeros_like(src), content, blocked)
        outputs = self.heads(answer)
        return (outputs, {"pad_size": DENOISING if self.training else 0}) if self.denoising else outputs

    def heads(self, answer: Any) -> dict[str, Any]:
        states, references = answer if isinstance(answer, list) else (answer.transpose(1, 2), None)
        offsets = self.bbox_embed(states)
        if references is not None:
            size = references.shape[-1]
            before = logit(references) if size == 2 else coarse_logit(references)
            offsets = torch.cat([offsets[..., :size] + before, offsets[..., size:]], -1)
        own = slice(-QUERIES, None)
        *aux, last = as_layers(self.class_embed(states)[:, :, own], offsets.sigmoid()[:, :, own])
        return {**last, "aux_outputs": aux}


class MultiScale(nn.Module):
    """Around Deformable DETR, DINO and RF-DETR: maps of all levels and their masks."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder, self.num_queries, self.d_model = decoder, QUERIES, WIDTH

    def forward(self, srcs, masks, content, references, position=None, attn_mask=None):
        memory = flatten(srcs)
        padding = torch.cat([mask.flatten(1) for mask in masks], 1)
        shapes = torch.tensor(sizes_of(srcs))
        if isinstance(self.decoder, DeformableDecoder):
            return self.decoder(content, references, memory, shapes, None, None, position, padding)
        first = isinstance(self.decoder, DinoDecoder)
        turn: Callable[[Tensor], Tensor] = (lambda x: x.transpose(0, 1)) if first else (lambda x: x)
        return self.decoder(
            tgt=turn(content),
            memory=turn(memory),
            memory_key_padding_mask=padding,
            pos=turn(torch.zeros_like(memory)),
            refpoints_unsigmoid=turn(references),
            level_start_index=None,
            spatial_shapes=shapes,
            valid_ratios=None,
            **({"tgt_mask": attn_mask} if first else {"spatial_shapes_hw": sizes_of(srcs)}),
        )


class Deformable(nn.Module):
    """Deformable DETR in its three variants, DINO with denoising queries, RF-DETR with groups."""

    def __init__(self, decoder: Decoder, *, refine: bool = False, two_stage: bool = False) -> None:
        super().__init__()
        self.backbone, self.transformer, self.two_stage = Backbone(WIDTH), MultiScale(decoder), two_stage
        self.kind = type(decoder).__name__
        self.num_queries = QUERIES
        copies = GROUPS if self.kind == "RfDetrDecoder" else 1
        size = 4 if two_stage or self.kind != "DeformableDecoder" else 2
        self.content, self.position = nn.Embedding(copies * QUERIES, WIDTH), nn.Embedding(QUERIES, WIDTH)
        self.references, self.label_enc = nn.Embedding(copies * QUERIES, size), nn.Embedding(CLASSES, WIDTH)
        if self.kind == "RfDetrDecoder":
            self.class_embed, self.bbox_embed = nn.Linear(WIDTH, CLASSES), nn.Linear(WIDTH, 4)
            return
        number = LAYERS + two_stage  # the last of two stages is the encoder's
        self.class_embed, self.bbox_embed = heads(number, WIDTH, CLASSES), heads(number, WIDTH, 4)
        if refine or self.kind == "DinoDecoder":
            decoder.bbox_embed = self.bbox_embed

    def forward(self, samples: NestedTensor, targets: Any = None) -> dict[str, Any]:
        maps = self.backbone(samples.tensors)
        masks = [samples.mask[:, ::stride, ::stride] for stride in (8, 16)]
        number = None if self.training or self.kind != "RfDetrDecoder" else QUERIES
        content, references = (x.weight[:number].expand(len(maps[0]), -1, -1) for x in (self.content, self.references))
        position, blocked = self.position.weight.expand(len(maps[0]), -1, -1), None
        if self.kind != "DinoDecoder":
            references = references.sigmoid()
        elif self.training and targets is not None:
            noisy = self.label_enc.weight[:DENOISING].expand(len(maps[0]), -1, -1)
            content, references = torch.cat([noisy, content], 1), torch.cat([noisy[..., :4], references], 1)
            blocked = torch.zeros(content.shape[1], content.shape[1], dtype=torch.bool)
            blocked[DENOISING:, :DENOISING] = True
        answer = self.transformer(maps, masks, content, references, position, blocked)
        logits, boxes = self.heads(answer, references)
        first = 0 if blocked is None else DENOISING
        *aux, last = as_layers(logits[:, :, first:], boxes[:, :, first:])
        return {**last, "aux_outputs": aux, "enc_outputs": last}

    def heads(self, answer: Any, first: Tensor) -> tuple[Tensor, Tensor]:
        states, references = answer
        if self.kind == "RfDetrDecoder":
            shift, scale = self.bbox_embed(states).split(2, -1)
            centre, size = references.split(2, -1)
            return self.class_embed(states), torch.cat([shift * size + centre, scale.exp() * size], -1)
        befores = references[:-1] if self.kind == "DinoDecoder" else [first, *references[:-1]]
        inverse = coarse_logit if self.kind == "DinoDecoder" else logit
        boxes = []
        for state, reference, head in zip(states, befores, self.bbox_embed, strict=False):
            offsets, size = head(state), reference.shape[-1]
            boxes.append(torch.cat([offsets[..., :size] + inverse(reference), offsets[..., size:]], -1).sigmoid())
        logits = [head(state) for head, state in zip(self.class_embed, states, strict=False)]
        return torch.stack(logits), torch.stack(boxes)


KINDS: dict[str, Callable[[], nn.Module]] = {
    "detr": lambda: Detr(DetrDecoder()),
    "conditional": lambda: Detr(ConditionalDecoder()),
    "dab": lambda: Detr(DabDecoder()),
    "dn": lambda: Detr(DabDecoder(), denoising=True),
    "deformable": lambda: Deformable(DeformableDecoder()),
    "deformable_refine": lambda: Deformable(DeformableDecoder(), refine=True),
    "deformable_two_stage": lambda: Deformable(DeformableDecoder(), refine=True, two_stage=True),
    "dino": lambda: Deformable(DinoDecoder()),
    "rf_detr": lambda: Deformable(RfDetrDecoder()),
}


def build(kind: str, *, seed: int = 0) -> nn.Module:
    return strengthen(KINDS[kind](), seed)


def call(model: nn.Module, samples: NestedTensor, targets: Any = None) -> Any:
    """As the engine of each repository calls its model; the dict of predictions alone."""
    if isinstance(model, Detr):
        outputs = model(samples, dn_args=targets) if model.denoising else model(samples)
        return outputs[0] if isinstance(outputs, tuple) else outputs
    dino = model.kind == "DinoDecoder"
    return model(samples, targets) if dino else model(samples)
