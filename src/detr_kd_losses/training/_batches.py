"""Images of a batch that do not look alike: of other sizes, dtypes or masks, or of another teacher."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__: list[str] = []


def validate_batch(image_ids: Sequence[int | str], images: Sequence[dict[str, Any]]) -> None:
    """Raise for the first image that cannot be in one batch with the first one."""

    def described(image: dict[str, Any], field: str) -> object:
        value = image[field]
        if field == "features":
            return None if value is None else [tuple(level.shape[:-2]) for level in value]
        return (*value.shape[:-2], value.shape[-1]) if isinstance(value, Tensor) else value

    for field, what in (
        ("activation", "a head"),
        ("logits", "layers and channels"),
        ("boxes", "layers and coordinates"),
        ("queries", "layers and channels"),
        ("features", "channels of each level"),
    ):
        first = described(images[0], field)
        for image_id, image in zip(image_ids, images, strict=True):
            if described(image, field) != first:
                msg = (
                    f"the predictions for image {image_id!r} must have the `{field}` ({what}) of image "
                    f"{image_ids[0]!r} {first}, got {described(image, field)}: one teacher must have made both "
                    f"({image['path']})"
                )
                raise ValueError(msg)


QUERY_FIELDS = ("logits", "boxes", "queries")


def select(image: dict[str, Any], index: Tensor) -> None:
    """Keep the queries of an image that `index` names."""
    for name in QUERY_FIELDS:
        image[name] = None if image[name] is None else image[name][..., index, :]


def pad(image: dict[str, Any], number: int, logits: Tensor) -> None:
    """Add queries until the image has so many, with these `logits` (channels,), boxes and outputs of 0."""
    missing = number - image["logits"].shape[-2]
    for name in QUERY_FIELDS if missing else ():
        if image[name] is not None:
            image[name] = F.pad(image[name], (0, 0, 0, missing))
    if missing:
        image["logits"][..., -missing:, :] = logits


def stack(images: Sequence[dict[str, Any]], name: str) -> Tensor:
    """A field (..., M, K) of all images, (..., B, M, K)."""
    return torch.stack(_in_widest([image[name] for image in images]), dim=-3)


def _in_widest(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors in the widest of their dtypes, not that of the first."""
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    return [tensor.to(dtype) for tensor in tensors]


def _largest(level: Sequence[Tensor]) -> tuple[int, int]:
    return max(tensor.shape[-2] for tensor in level), max(tensor.shape[-1] for tensor in level)


def _padded(level: Sequence[Tensor]) -> Tensor:
    """Maps (..., H_i, W_i) of images, stacked at the largest size; 0, or False, to the right and below."""
    height, width = _largest(level)
    return torch.stack([F.pad(one, (0, width - one.shape[-1], 0, height - one.shape[-2])) for one in _in_widest(level)])


def stack_features(images: Sequence[dict[str, Any]]) -> list[Tensor]:
    """Levels (B, D, H, W) of all images, each at its largest size."""
    return [_padded(level) for level in zip(*(image["features"] for image in images), strict=True)]


def stack_masks(images: Sequence[dict[str, Any]]) -> list[Tensor] | None:
    """Masks of all levels, if an image has one or is smaller than another."""
    levels = list(zip(*(image["features"] for image in images), strict=True))
    smaller = any(one.shape[-2:] != _largest(level) for level in levels for one in level)
    if not smaller and all(image["padding_mask"] is None for image in images):
        return None
    masks = []
    for index, level in enumerate(levels):
        given = [None if image["padding_mask"] is None else image["padding_mask"][index] for image in images]
        whole = (one.new_ones(one.shape[-2:], dtype=torch.bool) for one in level)
        masks.append(
            _padded([all_valid if mask is None else mask for mask, all_valid in zip(given, whole, strict=True)])
        )
    return masks
