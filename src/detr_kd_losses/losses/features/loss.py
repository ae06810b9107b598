"""Target-aware feature distillation: features weighted by their similarity to good teacher queries."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from detr_kd_losses._options import OptionModule, Rules, boolean, one_of, validate_options
from detr_kd_losses._reduction import replica_means
from detr_kd_losses.losses.features._passes import Comparison, compare
from detr_kd_losses.losses.features._similarity import summarize_queries
from detr_kd_losses.losses.features.levels import pair_levels
from detr_kd_losses.losses.features.mask import (
    NORMALIZATIONS,
    Normalize,
    resolve_normalize,
    validate_queries,
    weight_maps,
    without_padding,
)
from detr_kd_losses.losses.features.projection import FeatureProjection, Levels
from detr_kd_losses.losses.features.quality import VARIANTS, Variant

__all__ = ["TargetAwareFeatureLoss", "target_aware_feature_loss"]

RULES: Rules = {
    "variant": one_of(*VARIANTS),
    "normalize": one_of(None, *NORMALIZATIONS),
    "relative": boolean,
    "sync_normalizer": boolean,
}


def target_aware_feature_loss(
    student_features: Levels,
    teacher_features: Levels,
    teacher_queries: Tensor,
    quality: Tensor,
    *,
    variant: Variant = "paper",
    normalize: Normalize | None = None,
    relative: bool = False,
    padding_mask: Levels | None = None,
    query_mask: Tensor | None = None,
    sync_normalizer: bool = True,
) -> Tensor:
    r"""Distil features where the good queries of the teacher look.

    .. math::
        L = \frac{1}{M D H W} \sum_m q_m \| ψ_m ⊙ (F_T - F_S) \|^2
          = \frac{1}{D H W} \sum_p w(p) \| F_T(p) - F_S(p) \|^2

    with `w` the :func:`target_aware_mask` of the ``"paper"`` variant, or the square of that of the ``"official"`` one;
    a mean over the valid cells of the batch and over D, summed over stages and levels. No gradient reaches the
    teacher. Half-precision inputs are computed in float32.

    The paper's 1 / M makes its form small, and smaller with more queries; with ``normalize="mean"`` or ``"max"`` it
    is of the order of a plain mean squared error, for each stage and level. With `relative` it is

    .. math::
        L = \log_2 \left( 1 +
            \frac{\sum_{l, p} w_l(p) \| F_T(p) - F_S(p) \|^2}{\sum_{l, p} w_l(p) \| F_T(p) \|^2} \right)

    over stages `l` and the valid cells `p` of an image, a mean over images and levels: 1 for a student whose features
    are 0, and the same for any scale of the features and any number of stages and levels. The logarithm keeps a student
    whose features are far larger than the teacher's from drowning all else. Their squares must be numbers of float32:
    features of a size beyond 1e18 give infinity or NaN, below 1e-18 one that is not exact, or 0.

    Args:
        student_features: (B, D, H, W), or a sequence of levels. For other channels or sizes than the teacher's see
            :class:`TargetAwareFeatureLoss`.
        teacher_features: (B, D, H, W), or as many levels, each of the shape of the student's.
        teacher_queries: (B, M, D) or (L, B, M, D), the teacher's decoder outputs.
        quality: (B, M) or (L, B, M), from :func:`query_quality`.
        variant: ``"paper"`` or ``"official"``.
        normalize: See :func:`target_aware_mask`.
        relative: Whether the error is measured by what it is for features of 0, instead of by the number of cells and
            channels. 0 where the teacher has no features of weight.
        padding_mask: (B, H, W) bool, True = a valid cell, or one per level. None: all valid.
        query_mask: (B, M) bool, True = a query, False = padding, which has no part. None: all are queries.
        sync_normalizer: Whether the number of valid cells, or of images, is averaged over replicas when
            torch.distributed is initialised and gradients are enabled.

    Returns:
        A scalar.

    Raises:
        ValueError: If shapes, devices or options do not fit, or the numbers of levels differ.
        TypeError: If a dtype does not fit.

    Examples:
        >>> teacher, queries, quality = torch.randn(2, 8, 5, 4), torch.randn(2, 10, 8), torch.rand(2, 10)
        >>> student = (teacher + 1).requires_grad_()
        >>> target_aware_feature_loss(student, teacher, queries, quality).backward()
        >>> target_aware_feature_loss(teacher, teacher, queries, quality).item()
        0.0

    References:
        Chang et al., "DETRDistill", ICCV 2023, arXiv:2211.10156, Eq. 6-9.
    """
    normalize = resolve_normalize(variant, normalize)
    validate_options(RULES, sync_normalizer=sync_normalizer)
    levels = pair_levels(student_features, teacher_features, padding_mask=padding_mask)
    for level in levels:
        validate_queries("teacher_queries", teacher_queries, quality, "teacher_features", level.teacher)
    said = teacher_queries.detach(), quality.detach()
    queries, quality, number = without_padding("teacher_queries", *said, query_mask)
    # A map that is divided by M alone is a sum over queries, and its sum over stages is one over all their queries.
    summary = summarize_queries(queries, quality, variant, add_stages=normalize == "queries")
    errors, counts = [], []
    for student, teacher, _, valid in levels:
        seen = compare(student, teacher, valid, summary)
        cells = None if valid is None else valid.flatten(1)
        weight = _loss_weight(seen, number, cells, variant=variant, normalize=normalize)
        error = seen.distance * weight
        errors.append((_relative(error, seen, weight, cells) if relative else error).sum())
        count = weight.shape[0] if relative else weight.numel()
        counts.append(weight.new_full((), count) if relative or cells is None else cells.sum().to(weight.dtype))
    means = replica_means(*counts, sync=sync_normalizer)
    if relative:
        return torch.stack([error / count for error, count in zip(errors, means, strict=True)]).mean()
    channels = [max(level.student.shape[1], 1) for level in levels]
    each = zip(errors, means, channels, strict=True)
    return torch.stack([error / (count * width) for error, count, width in each]).sum()


def _relative(error: Tensor, seen: Comparison, weight: Tensor, valid: Tensor | None) -> Tensor:
    """log2(1 + error / that of a student whose features are 0) of each image (B,), from errors (B, H*W)."""
    square = seen.square if valid is None else seen.square.where(valid, 0.0)
    error, nothing = error.sum(-1), (weight * square).sum(-1)
    # An untrained teacher in evaluation mode has maps of next to nothing: the quotient must not overflow.
    least = error.detach() * torch.finfo(error.dtype).tiny
    return (error / nothing.maximum(least).where(nothing > 0, torch.inf)).log1p() / math.log(2)


@torch.no_grad()
def _loss_weight(
    seen: Comparison, num_queries: int | Tensor, valid: Tensor | None, *, variant: Variant, normalize: Normalize
) -> Tensor:
    """Weight (B, H*W) of the squared distance in each cell of a level, stages added."""
    inverse_length = seen.square.clamp(min=torch.finfo(seen.square.dtype).tiny).rsqrt()
    weight = weight_maps(seen.similarity, inverse_length, num_queries, valid, variant=variant, normalize=normalize)
    return (weight.square() if variant == "official" else weight).sum(0)


class TargetAwareFeatureLoss(OptionModule):
    """Module form of :func:`target_aware_feature_loss`, with the same options and defaults, and a learned projection.

    Args:
        student_channels: See :class:`FeatureProjection`, which maps the student's features to the teacher's space.
        teacher_channels: See :class:`FeatureProjection`.
        variant: ``"paper"`` or ``"official"``.
        normalize: What the map is divided by (:func:`target_aware_mask`).
        relative: Whether the error is relative to that of features of 0.
        sync_normalizer: Whether the number of valid cells, or of images, is averaged over replicas.

    Examples:
        >>> loss = TargetAwareFeatureLoss(4, 8)
        >>> teacher, queries, quality = torch.randn(2, 8, 6, 6), torch.randn(2, 10, 8), torch.rand(2, 10)
        >>> loss(torch.randn(2, 4, 3, 3), teacher, queries, quality).shape
        torch.Size([])
        >>> [tuple(parameter.shape) for parameter in loss.parameters()]
        [(8, 4, 1, 1), (8,)]
    """

    rules = RULES

    def __init__(
        self,
        student_channels: int | Sequence[int] | None = None,
        teacher_channels: int | Sequence[int] | None = None,
        *,
        variant: Variant = "paper",
        normalize: Normalize | None = None,
        relative: bool = False,
        sync_normalizer: bool = True,
    ) -> None:
        super().__init__(variant=variant, normalize=normalize, relative=relative, sync_normalizer=sync_normalizer)
        self.projections = FeatureProjection(student_channels, teacher_channels)

    def forward(
        self,
        student_features: Levels,
        teacher_features: Levels,
        teacher_queries: Tensor,
        quality: Tensor,
        *,
        padding_mask: Levels | None = None,
        query_mask: Tensor | None = None,
    ) -> Tensor:
        """See :func:`target_aware_feature_loss`; the student's channels and size may differ."""
        students = self.projections(student_features, teacher_features, padding_mask)
        return target_aware_feature_loss(
            students,
            teacher_features,
            teacher_queries,
            quality,
            padding_mask=padding_mask,
            query_mask=query_mask,
            **self.call_options,
        )
