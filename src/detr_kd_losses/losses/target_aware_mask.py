"""Where good teacher queries look: a weight for each location of a feature map."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from detr_kd_losses._checks import (
    check_choice,
    check_dtype,
    check_floating,
    check_same_device,
    check_same_shape,
    full_precision_matmul,
    shared_precision,
)
from detr_kd_losses._reduction import channel_blocks, squared_length
from detr_kd_losses.losses.query_quality import VARIANTS, Variant

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
    normalize = check_weighting(variant, normalize)
    check_features("features", features)
    check_queries("queries", queries, quality, "features", features)
    check_padding_mask(padding_mask, "features", features)
    summary = summarize_queries(queries, quality, variant)
    weight = weight_maps(features, summary, queries.shape[-2], padding_mask, variant=variant, normalize=normalize)
    return weight.reshape(*queries.shape[:-3], *weight.shape[1:])


class QuerySummary(NamedTuple):
    """What a weight map needs of the queries of each stage and image: K rows to multiply the features with.

    Attributes:
        rows: (L, B, K, D). ``"official"``: sum_m q_m Q_m, K = 1, because sum_m q_m (Q_m . f) = (sum_m q_m Q_m) . f.
            ``"paper"``: the normalised queries where they are fewer than D, K = M; else the form
            A = sum_m q_m Q_m Q_m^T, K = D, because sum_m q_m (Q_m . f)^2 = f^T A f.
        quality: (L, B, K) where the rows are queries, else None.
    """

    rows: Tensor
    quality: Tensor | None


def summarize_queries(queries: Tensor, quality: Tensor, variant: Variant, *, add_stages: bool = False) -> QuerySummary:
    """Summary of queries (..., B, M, D) and their quality (..., B, M), made once for all levels.

    With `add_stages` only the sum of the maps over stages matters, so that their forms may be added up before.
    """
    queries, quality = shared_precision(queries, quality)
    queries = queries.reshape(queries.shape[:-3].numel(), *queries.shape[-3:])
    length = torch.linalg.vector_norm(queries, dim=-1)
    quality = quality.reshape(length.shape)
    # A query of no length has no direction; the square of its inverse would overflow.
    inverse = torch.where(length > torch.finfo(length.dtype).tiny ** 0.5, 1 / length, 0.0)
    with full_precision_matmul(queries):
        if variant == "official":
            return QuerySummary((quality * inverse).unsqueeze(-2) @ queries, None)
        stages, _, num_queries, channels = queries.shape
        if num_queries * (stages if add_stages else 1) < channels:
            return QuerySummary(queries * inverse.unsqueeze(-1), quality)
        forms = queries.mT @ (queries * (quality * inverse.square()).unsqueeze(-1))
    return QuerySummary(forms.sum(0, keepdim=True) if add_stages else forms, None)


def weight_maps(
    features: Tensor,
    summary: QuerySummary,
    num_queries: int,
    padding_mask: Tensor | None,
    *,
    variant: Variant,
    normalize: Normalize,
) -> Tensor:
    """The mask (L, B, H, W) of each stage; no temporary is larger than the feature map."""
    features, rows = shared_precision(features, summary.rows)
    cells = features.flatten(2)  # (B, D, H*W)
    tiny = torch.finfo(features.dtype).tiny
    with full_precision_matmul(features):
        if variant == "official":
            products, square = _products_and_squared_length(rows.squeeze(-2).transpose(0, 1), cells)
            weight = products.transpose(0, 1).div_(square.sqrt().clamp(min=tiny)).clamp_(min=_OFFICIAL_FLOOR)
        else:
            length = squared_length(cells).sqrt().clamp(min=tiny)
            weight = _squared_similarities(rows, summary.quality, cells).div_(length).div_(length)
    valid = None if padding_mask is None else padding_mask.flatten(1)
    if valid is not None:
        weight = torch.where(valid, weight, 0.0)
    weight = weight.div_(_normalizer(weight, valid, normalize, num_queries))
    maps: Tensor = weight.reshape(*weight.shape[:-1], *features.shape[-2:])
    return maps


def _products_and_squared_length(rows: Tensor, cells: Tensor) -> tuple[Tensor, Tensor]:
    """Products (B, L, H*W) of `rows` (B, L, D) and cells, and the cells' squared length (B, H*W), in one pass."""
    square = cells[:, :0].sum(1)
    products = rows[..., :0] @ cells[:, :0]
    for block in channel_blocks(cells):
        part = cells[:, block]
        square.add_(part.square().sum(1))
        products.add_(rows[..., block] @ part)
    return products, square


