"""How similar every cell of a feature map is to the good queries, without a tensor of all queries and all cells."""

from __future__ import annotations

from itertools import product
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from detr_kd_losses._blocks import CELLS_MULTIPLIED, FEATURES_MULTIPLIED, FORM_ROWS, in_blocks, slices
from detr_kd_losses._precision import full_precision_matmul, shared_precision
from detr_kd_losses.losses.features.quality import Variant

__all__: list[str] = []

Kind = Literal["directions", "queries", "form"]


class QuerySummary(NamedTuple):
    """What a similarity needs of the queries of each stage and image: K rows to multiply the features with.

    Attributes:
        kind: ``"directions"``: sum_m q_m Q_m, K = 1, because sum_m q_m (Q_m . F) = (sum_m q_m Q_m) . F.
            ``"queries"``: the normalised queries themselves, K = M, where they are fewer than D.
            ``"form"``: A = sum_m q_m Q_m Q_m^T, K = D, because sum_m q_m (Q_m . F)^2 = F^T A F. A is symmetric: these
            are the entries of its upper triangle, those off the diagonal twice, and 0 below.
        rows: (L, B, K, D).
        quality: (L, B, K) for ``"queries"``, else None.
    """

    kind: Kind
    rows: Tensor
    quality: Tensor | None


def summarize_queries(queries: Tensor, quality: Tensor, variant: Variant, *, add_stages: bool = False) -> QuerySummary:
    """Summary of queries (..., B, M, D) and their quality (..., B, M), made once for all levels.

    With `add_stages` only the sum of the similarities over stages matters, so that their forms may be added up before.
    """
    queries, quality = shared_precision(queries, quality)
    queries = queries.reshape(queries.shape[:-3].numel(), *queries.shape[-3:])
    length = torch.linalg.vector_norm(queries, dim=-1)
    quality = quality.reshape(length.shape)
    # A query of no length has no direction; the square of its inverse would overflow.
    inverse = torch.where(length > torch.finfo(length.dtype).tiny ** 0.5, 1 / length, 0.0)
    with full_precision_matmul(queries):
        if variant == "official":
            return QuerySummary("directions", (quality * inverse).unsqueeze(-2) @ queries, None)
        stages, _, num_queries, channels = queries.shape
        if num_queries * (stages if add_stages else 1) < channels:
            return QuerySummary("queries", queries * inverse.unsqueeze(-1), quality)
        weighted = queries * (quality * inverse.square()).unsqueeze(-1)
        parts = []
        for rows in _form_rows(queries):
            part = weighted[..., rows].mT @ queries[..., rows.start :]
            part = part.sum(0, keepdim=True) if add_stages else part
            parts.append(F.pad(part.triu() + part.triu(1), (rows.start, 0)))
    return QuerySummary("form", torch.cat(parts, -2), None)


def similarities(features: Tensor, summary: QuerySummary) -> Tensor:
    """sum_m q_m (Q_m . F), of ``"directions"``, or sum_m q_m (Q_m . F)^2, for the features F of every cell.

    Args:
        features: (B, D, H, W).
        summary: Of the queries Q of L stages, which have length 1.

    Returns:
        (L, B, H*W).
    """
    cells = features.flatten(2)
    dtype = torch.promote_types(summary.rows.dtype, features.dtype)
    rows = summary.rows.to(dtype).transpose(0, 1)
    groups = [] if summary.quality is None else _groups_of_stages(rows, summary.quality.to(dtype).transpose(0, 1))
    maps = []
    with full_precision_matmul(features):
        for part in torch.split(cells, _cells_at_once(cells), -1):
            part = part.to(dtype)  # noqa: PLW2901
            if summary.kind == "directions":
                maps.append(rows.squeeze(-2) @ part)
            elif summary.kind == "form":
                maps.append(_quadratics(rows, part))
            else:
                maps.append(_sums_of_squares(groups, part))
    return torch.cat(maps, -1).transpose(0, 1)


def _quadratics(forms: Tensor, cells: Tensor) -> Tensor:
    """F^T A F (B, L, cells) for the `forms` A (B, L, D, D) and `cells` F (B, D, cells)."""
    totals = cells.new_zeros((*forms.shape[:2], cells.shape[-1]))
    for stage, rows in product(range(forms.shape[1]), _form_rows(cells.mT)):
        products = forms[:, stage, rows, rows.start :] @ cells[:, rows.start :]
        totals[:, stage] += (products * cells[:, rows]).sum(1)
    return totals


def _groups_of_stages(queries: Tensor, quality: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Queries (B, L M, D) and quality (B, L, 1, M) of as many stages as give products no larger than the features."""
    at_once = max(1, queries.shape[-1] // max(1, queries.shape[-2]))
    parts = zip(torch.split(queries, at_once, 1), torch.split(quality, at_once, 1), strict=True)
    return [(some.flatten(1, 2), weights.unsqueeze(-2)) for some, weights in parts]


def _sums_of_squares(groups: list[tuple[Tensor, Tensor]], cells: Tensor) -> Tensor:
    """sum_m q_m (Q_m . F)^2 (B, L, cells) for the queries Q of all groups and `cells` F (B, D, cells)."""
    sums = []
    for queries, quality in groups:
        products = (queries @ cells).reshape(*quality.shape[:2], quality.shape[-1], cells.shape[-1])
        sums.append((quality @ products.mul_(products)).squeeze(-2))
    return torch.cat(sums, 1)


def _cells_at_once(cells: Tensor) -> int:
    """How many of the `cells` (B, D, cells) to multiply at a time."""
    batch, channels, count = cells.shape
    return max(CELLS_MULTIPLIED, FEATURES_MULTIPLIED // max(1, batch * channels)) if in_blocks(cells) else max(1, count)


def _form_rows(queries: Tensor) -> list[slice]:
    """Consecutive rows of a form of `queries` (..., D): each needs only the channels from its first one on."""
    channels = queries.shape[-1]
    return slices(channels, FORM_ROWS if in_blocks(queries) else channels)
