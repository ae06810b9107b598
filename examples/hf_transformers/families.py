"""What differs between the DETR families of transformers: the arguments that are queries, the heads, the projections.

Each `predict_*` function turns one call of a decoder into the predictions of all its layers, with the model's own
heads. The outputs of transformers are no substitute: most hold the last layer only, and `auxiliary_loss=True` in the
configuration, which would add the others, changes the forward pass of DETR and Conditional DETR.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

import detr_kd_losses as dkl


class DecoderCall(NamedTuple):
    """One call of a decoder: its keyword arguments, its output, and the raw output of each of its layers.

    With them what a second call with other queries may take from it: the output of `memory_projections`.
    """

    arguments: dict[str, Any]
    output: Any
    layer_outputs: list[Tensor]
    projections: dict[nn.Module, Tensor]


class Predictions(NamedTuple):
    """Logits (L, B, N, C), boxes (L, B, N, 4) and decoder outputs (L, B, N, D) of all layers."""

    logits: Tensor
    boxes: Tensor
    queries: Tensor


class Family(NamedTuple):
    """How to read the decoder of a family.

    Attributes:
        predict: From the model and a call of its decoder to predictions.
        query_arguments: The arguments of the decoder, each (B, N, ...), that make up its queries.
        activation: Kind of the class head, as `detr_kd_losses` calls it.
        mask_argument: The argument that says which cells of the image are valid, if there is one.
        own_queries: Where the model's own queries are while it trains: before the copies of group DETR ("first"),
            after the denoising queries ("last").
        predicts_in_training: Whether the decoder predicts after every layer only where its own `training` flag is
            set, which it uses for nothing else.
        memory_projections: Submodules of a decoder layer that see the encoder's memory or its positions and no queries,
            so that they answer other queries the same. None in D-FINE and DEIMv2, which sample the memory as it is.
    """

    predict: Callable[[nn.Module, DecoderCall], Predictions]
    query_arguments: tuple[str, ...]
    activation: Literal["sigmoid", "softmax"] = "sigmoid"
    mask_argument: str | None = "encoder_attention_mask"
    own_queries: Literal["first", "last"] = "first"
    predicts_in_training: bool = False
    memory_projections: tuple[str, ...] = ()


def predict_detr(model: nn.Module, call: DecoderCall) -> Predictions:
    """DETR: the same heads after every layer, on its normalised output."""
    queries = _normalised_layers(model, call)
    return Predictions(model.class_labels_classifier(queries), model.bbox_predictor(queries).sigmoid(), queries)


def predict_conditional(model: nn.Module, call: DecoderCall) -> Predictions:
    """Conditional DETR: as DETR, with centres relative to a reference point."""
    queries = _normalised_layers(model, call)
    centre = _logit(call.output.reference_points).transpose(0, 1)  # (N, B, 2) -> (B, N, 2)
    boxes = _move(model.bbox_predictor(queries), centre).sigmoid()
    return Predictions(model.class_labels_classifier(queries), boxes, queries)


def predict_dab(model: nn.Module, call: DecoderCall) -> Predictions:
    """DAB-DETR: the same heads after every layer, boxes relative to the anchors of the layer."""
    queries = call.output.intermediate_hidden_states
    boxes = (model.bbox_predictor(queries) + _logit(call.output.reference_points)).sigmoid()
    return Predictions(model.class_embed(queries), boxes, queries)


def predict_deformable(model: nn.Module, call: DecoderCall) -> Predictions:
    """Deformable DETR: one head a layer, relative to the reference that the layer before has left."""
    queries = call.output.intermediate_hidden_states.transpose(0, 1)
    refined = call.output.intermediate_reference_points.transpose(0, 1)
    references = [call.arguments["reference_points"], *refined[:-1]]
    # Not strict: in two stages there is a head more, that of the encoder.
    logits = [head(query) for head, query in zip(model.class_embed, queries, strict=False)]
    boxes = [
        _move(head(query), _logit(reference)).sigmoid()
        for head, query, reference in zip(model.bbox_embed, queries, references, strict=False)
    ]
    return Predictions(torch.stack(logits), torch.stack(boxes), queries)


def predict_rt_detr(_: nn.Module, call: DecoderCall) -> Predictions:
    """RT-DETR: the decoder has run its heads itself; what it calls reference points are the boxes."""
    logits, boxes, queries = (
        call.output.intermediate_logits,
        call.output.intermediate_reference_points,
        call.output.intermediate_hidden_states,
    )
    return Predictions(logits.transpose(0, 1), boxes.transpose(0, 1), queries.transpose(0, 1))


def predict_d_fine(_: nn.Module, call: DecoderCall) -> Predictions:
    """D-FINE: as RT-DETR, after one entry more, that of the head before the first refinement; queries layer first."""
    queries = call.output.intermediate_hidden_states
    logits = call.output.intermediate_logits.transpose(0, 1)
    boxes = call.output.intermediate_reference_points.transpose(0, 1)
    return Predictions(logits[-len(queries) :], boxes[-len(queries) :], queries)


def box_distributions(model: nn.Module, call: DecoderCall, own: slice) -> dkl.BoxDistributions | None:
    """What D-FINE and DEIMv2 say about the edges of the model's `own` queries; None of other families."""
    corners = getattr(call.output, "intermediate_predicted_corners", None)
    if corners is None:
        return None
    decoder = model.model.decoder
    weighting = sys.modules[type(decoder).__module__].weighting_function
    bins = weighting(decoder.max_num_bins, decoder.up, decoder.reg_scale)
    logits, references = (
        tensor.transpose(0, 1)[:, :, own] for tensor in (corners, call.output.initial_reference_points)
    )
    return dkl.BoxDistributions(logits, references, bins, decoder.reg_scale.abs())


