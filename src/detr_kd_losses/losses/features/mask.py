"""Where good teacher queries look: a weight for each location of a feature map."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from detr_kd_losses._precision import full_precision
from detr_kd_losses._validation import (
    validate_choice,
    validate_dtype,
    validate_floating,
    validate_same_device,
    validate_same_shape,
)
from detr_kd_losses.losses.features._similarity import similarities, summarize_queries
from detr_kd_losses.losses.features.quality import VARIANTS, Variant
from detr_kd_losses.pairs import validated_mask

__all__ = ["Normalize", "target_aware_mask"]

Normalize = Literal["queries", "max", "mean"]

NORMALIZATIONS = ("queries", "max", "mean")
_DEFAULT_NORMALIZE: dict[Variant, Normalize] = {"paper": "queries", "official": "max"}
_OFFICIAL_FLOOR = 0.01


@torch.no_grad()
def target_aware_mask(
    features: Tensor,
    queries: Tensor,
    quality: Tensor,
    *,
    variant: Variant = "paper",
    normalize: Normalize | None = None,
    padding_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
) -> Tensor:
    r"""Where the good queries of the teacher look: a weight for each location of a feature map.

    With :math:`ψ_m(p) = \cos(Q_m, F(p))`: ``"paper"``, :math:`w(p) = \sum_m q_m ψ_m(p)^2`; ``"official"``,
    :math:`s(p) = \max(\sum_m q_m ψ_m(p), 0.01)`, whose square weighs the loss. No temporary is larger than the feature
    map: `s` is one dot product, `w` one D × D quadratic form of the normalised feature, or M products where M < D.

    Args:
        features: (B, D, H, W), the teacher's.
        queries: (..., B, M, D), the teacher's decoder outputs; leading dimensions are stages.
        quality: (..., B, M), from :func:`query_quality`.
        variant: ``"paper"`` or ``"official"``.
        normalize: What the map is divided by: ``"queries"``, their number M; ``"max"`` or ``"mean"`` of the map over
            the valid cells of the image. None: ``"queries"`` for ``"paper"``, ``"max"`` for ``"official"``.
        padding_mask: (B, H, W) bool, True = a valid cell; the mask is 0 elsewhere. None: all valid.
        query_mask: (B, M) bool, True = a query, False = padding, which has no part. None: all are queries.

    Returns:
        (..., B, H, W). Has no gradient.

    Raises:
        ValueError: If shapes, devices or options do not fit.
        TypeError: If a dtype does not fit.

    Examples:
        >>> features = torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]]])  # one image, D = 2, 1 x 2 cells
        >>> queries, quality = torch.tensor([[[3.0, 0.0]]]), torch.ones(1, 1)
        >>> target_aware_mask(features, queries, quality).tolist()
        [[[1.0, 0.0]]]

    References:
        Chang et al., "DETRDistill", ICCV 2023, arXiv:2211.10156, Eq. 7 and 9.
    """
    normalize = resolve_normalize(variant, normalize)
    validate_features("features", features)
    validate_queries("queries", queries, quality, "features", features)
    validate_padding_mask(padding_mask, "features", features)
    queries, quality, number = without_padding("queries", queries, quality, query_mask)
    tiny = torch.finfo(torch.float32).tiny
    weight = weight_maps(
        similarities(features, summarize_queries(queries, quality, variant)),
        1 / torch.linalg.vector_norm(full_precision(features).flatten(2), dim=1).clamp(min=tiny),
        number,
        None if padding_mask is None else padding_mask.flatten(1),
        variant=variant,
        normalize=normalize,
    )
    return weight.reshape(*queries.shape[:-2], *features.shape[2:])


def weight_maps(
    similarity: Tensor,
    inverse_length: Tensor,
    num_queries: int | Tensor,
    valid: Tensor | None,
    *,
    variant: Variant,
    normalize: Normalize,
) -> Tensor:
    """The mask (L, B, H*W) of each stage, from similarities that still have the length of the features in them.

    Args:
        similarity: (L, B, H*W), see :func:`similarities`.
        inverse_length: (B, H*W), 1 / length of the features; any finite number where they are 0.
        num_queries: M, or that of each image (B, 1).
        valid: (B, H*W) bool, or None.
        variant: ``"paper"`` or ``"official"`` (:func:`target_aware_mask`).
        normalize: What the map is divided by (:func:`target_aware_mask`).
    """
    weight = similarity * inverse_length
    weight = weight.clamp(min=_OFFICIAL_FLOOR) if variant == "official" else weight.mul_(inverse_length)
    if valid is not None:
        weight = weight.where(valid, 0.0)
    return weight.div_(_normalizer(weight, valid, normalize, num_queries))


def _normalizer(
    weight: Tensor, valid: Tensor | None, normalize: Normalize, num_queries: int | Tensor
) -> Tensor | float:
    """What a weight map (..., B, cells) is divided by; never 0."""
    if normalize == "queries":
        return num_queries.clamp(min=1) if isinstance(num_queries, Tensor) else max(num_queries, 1)
    tiny = torch.finfo(weight.dtype).tiny
    if weight.shape[-1] == 0:
        return 1.0
    if normalize == "max":
        return weight.amax(-1, keepdim=True).clamp(min=tiny)
    cells = weight.shape[-1] if valid is None else valid.sum(-1, keepdim=True).clamp(min=1)
    return (weight.sum(-1, keepdim=True) / cells).clamp(min=tiny)


def without_padding(
    name: str, queries: Tensor, quality: Tensor, query_mask: Tensor | None
) -> tuple[Tensor, Tensor, int | Tensor]:
    """Queries (..., B, M, D) and quality (..., B, M) with zeros in the padding, and the number of queries."""
    if query_mask is None:
        return queries, quality, queries.shape[-2]
    mask = validated_mask("query_mask", query_mask, name, queries)
    number = query_mask.sum(-1, keepdim=True)
    return queries.where(mask.unsqueeze(-1), 0.0), quality.where(mask, 0.0), number


def validate_features(name: str, features: Tensor) -> None:
    """Raise unless `features` are floating and of shape (B, D, H, W)."""
    validate_floating(name, features)
    if features.ndim != 4:
        msg = f"`{name}` must have shape (B, D, H, W), got {tuple(features.shape)}"
        raise ValueError(msg)


def resolve_normalize(variant: Variant, normalize: Normalize | None) -> Normalize:
    """The normalisation that is meant, after checking both options."""
    validate_choice("variant", variant, VARIANTS)
    if normalize is None:
        return _DEFAULT_NORMALIZE[variant]
    validate_choice("normalize", normalize, NORMALIZATIONS)
    return normalize


def validate_queries(name: str, queries: Tensor, quality: Tensor, features_name: str, features: Tensor) -> None:
    """Raise unless `queries` (..., B, M, D) and `quality` (..., B, M) fit the features."""
    validate_floating(name, queries)
    validate_floating("quality", quality)
    if queries.ndim < 3 or queries.shape[-1] != features.shape[1] or queries.shape[-3] != features.shape[0]:
        msg = (
            f"`{name}` must have shape (B, M, D) or (L, B, M, D) with B and D of `{features_name}` "
            f"{tuple(features.shape)}, got {tuple(queries.shape)}"
        )
        raise ValueError(msg)
    validate_same_shape("quality", quality.shape, name, queries.shape[:-1], "(..., B, M)")
    validate_same_device(features_name, features, **{name: queries, "quality": quality})


def validate_padding_mask(padding_mask: Tensor | None, features_name: str, features: Tensor) -> None:
    """Raise unless `padding_mask` is None or bool (B, H, W) and fits the features."""
    if padding_mask is not None:
        validate_dtype("padding_mask", padding_mask, torch.bool)
        shape = (features.shape[0], *features.shape[-2:])
        validate_same_shape("padding_mask", padding_mask.shape, features_name, shape, "(B, H, W)")
        validate_same_device(features_name, features, padding_mask=padding_mask)
