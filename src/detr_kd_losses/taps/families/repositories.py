"""DETR and the research repositories that followed it: Conditional, DAB, DN, Deformable, DINO; LW-DETR and RF-DETR."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from detr_kd_losses.taps.heads import inverse_sigmoid, move, scale_and_shift
from detr_kd_losses.taps.record import Call, Description, Layers, num_queries

__all__ = ["CONDITIONAL", "DAB", "DEFORMABLE", "DETR", "DINO", "RF_DETR"]


def predict_detr(call: Call) -> Layers:
    """The same heads after every layer."""
    states = call.output.transpose(1, 2)
    return Layers(call.find("class_embed")(states), call.find("bbox_embed")(states).sigmoid(), states)


def predict_conditional(call: Call) -> Layers:
    """As DETR, with centres relative to the point that a query looks at."""
    states, points = call.output
    boxes = move(call.find("bbox_embed")(states), inverse_sigmoid(points)).sigmoid()
    return Layers(call.find("class_embed")(states), boxes, states)


def predict_dab(call: Call) -> Layers:
    """The same class head after every layer, boxes relative to the anchors of the layer."""
    states, anchors = call.output
    heads = call.find("bbox_embed")
    offsets = _each(heads, states) if isinstance(heads, nn.ModuleList) else heads(states)
    boxes = move(offsets, inverse_sigmoid(anchors, eps=1e-3)).sigmoid()
    return Layers(call.find("class_embed")(states), boxes, states)


def predict_deformable(call: Call) -> Layers:
    """One head a layer, relative to the reference that the layer before has left."""
    states, refined = call.output
    references = [call.argument("reference"), *refined[:-1]]
    return _by_layer(call, states, [inverse_sigmoid(reference) for reference in references])


def predict_dino(call: Call) -> Layers:
    """As Deformable DETR; the first reference is among those that are answered."""
    states, references = call.output
    logits = [inverse_sigmoid(reference, eps=1e-3) for reference in references[:-1]]
    return _by_layer(call, torch.stack(states), logits)


def predict_rf_detr(call: Call) -> Layers:
    """The same heads after every layer, boxes as shifts and log-scales of a reference box."""
    states, references = call.output[:2]
    offsets = call.find("bbox_embed")(states)
    reparametrised = getattr(call.decoder, "bbox_reparam", True)
    boxes = scale_and_shift(offsets, references) if reparametrised else (offsets + references).sigmoid()
    return Layers(call.find("class_embed")(states), boxes, states)


def _by_layer(call: Call, states: Tensor, references: list[Tensor]) -> Layers:
    offsets = _each(call.find("bbox_embed"), states)
    boxes = [move(one, reference).sigmoid() for one, reference in zip(offsets, references, strict=True)]
    return Layers(_each(call.find("class_embed"), states), torch.stack(boxes), states)


def _each(heads: nn.ModuleList, states: Tensor) -> Tensor:
    """A head for each layer. Where there are two stages, the last of the heads is the encoder's."""
    return torch.stack([head(state) for head, state in zip(heads, states, strict=False)])


def given_maps(call: Call) -> list[tuple[int, int]]:
    """Sizes of the maps that the transformer around the decoder is given: what is known without a look at the GPU."""
    maps = call.outer_arguments.get("srcs") or [call.outer_arguments["src"]]
    return [(level.shape[-2], level.shape[-1]) for level in maps]


def queries_of_patterns(call: Call) -> int:
    """Each query of DAB-DETR comes once for every pattern."""
    patterns = [getattr(module, "num_patterns", 0) for module in call.ancestors]
    return num_queries(call) * max(1, *patterns)


_DETR = {
    "content": ("tgt", "target"),
    "position": ("query_pos",),
    "memory": ("memory",),
    "padding": ("memory_key_padding_mask",),
}
DETR = Description("DETR", _DETR, predict_detr, activation="softmax", batch_first=False, sizes=given_maps)
_KEYS_AND_VALUES = ("ca_kcontent_proj", "ca_kpos_proj", "ca_v_proj")
CONDITIONAL = DETR._replace(
    name="Conditional DETR",
    predict=predict_conditional,
    attributes=("ref_point_head",),
    activation="sigmoid",
    memory_projections=_KEYS_AND_VALUES,
)

_DAB = {
    "content": ("tgt", "target"),
    "reference": ("refpoints_unsigmoid", "reference_points_unsigmoid"),
    "memory": ("memory",),
    "padding": ("memory_key_padding_mask", "memory_padding_mask"),
}
_VALUES = ("cross_attn.value_proj",)
DAB = Description(
    "DAB-DETR or DN-DETR",
    _DAB,
    predict_dab,
    batch_first=False,
    own_count=queries_of_patterns,
    without=("tgt_mask",),
    sizes=given_maps,
    memory_projections=_KEYS_AND_VALUES,
)
DINO = DAB._replace(
    name="DINO",
    arguments={**_DAB, "shapes": ("spatial_shapes",), "ratios": ("valid_ratios",)},
    predict=predict_dino,
    own_count=num_queries,
    without=("tgt_mask", "target_mask"),
    memory_projections=_VALUES,
)
RF_DETR = DINO._replace(
    name="RF-DETR or LW-DETR",
    predict=predict_rf_detr,
    attributes=("lite_refpoint_refine",),
    unit="box",
    batch_first=True,
    own_queries="first",
    without=("tgt_mask",),
    grouped="",
)
DEFORMABLE = Description(
    "Deformable DETR",
    {
        "content": ("tgt", "target"),
        "position": ("query_pos",),
        "reference": ("reference_points",),
        "memory": ("src",),
        "shapes": ("src_spatial_shapes",),
        "padding": ("src_padding_mask",),
    },
    predict_deformable,
    unit="box",
    sizes=given_maps,
    memory_projections=_VALUES,
)
