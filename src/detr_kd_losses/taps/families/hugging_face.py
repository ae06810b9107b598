"""The families of transformers, told by ``config.model_type``; nothing of transformers is imported.

Their outputs are no substitute for a tap: most hold the last layer only, and ``auxiliary_loss=True`` in the
configuration, which would add the others, changes the forward pass of DETR and Conditional DETR.
"""

from __future__ import annotations

import torch
from torch import Tensor

from detr_kd_losses.outputs import BoxDistributions
from detr_kd_losses.taps.heads import inverse_sigmoid, move, scale_and_shift, weighting_function
from detr_kd_losses.taps.record import Call, Description, Layers

__all__ = ["FAMILIES"]


def predict_detr(call: Call) -> Layers:
    """DETR: the same heads after every layer, on its normalised output."""
    states = _normalised_layers(call)
    boxes = call.find("bbox_predictor")(states).sigmoid()
    return Layers(call.find("class_labels_classifier")(states), boxes, states)


def predict_conditional(call: Call) -> Layers:
    """Conditional DETR: as DETR, with centres relative to a reference point."""
    states = _normalised_layers(call)
    points = inverse_sigmoid(call.output.reference_points).transpose(0, 1)  # (N, B, 2) -> (B, N, 2)
    boxes = move(call.find("bbox_predictor")(states), points).sigmoid()
    return Layers(call.find("class_labels_classifier")(states), boxes, states)


def predict_dab(call: Call) -> Layers:
    """DAB-DETR: the same heads after every layer, boxes relative to the anchors of the layer."""
    states = call.output.intermediate_hidden_states
    boxes = (call.find("bbox_predictor")(states) + inverse_sigmoid(call.output.reference_points)).sigmoid()
    return Layers(call.find("class_embed")(states), boxes, states)


def predict_deformable(call: Call) -> Layers:
    """Deformable DETR: one head a layer, relative to the reference that the layer before has left."""
    states = call.output.intermediate_hidden_states.transpose(0, 1)
    refined = call.output.intermediate_reference_points.transpose(0, 1)
    references = [call.argument("reference"), *refined[:-1]]
    # Not strict: in two stages there is a head more, that of the encoder.
    logits = [head(state) for head, state in zip(call.find("class_embed"), states, strict=False)]
    boxes = [
        move(head(state), inverse_sigmoid(reference)).sigmoid()
        for head, state, reference in zip(call.find("bbox_embed"), states, references, strict=False)
    ]
    return Layers(torch.stack(logits), torch.stack(boxes), states)


def predict_rt_detr(call: Call) -> Layers:
    """RT-DETR: the decoder has run its heads itself; what it calls reference points are the boxes."""
    output = call.output
    said = output.intermediate_logits, output.intermediate_reference_points, output.intermediate_hidden_states
    return Layers(*(part.transpose(0, 1) for part in said))