def _squared_similarities(rows: Tensor, quality: Tensor | None, cells: Tensor) -> Tensor:
    """sum_m q_m (Q_m . F)^2 for the features F of all cells (B, D, H*W): (L, B, H*W)."""
    stages, batch, size, channels = rows.shape
    rows = rows.transpose(0, 1)
    quality = None if quality is None else quality.to(rows.dtype).transpose(0, 1).unsqueeze(-2)
    at_once = max(1, channels // max(1, size))
    maps = [cells.new_zeros((batch, 0, cells.shape[-1]))]
    for first in range(0, stages, at_once):
        part = rows[:, first : first + at_once]
        products = (part.flatten(1, 2) @ cells).reshape(batch, part.shape[1], size, cells.shape[-1])
        if quality is None:
            maps.append((products * cells.unsqueeze(1)).sum(2))
        else:
            maps.append((quality[:, first : first + at_once] @ products.square()).squeeze(-2))
    return torch.cat(maps, dim=1).transpose(0, 1)


def _normalizer(weight: Tensor, valid: Tensor | None, normalize: Normalize, num_queries: int) -> Tensor | float:
    """What a weight map (..., B, cells) is divided by; never 0."""
    if normalize == "queries":
        return max(num_queries, 1)
    tiny = torch.finfo(weight.dtype).tiny
    if weight.shape[-1] == 0:
        return 1.0
    if normalize == "max":
        return weight.amax(-1, keepdim=True).clamp(min=tiny)
    cells = weight.shape[-1] if valid is None else valid.sum(-1, keepdim=True).clamp(min=1)
    return (weight.sum(-1, keepdim=True) / cells).clamp(min=tiny)


def check_features(name: str, features: Tensor) -> None:
    """Raise unless `features` are floating and of shape (B, D, H, W)."""
    check_floating(name, features)
    if features.ndim != 4:
        msg = f"`{name}` must have shape (B, D, H, W), got {tuple(features.shape)}"
        raise ValueError(msg)


def check_weighting(variant: Variant, normalize: Normalize | None) -> Normalize:
    """The normalisation that is meant, after checking both options."""
    check_choice("variant", variant, VARIANTS)
    if normalize is None:
        return _DEFAULT_NORMALIZE[variant]
    check_choice("normalize", normalize, NORMALIZATIONS)
    return normalize


def check_queries(name: str, queries: Tensor, quality: Tensor, features_name: str, features: Tensor) -> None:
    """Raise unless `queries` (..., B, M, D) and `quality` (..., B, M) fit the features."""
    check_floating(name, queries)
    check_floating("quality", quality)
    if queries.ndim < 3 or queries.shape[-1] != features.shape[1] or queries.shape[-3] != features.shape[0]:
        msg = (
            f"`{name}` must have shape (B, M, D) or (L, B, M, D) with B and D of `{features_name}` "
            f"{tuple(features.shape)}, got {tuple(queries.shape)}"
        )
        raise ValueError(msg)
    check_same_shape("quality", quality.shape, name, queries.shape[:-1], "(..., B, M)")
    check_same_device(features_name, features, **{name: queries, "quality": quality})


def check_padding_mask(padding_mask: Tensor | None, features_name: str, features: Tensor) -> None:
    """Raise unless `padding_mask` is None or bool (B, H, W) and fits the features."""
    if padding_mask is not None:
        check_dtype("padding_mask", padding_mask, torch.bool)
        shape = (features.shape[0], *features.shape[-2:])
        check_same_shape("padding_mask", padding_mask.shape, features_name, shape, "(B, H, W)")
        check_same_device(features_name, features, padding_mask=padding_mask)
