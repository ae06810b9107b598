"""Outputs of a student and of a teacher, and targets: what one step of the criterion takes."""

from __future__ import annotations

import torch

import detr_kd_losses as dkl

C, D, B = 5, 8, 2
LEVELS = ((6, 8), (3, 4))


def generator(seed):
    return torch.Generator().manual_seed(seed)


def make_output(seed, layers, queries, *, group=0, features=True, channels=C, requires_grad=False):
    g = generator(seed)

    def tensor(*shape, boxes=False):
        values = torch.rand(*shape, generator=g) * 0.5 + 0.1 if boxes else torch.randn(*shape, generator=g)
        return values.requires_grad_(requires_grad)

    return dkl.DetectorOutput(
        logits=tensor(layers, B, queries, channels),
        boxes=tensor(layers, B, queries, 4, boxes=True),
        queries=tensor(layers, B, queries, D),
        features=[tensor(B, D, *size) for size in LEVELS] if features else None,
        group_logits=tensor(layers, B, group, channels) if group else None,
        group_boxes=tensor(layers, B, group, 4, boxes=True) if group else None,
    )


def make_targets(counts=(3, 1), padded=4):
    g = generator(99)
    mask = torch.arange(padded) < torch.tensor(counts).unsqueeze(-1)
    boxes = torch.rand(len(counts), padded, 4, generator=g) * 0.5 + 0.1
    return dkl.Targets(torch.randint(0, C, (len(counts), padded), generator=g), boxes, mask)


def leaves(output):
    tensors = [output.logits, output.boxes, output.group_logits, output.group_boxes, *(output.features or ())]
    return [tensor for tensor in tensors if tensor is not None]
