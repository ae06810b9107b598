"""Plain distances of features: the baselines, and how to learn from a model that is no detector."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from detr_kd_losses._blocks import cut_features, recompute_features
from detr_kd_losses._options import OptionModule, Rules, boolean, one_of, validate_options
from detr_kd_losses._precision import shared_dtype
from detr_kd_losses._reduction import replica_means, replica_sum
from detr_kd_losses._validation import validate_positive
from detr_kd_losses.losses.features.levels import Level, pair_levels
from detr_kd_losses.losses.features.projection import FeatureProjection, Levels

__all__ = ["FeatureDistillationLoss", "feature_distillation_loss"]

Distance = Literal["mse", "cosine", "pearson", "channel"]

RULES: Rules = {
    "distance": one_of("mse", "cosine", "pearson", "channel"),
    "temperature": validate_positive,
    "sync_normalizer": boolean,
}


def feature_distillation_loss(
    student_features: Levels,
    teacher_features: Levels,
    *,
    distance: Distance = "mse",
    weight: Levels | None = None,
    padding_mask: Levels | None = None,
    temperature: float = 1.0,
    sync_normalizer: bool = True,
) -> Tensor:
    r"""Distil features cell by cell, wherever they are.

    .. math:: L = \frac{1}{n} \sum_p w(p) \, d(S(p), T(p))

    over the `n` valid cells `p` of the batch, levels added, with a `distance`

    - ``"mse"``: the mean over channels of :math:`(S - T)^2`;
    - ``"cosine"``: :math:`1 - \cos(S, T)`, whatever the length of the features; 1 where one of them has none;
    - ``"pearson"`` (PKD): half the mean over channels of :math:`(\hat S - \hat T)^2`, standardised per channel over the
      valid cells of the batch, 0 where a channel has no variance. It is 1 - Pearson's correlation, whatever scale and
      shift the features have.

    or, of each image and channel as a whole,

    - ``"channel"`` (CWD): :math:`T^2 KL(softmax_p(T(p) / T) \| softmax_p(S(p) / T))` over its valid cells, a mean over
      images and channels.

    No gradient reaches the teacher. Half-precision inputs are computed in float32.

    Args:
        student_features: (B, D, H, W), or a sequence of levels. For other channels or sizes than the teacher's see
            :class:`FeatureDistillationLoss`.
        teacher_features: (B, D, H, W), or as many levels, each of the shape of the student's.
        distance: ``"mse"``, ``"cosine"``, ``"pearson"`` or ``"channel"``.
        weight: (B, H, W), not negative, or one per level: how much a cell counts, such as a
            :func:`target_aware_mask` or :func:`box_mask`. None: all the same. Not for ``"channel"``, whose softmax
            weighs cells.
        padding_mask: (B, H, W) bool, True = a valid cell, or one per level. None: all valid.
        temperature: Divisor of both features in ``"channel"``.
        sync_normalizer: Whether the numbers of cells and of images, and the statistics of ``"pearson"``, are those of
            all replicas when torch.distributed is initialised.

    Returns:
        A scalar.

    Raises:
        ValueError: If shapes, devices or options do not fit, or the numbers of levels differ.
        TypeError: If a dtype does not fit.

    Examples:
        >>> teacher = torch.randn(2, 8, 5, 4)
        >>> student = (2 * teacher + 1).requires_grad_()
        >>> feature_distillation_loss(student, teacher).backward()
        >>> round(feature_distillation_loss(student, teacher, distance="pearson").item(), 4)
        0.0

    References:
        Romero et al., "FitNets", ICLR 2015, arXiv:1412.6550.
        Cao et al., "PKD: General Distillation Framework for Object Detectors via Pearson Correlation Coefficient",
        NeurIPS 2022, arXiv:2207.02039.
        Shu et al., "Channel-wise Knowledge Distillation for Dense Prediction", ICCV 2021, arXiv:2011.13256.
    """
    validate_options(RULES, distance=distance, temperature=temperature, sync_normalizer=sync_normalizer)
    if distance == "channel" and weight is not None:
        msg = "`weight` must be None for the distance 'channel', whose softmax weighs cells, got weights"
        raise ValueError(msg)
    levels = pair_levels(student_features, teacher_features, weight=weight, padding_mask=padding_mask)
    sums = [_compare(level, distance, temperature, sync=sync_normalizer) for level in levels]
    totals, counts = zip(*sums, strict=True)
    means = zip(totals, replica_means(*counts, sync=sync_normalizer), strict=True)
    return torch.stack([total / count for total, count in means]).sum()


def _compare(level: Level, distance: str, temperature: float, *, sync: bool) -> tuple[Tensor, Tensor]:
    """Sum of the distances of a level, a mean over channels, and the number of what is added."""
    student, teacher = level.student.flatten(2), level.teacher.detach().flatten(2)
    valid, weight = (None if cells is None else cells.flatten(1).unsqueeze(1) for cells in (level.valid, level.weight))
    dtype, channels = shared_dtype(student, teacher), max(student.shape[1], 1)
    if distance == "channel":
        function = partial(_divergence, dtype=dtype, temperature=temperature)
        divergence = _added(function, cut_features(student, 1), teacher, valid, dim=1) / channels
        return divergence, divergence.new_tensor(len(student))
    count = student.new_tensor(student[:, :1].numel(), dtype=dtype) if valid is None else valid.sum().to(dtype)
    weight = None if weight is None else _blanked(weight.detach().to(dtype), valid)
    # Cut along what is outer in memory.
    outer = 2 if student.stride(1) < student.stride(2) else 1
    if distance == "pearson":
        number = replica_sum(count, sync=sync).clamp(min=1)
        # The gradient of the student is a sum of three, which half precision would round one by one.
        own = [part.to(dtype) for part in cut_features(student, outer)]
        moments = [_moments(x, valid, number, outer, sync=sync) for x in (own, cut_features(teacher, outer))]
        total = _added(_standardised, own, teacher, valid, weight, *moments[0], *moments[1], dim=outer)
        return total / (2 * channels), count
    # A cell without weight has no part, as one that is not valid; to the statistics above it belongs.
    part = valid if weight is None else weight != 0
    if distance == "mse":
        function, parts = partial(_squared, dtype=dtype), cut_features(student, outer)
        return _added(function, parts, teacher, part, weight, dim=outer) / channels, count
    return _added(partial(_angle, dtype=dtype), cut_features(student, 2), teacher, part, weight, dim=2), count


def _added(function: Callable[..., Tensor], parts: list[Tensor], *others: Tensor | None, dim: int) -> Tensor:
    """The sum of what `function` says of the parts of features (B, D, cells) along `dim`."""
    return torch.stack(recompute_features(function, parts, *others, dim=dim)).sum(0)


def _blanked(values: Tensor, part: Tensor | None) -> Tensor:
    return values if part is None else values.where(part, 0.0)


def _weighted(distances: Tensor, weight: Tensor | None) -> Tensor:
    return (distances if weight is None else distances * weight).sum()


def _squared(
    student: Tensor, teacher: Tensor, part: Tensor | None, weight: Tensor | None, *, dtype: torch.dtype
) -> Tensor:
    """Sum of the squared differences."""
    difference = _blanked(student.to(dtype) - teacher.to(dtype), part)
    return _weighted(difference.square().sum(1, keepdim=True), weight)


def _angle(
    student: Tensor, teacher: Tensor, part: Tensor | None, weight: Tensor | None, *, dtype: torch.dtype
) -> Tensor:
    """Sum of 1 - cosine, as half the squared distance of the directions: 0 where they are the same."""
    # Blanked first: nothing of what has no part may reach a length, and its gradient.
    (student, long), (teacher, teacher_long) = (
        _direction(_blanked(features, part).to(dtype)) for features in (student, teacher)
    )
    # Where one has no direction, half of the distance of 1 is missing.
    return _weighted(((student - teacher).square().sum(1, keepdim=True) + (long != teacher_long)) / 2, weight)


def _direction(features: Tensor) -> tuple[Tensor, Tensor]:
    """Features of length 1, or 0 where they have no length, and where they have one."""
    square = features.square().sum(1, keepdim=True)
    long = square > _least_square(square)
    return features * _inverse_root(square, long), long


def _least_square(square: Tensor) -> float:
    """Below it a length counts as 0: the gradient of its inverse, a third power, would overflow."""
    return float(torch.finfo(square.dtype).tiny ** (2 / 3))


def _moments(
    cut: list[Tensor], valid: Tensor | None, number: Tensor, outer: int, *, sync: bool
) -> tuple[Tensor, Tensor]:
    """Mean of each channel over the valid cells and 1 / its standard deviation, 0 where it has none, (1, D, 1)."""

    def mean_of(function: Callable[..., Tensor], *others: Tensor | None) -> Tensor:
        parts = recompute_features(function, cut, valid, *others, dim=outer)
        return replica_sum(torch.cat(parts, 1) if outer == 1 else torch.stack(parts).sum(0), sync=sync) / number

    mean = mean_of(partial(_sum, dtype=number.dtype))
    variance = mean_of(_squares, mean)
    # Below it is the rounding of a mean.
    least = (8 * torch.finfo(mean.dtype).eps * mean).square().clamp(min=_least_square(mean))
    return mean, _inverse_root(variance, variance > least)


def _sum(features: Tensor, valid: Tensor | None, *, dtype: torch.dtype) -> Tensor:
    return _blanked(features, valid).to(dtype).sum((0, 2), keepdim=True)


def _squares(features: Tensor, valid: Tensor | None, mean: Tensor) -> Tensor:
    return _centred(features, valid, mean).square().sum((0, 2), keepdim=True)


def _centred(features: Tensor, valid: Tensor | None, mean: Tensor) -> Tensor:
    return _blanked(features.to(mean.dtype) - mean, valid)


def _standardised(
    student: Tensor, teacher: Tensor, valid: Tensor | None, weight: Tensor | None, *moments: Tensor
) -> Tensor:
    """Sum of the squared differences of the features, standardised by mean and 1 / deviation of both."""
    mean, inverse, teacher_mean, teacher_inverse = moments
    own = _centred(student, valid, mean) * inverse
    difference = own - _centred(teacher, valid, teacher_mean) * teacher_inverse
    return _weighted(difference.square().sum(1, keepdim=True), weight)


def _inverse_root(square: Tensor, where: Tensor) -> Tensor:
    """1 / sqrt(square) where it is, else 0, with no gradient."""
    return torch.where(where, torch.where(where, square, 1.0).rsqrt(), 0.0)


def _divergence(
    student: Tensor, teacher: Tensor, valid: Tensor | None, *, dtype: torch.dtype, temperature: float
) -> Tensor:
    """Sum over images and channels of the divergence of where a channel is strong."""
    log_q, log_p = (_log_share(features.to(dtype), temperature, valid) for features in (student, teacher))
    return _blanked(log_p.exp() * (log_p - log_q), valid).sum() * temperature**2


def _log_share(features: Tensor, temperature: float, valid: Tensor | None) -> Tensor:
    """Log-softmax over the valid cells of (B, D, cells); without a valid cell any finite number."""
    features = features / temperature
    lowest = torch.finfo(features.dtype).min
    return (features if valid is None else features.where(valid, lowest)).log_softmax(-1)


class FeatureDistillationLoss(OptionModule):
    """Module form of :func:`feature_distillation_loss`, with the same options and defaults, and a learned projection.

    Args:
        student_channels: See :class:`FeatureProjection`, which maps the student's features to the teacher's space.
        teacher_channels: See :class:`FeatureProjection`.
        distance: ``"mse"``, ``"cosine"``, ``"pearson"`` or ``"channel"``.
        temperature: Divisor of both features in ``"channel"``.
        sync_normalizer: Whether numbers and statistics are those of all replicas.

    Examples:
        >>> loss = FeatureDistillationLoss(4, 8, distance="cosine")
        >>> loss(torch.randn(2, 4, 3, 3), torch.randn(2, 8, 6, 6)).shape
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
        distance: Distance = "mse",
        temperature: float = 1.0,
        sync_normalizer: bool = True,
    ) -> None:
        super().__init__(distance=distance, temperature=temperature, sync_normalizer=sync_normalizer)
        self.projections = FeatureProjection(student_channels, teacher_channels)

    def forward(
        self,
        student_features: Levels,
        teacher_features: Levels,
        *,
        weight: Levels | None = None,
        padding_mask: Levels | None = None,
    ) -> Tensor:
        """See :func:`feature_distillation_loss`; the student's channels and size may differ."""
        students = self.projections(student_features, teacher_features, padding_mask)
        return feature_distillation_loss(
            students, teacher_features, weight=weight, padding_mask=padding_mask, **self.call_options
        )
