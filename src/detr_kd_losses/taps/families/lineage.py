"""RT-DETR and its heirs: v1, v2, D-FINE, DEIM, DEIMv2, pydfine, Ultralytics; the decoder is handed its heads."""

from __future__ import annotations

import torch
from torch import Tensor

from detr_kd_losses.outputs import BoxDistributions
from detr_kd_losses.taps.heads import weighting_function
from detr_kd_losses.taps.record import Call, Description, Layers, num_queries

__all__ = ["D_FINE", "RT_DETR"]


def predict_rt_detr(call: Call) -> Layers:
    """The decoder has run its heads itself."""
    boxes, logits = call.output[:2]
    return Layers(logits, boxes, stack(call.layer_outputs))


def predict_d_fine(call: Call) -> Layers:
    """As RT-DETR; after boxes and logits come the distributions of their edges and the boxes that these are about."""
    boxes, logits, corners, references = call.output[:4]
    up, scale = call.arguments["up"], call.arguments["reg_scale"]
    bins = weighting_function(corners.shape[-1] // 4 - 1, up, scale)
    distributions = BoxDistributions(corners, references, bins, scale.abs())
    return Layers(logits, boxes, stack(call.layer_outputs), distributions)


def num_queries_or_cells(call: Call) -> int:
    """As many queries as configured, or as there are cells to choose them from."""
    return min(num_queries(call), int(call.argument("memory").shape[1]))


def stack(states: list[Tensor]) -> Tensor | None:
    """States of all layers; None where the later layers of a D-FINE are wider than the first."""
    return torch.stack(states) if len({state.shape[-1] for state in states}) == 1 else None


_ARGUMENTS = {
    "content": ("target", "tgt", "embed"),
    "reference": ("ref_points_unact", "refer_bbox"),
    "memory": ("memory", "feats"),
    "shapes": ("spatial_shapes", "memory_spatial_shapes", "shapes"),
    "padding": ("memory_mask", "padding_mask"),
    "class head": ("score_head",),
    "box head": ("bbox_head",),
}

RT_DETR = Description(
    "RT-DETR",
    _ARGUMENTS,
    predict_rt_detr,
    optional=("padding",),
    true_is_padding=False,
    own_count=num_queries_or_cells,
    without=("attn_mask",),
    training_flag=True,
    memory_projections=("cross_attn.value_proj",),
)
D_FINE = RT_DETR._replace(
    name="D-FINE",
    arguments={**_ARGUMENTS, "integral": ("integral",), "first box head": ("pre_bbox_head",)},
    predict=predict_d_fine,
    without=("attn_mask", "dn_meta"),
    memory_projections=(),  # it samples the memory as it is
)
