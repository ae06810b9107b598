"""What is kept of a teacher's outputs for one image, and whether it belongs together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from detr_kd_losses._validation import (
    validate_choice,
    validate_count,
    validate_predictions,
    validate_record,
    validate_same_shape,
    validate_type,
)
from detr_kd_losses.heads import ACTIVATIONS, Activation
from detr_kd_losses.outputs import DetectorOutput
from detr_kd_losses.training.geometry import Geometry
from detr_kd_losses.weights import confidence_weight

__all__: list[str] = []

# What no file has: whoever wants it of a teacher on disk must hear so when it is saved, not when it is missed.
NOT_KEPT = ("group", "group_index", "query_mask", "distributions", "masks")
FIELDS = ("geometry", "activation", "logits", "boxes", "queries", "features", "padding_mask")


@dataclass(frozen=True)
class Kept:
    """What is kept of the outputs: the options of :func:`save_predictions`."""

    features: bool = False
    dtype: torch.dtype | None = None
    activation: Activation | None = None
    layers: Sequence[int] | None = None
    topk: int | None = None
    queries: bool = True

    def __post_init__(self) -> None:
        """Validate the options by themselves."""
        if self.activation is not None:
            validate_choice("activation", self.activation, ACTIVATIONS)
        if self.dtype is not None and not self.dtype.is_floating_point:
            msg = f"`dtype` must be floating, got {self.dtype}"
            raise TypeError(msg)
        if self.topk is not None:
            validate_count("topk", self.topk)
            if self.activation is None:
                msg = "`activation` must be given where `topk` is, for it says which queries are the best, got None"
                raise ValueError(msg)
        if self.layers is not None:
            validate_type("layers", self.layers, Sequence, "a sequence of layers, such as [-1]")
            for layer in self.layers:
                validate_type("layers", layer, int, "whole numbers")

    def contents(self, output: DetectorOutput, views: Sequence[Geometry]) -> list[dict[str, Any]]:
        """The content of the file of each image."""
        self._validate(output)
        logits, boxes, queries = output.logits, output.boxes, output.queries if self.queries else None
        best = None
        if self.topk is not None and self.topk < logits.shape[-2]:
            last = logits if logits.ndim == 3 else logits[-1]
            confidence = confidence_weight(last.detach(), activation=self.activation or "sigmoid")
            best = confidence.topk(int(self.topk)).indices
        levels = as_levels(output.features) if self.features else None
        masks = as_levels(output.padding_mask) if self.features else None
        return [
            {
                "geometry": tuple(view),
                "activation": self.activation,
                "logits": self._of_image(logits, index, best, self.dtype),
                "boxes": self._of_image(boxes, index, best, None),
                "queries": None if queries is None else self._of_image(queries, index, best, self.dtype),
                "features": None if levels is None else [_stored(level[index], self.dtype) for level in levels],
                "padding_mask": None if masks is None else [_stored(mask[index], None) for mask in masks],
            }
            for index, view in enumerate(views)
        ]

    def _of_image(self, tensor: Tensor, index: int, best: Tensor | None, dtype: torch.dtype | None) -> Tensor:
        """(..., M, K) of one image of (..., B, M, K), its layers and queries that are kept."""
        own = tensor[..., index, :, :]
        if self.layers is not None and own.ndim > 2:
            own = own[list(self.layers)]
        return _stored(own if best is None else own[..., best[index], :], dtype)

    def _validate(self, output: DetectorOutput) -> None:
        validate_record("output", output, DetectorOutput, "DetectorOutput(logits, boxes)")
        validate_predictions("output.", output.logits, output.boxes)
        for name in NOT_KEPT:
            if getattr(output, name) is not None:
                msg = f"`output.{name}` must be None, for it is not saved: output._replace({name}=None), got {output!r}"
                raise ValueError(msg)
        number = output.logits.shape[-3]
        depth = len(output.logits) if output.logits.ndim > 3 else 1
        if self.layers is not None and (not self.layers or any(not -depth <= one < depth for one in self.layers)):
            msg = f"`layers` must be in [{-depth}, {depth}), at least one, got {list(self.layers)}"
            raise ValueError(msg)
        if self.queries and output.queries is not None:
            whole = self.layers is None and output.queries.ndim == output.logits.ndim
            own, other = (x.shape[-3 if whole else 0 : -1] for x in (output.queries, output.logits))
            validate_same_shape("output.queries", own, "output.logits", other, "(B, M)" if whole else "(L, B, M)")
        if self.features and output.features is None:
            msg = "`output` must have features to save them, got None"
            raise ValueError(msg)
        for name in ("features", "padding_mask") if self.features else ():
            for level in as_levels(getattr(output, name)) or []:
                validate_same_shape(f"output.{name}", level.shape[:1], "output.logits", (number,), "(B,)")
        if self.features and output.padding_mask is not None:
            sizes = [
                [tuple(level.shape[-2:]) for level in as_levels(field) or []]
                for field in (output.features, output.padding_mask)
            ]
            if sizes[0] != sizes[1]:
                msg = f"`output.padding_mask` must have the sizes of `output.features` {sizes[0]}, got {sizes[1]}"
                raise ValueError(msg)


def views_of(geometries: Sequence[Geometry] | None, names: Sequence[str], output: DetectorOutput) -> list[Geometry]:
    """One view for each image; raise unless there are as many of all."""
    validate_record("output", output, DetectorOutput, "DetectorOutput(logits, boxes)")
    validate_predictions("output.", output.logits, output.boxes)
    views = [Geometry()] * len(names) if geometries is None else list(geometries)
    number = output.logits.shape[-3] if output.logits.ndim > 2 else 0
    if not number == len(names) == len(views):
        msg = (
            "`image_ids` and `geometries` must have one entry for each of the "
            f"{number} images of `output`, got {len(names)} and {len(views)}"
        )
        raise ValueError(msg)
    return views


def what_is_wrong(content: dict[str, Any]) -> str | None:
    """Why the tensors of a file do not belong together; None: they do."""
    logits, boxes, queries = (content[name] for name in ("logits", "boxes", "queries"))
    levels, masks, geometry = (content[name] for name in ("features", "padding_mask", "geometry"))
    tensors = [logits, boxes, *([] if queries is None else [queries]), *(levels or []), *(masks or [])]
    if not all(isinstance(tensor, Tensor) and tensor.ndim >= 2 for tensor in tensors):
        return "what should be a tensor is none"
    if boxes.shape != (*logits.shape[:-1], 4) or not (queries is None or queries.shape[-2] == logits.shape[-2]):
        return f"`logits` {tuple(logits.shape)} and `boxes` {tuple(boxes.shape)} or `queries` have different sizes"
    if masks is not None:
        pairs = list(zip(levels or [], masks, strict=False))
        fits = all(level.shape[-2:] == mask.shape and mask.dtype == torch.bool for level, mask in pairs)
        if not fits or len(pairs) != len(masks) or len(masks) != len(levels or []):
            return "`padding_mask` has not the sizes of `features`, or is not bool"
    if len(geometry) != 4 or not all(abs(number) < float("inf") for number in geometry) or 0 in geometry[:2]:
        return f"`geometry` {geometry} is none"
    return None


def as_levels(levels: Tensor | Sequence[Tensor] | None) -> list[Tensor] | None:
    """A map, or those of all levels, as a list."""
    if levels is None:
        return None
    return [levels] if isinstance(levels, Tensor) else list(levels)


def _stored(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A copy of its own, so that no file holds the batch; what is finite stays finite."""
    tensor = tensor.detach()
    if dtype is not None and tensor.is_floating_point():
        limit = torch.finfo(dtype).max
        tensor = tensor.clamp(-limit, limit).where(tensor.isfinite(), tensor)
    return tensor.to(device="cpu", dtype=dtype, copy=True).contiguous()