def predict_lw_detr(model: nn.Module, call: DecoderCall) -> Predictions:
    """LW-DETR: the same heads after every layer, boxes as shifts and log-scales of one reference box."""
    queries = call.output.intermediate_hidden_states
    reference = call.output.intermediate_reference_points[-1]
    shift, scale = model.bbox_embed(queries).split(2, dim=-1)
    centre, size = reference.split(2, dim=-1)
    boxes = torch.cat([shift * size + centre, scale.exp() * size], -1)
    return Predictions(model.class_embed(queries), boxes, queries)


def _normalised_layers(model: nn.Module, call: DecoderCall) -> Tensor:
    """Outputs of all layers after the decoder's normalisation (L, B, N, D); it has treated the last one itself."""
    normalise = model.model.decoder.layernorm
    earlier = [normalise(layer) for layer in call.layer_outputs[:-1]]
    return torch.stack([*earlier, call.output.last_hidden_state])


def _logit(coordinates: Tensor) -> Tensor:
    """Logit, clamped exactly as in transformers."""
    coordinates = coordinates.clamp(0, 1)
    return (coordinates.clamp(min=1e-5) / (1 - coordinates).clamp(min=1e-5)).log()


def _move(offsets: Tensor, reference: Tensor) -> Tensor:
    """Offsets (..., 4) plus a reference (..., 4), or plus a reference point (..., 2) for the centre alone."""
    channels = reference.shape[-1]
    return torch.cat([offsets[..., :channels] + reference, offsets[..., channels:]], -1)


_DETR = ("inputs_embeds", "object_queries_position_embeddings")
_ANCHORED = ("inputs_embeds", "reference_points")
_VALUES = ("encoder_attn.value_proj",)
# RT-DETR and its heirs pass the mask of their denoising queries as `encoder_attention_mask`; images have none.
_RT_DETR = Family(predict_rt_detr, _ANCHORED, mask_argument=None, own_queries="last", memory_projections=_VALUES)
_D_FINE = _RT_DETR._replace(predict=predict_d_fine, predicts_in_training=True, memory_projections=())
_LW_DETR = Family(predict_lw_detr, _ANCHORED, memory_projections=("cross_attn.value_proj",))

FAMILIES: dict[str, Family] = {
    "detr": Family(
        predict_detr,
        _DETR,
        activation="softmax",
        memory_projections=("encoder_attn.k_proj", "encoder_attn.v_proj"),
    ),
    "conditional_detr": Family(
        predict_conditional,
        _DETR,
        memory_projections=("encoder_attn.k_content_proj", "encoder_attn.k_pos_proj", "encoder_attn.v_proj"),
    ),
    "dab-detr": Family(
        predict_dab,
        ("inputs_embeds", "query_position_embeddings"),
        mask_argument="memory_key_padding_mask",
        memory_projections=(
            "cross_attn.cross_attn_key_content_proj",
            "cross_attn.cross_attn_key_pos_proj",
            "cross_attn.cross_attn_value_proj",
        ),
    ),
    "deformable_detr": Family(predict_deformable, (*_DETR, "reference_points"), memory_projections=_VALUES),
    "rt_detr": _RT_DETR,
    "rt_detr_v2": _RT_DETR,
    "d_fine": _D_FINE,
    "deimv2": _D_FINE,
    "lw_detr": _LW_DETR,
    "rf_detr": _LW_DETR,
}


def family_of(model: nn.Module) -> Family:
    """Return the family of a `...ForObjectDetection` model.

    Raises:
        TypeError: If the model is of none that has a decoder of queries.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in FAMILIES or not hasattr(getattr(model, "model", None), "decoder"):
        msg = (
            f"`model` must be a ...ForObjectDetection model of transformers of the types {', '.join(FAMILIES)}, "
            f"got {type(model).__name__} of type {model_type!r}; for another, add a Family to families.py"
        )
        raise TypeError(msg)
    return FAMILIES[model_type]