def predict_d_fine(call: Call) -> Layers:
    """D-FINE: as RT-DETR, after one entry more, that of the head before the first refinement; states layer first."""
    output, decoder = call.output, call.decoder
    states = output.intermediate_hidden_states
    corners, references, logits, boxes = (
        part.transpose(0, 1)
        for part in (
            output.intermediate_predicted_corners,
            output.initial_reference_points,
            output.intermediate_logits,
            output.intermediate_reference_points,
        )
    )
    scale: Tensor = decoder.reg_scale  # type: ignore[assignment]
    bins = weighting_function(corners.shape[-1] // 4 - 1, decoder.up, scale)  # type: ignore[arg-type]
    distributions = BoxDistributions(corners, references, bins, scale.abs())
    return Layers(logits[-len(states) :], boxes[-len(states) :], states, distributions)


def predict_lw_detr(call: Call) -> Layers:
    """LW-DETR: the same heads after every layer, boxes as shifts and log-scales of one reference box."""
    states = call.output.intermediate_hidden_states
    boxes = scale_and_shift(call.find("bbox_embed")(states), call.output.intermediate_reference_points[-1])
    return Layers(call.find("class_embed")(states), boxes, states)


def _normalised_layers(call: Call) -> Tensor:
    """Outputs of all layers after the decoder's normalisation (L, B, N, D); it has treated the last one itself."""
    normalise = call.decoder.get_submodule("layernorm")
    earlier = [normalise(state) for state in call.layer_outputs[:-1]]
    return torch.stack([*earlier, call.output.last_hidden_state])


def level_sizes(call: Call) -> list[tuple[int, int]]:
    """Sizes as the decoder is told them; those that know one map alone give it to the decoder flattened."""
    listed = call.arguments.get("spatial_shapes_list") or [call.watched.shape[-2:]]
    return [(int(height), int(width)) for height, width in listed]


def configured_queries(call: Call) -> int:
    """How many queries the configuration says."""
    config = call.find("config")
    two_stage = getattr(config, "two_stage", False)
    return int(config.two_stage_num_proposals if two_stage else config.num_queries)


_CONTENT_AND_MEMORY = {"content": ("inputs_embeds",), "memory": ("encoder_hidden_states",)}
_PADDING = {"padding": ("encoder_attention_mask",)}
_POSITION = {"position": ("object_queries_position_embeddings", "query_position_embeddings", "position_embeddings")}
_REFERENCE = {"reference": ("reference_points",)}
_VALUES = ("encoder_attn.value_proj",)

_DETR = Description(
    "DETR",
    {**_CONTENT_AND_MEMORY, **_POSITION, **_PADDING},
    predict_detr,
    path="model.decoder",
    activation="softmax",
    true_is_padding=False,
    own_count=configured_queries,
    memory_projections=("encoder_attn.k_proj", "encoder_attn.v_proj"),
    sizes=level_sizes,
    watch="input_projection",
)
_SIGMOID = _DETR._replace(activation="sigmoid", memory_projections=_VALUES)
_RT_DETR = _SIGMOID._replace(
    name="RT-DETR",
    arguments={**_CONTENT_AND_MEMORY, **_REFERENCE},
    predict=predict_rt_detr,
    without=("encoder_attention_mask",),  # of its denoising queries; images have none
)
_D_FINE = _RT_DETR._replace(name="D-FINE", predict=predict_d_fine, training_flag=True, memory_projections=())
_LW_DETR = _SIGMOID._replace(
    name="LW-DETR",
    arguments={**_CONTENT_AND_MEMORY, **_REFERENCE, **_PADDING},
    predict=predict_lw_detr,
    unit="box",
    own_queries="first",
    grouped="self_attn",
    memory_projections=("cross_attn.value_proj",),
)

FAMILIES: dict[str, Description] = {
    "detr": _DETR,
    "table-transformer": _DETR._replace(name="Table Transformer"),
    "conditional_detr": _SIGMOID._replace(
        name="Conditional DETR",
        predict=predict_conditional,
        memory_projections=("encoder_attn.k_content_proj", "encoder_attn.k_pos_proj", "encoder_attn.v_proj"),
    ),
    "dab-detr": _SIGMOID._replace(
        name="DAB-DETR",
        arguments={
            **_CONTENT_AND_MEMORY,
            "reference": ("query_position_embeddings",),
            "padding": ("memory_key_padding_mask",),
        },
        predict=predict_dab,
        memory_projections=(
            "cross_attn.cross_attn_key_content_proj",
            "cross_attn.cross_attn_key_pos_proj",
            "cross_attn.cross_attn_value_proj",
        ),
    ),
    "deformable_detr": _SIGMOID._replace(
        name="Deformable DETR",
        arguments={**_CONTENT_AND_MEMORY, **_POSITION, **_REFERENCE, **_PADDING},
        predict=predict_deformable,
        unit="box",
    ),
    "rt_detr": _RT_DETR,
    "rt_detr_v2": _RT_DETR,
    "pp_doclayout_v2": _RT_DETR,
    "pp_doclayout_v3": _RT_DETR,
    "d_fine": _D_FINE,
    "deimv2": _D_FINE,
    "lw_detr": _LW_DETR,
    "rf_detr": _LW_DETR,
}
"""By ``config.model_type``."""
