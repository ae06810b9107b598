"""Target-aware feature distillation: features weighted by their similarity to good teacher queries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detr_kd_losses._checks import (
    check_choice,
    check_dtype,
    check_floating,
    check_same_device,
    check_same_shape,
    full_precision,
    full_precision_matmul,
    shared_precision,
)
from detr_kd_losses._reduction import replica_mean
from detr_kd_losses.losses._module import LossModule
from detr_kd_losses.losses.query_quality import VARIANTS, Variant

__all__ = ["TargetAwareFeatureLoss", "target_aware_feature_loss", "target_aware_mask"]

Normalize = Literal["queries", "max", "mean"]
Levels = Tensor | Sequence[Tensor]

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
    :math:`s(p) = \max(\sum_m q_m ψ_m(p), 0.01)`, whose square weighs the loss. No (M, H, W) tensor is formed: `w` is
    one D × D quadratic form of the normalised feature, `s` one dot product.

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
    normalize = _check_options(variant, normalize)
    _check_features("features", features)
    _check_queries("queries", queries, quality, "features", features)
    _check_padding_mask(padding_mask, "features", features)
    return _weight_map(features, queries, quality, padding_mask, variant=variant, normalize=normalize)


def _weight_map(
    features: Tensor,
    queries: Tensor,
    quality: Tensor,
    padding_mask: Tensor | None,
    *,
    variant: Variant,
    normalize: Normalize,
) -> Tensor:
    """The body of :func:`target_aware_mask`, for arguments that are checked."""
    features, queries, quality = shared_precision(features, queries, quality)
    tiny = torch.finfo(features.dtype).tiny
    cells = features.flatten(2)  # (B, D, H*W)
    length = torch.linalg.vector_norm(cells, dim=1).clamp(min=tiny)
    stages = queries.shape[:-3]
    queries = F.normalize(queries.reshape(-1, *queries.shape[-3:]), dim=-1, eps=tiny)
    quality = quality.reshape(queries.shape[:-1]).unsqueeze(-1)
    with full_precision_matmul(features):
        if variant == "paper":
            # sum_m q_m (Q_m . f)^2 = f^T A f with A = sum_m q_m Q_m Q_m^T; one stage at a time bounds the memory.
            forms = queries.mT @ (quality * queries)
            squares = [((form @ cells) * cells).sum(1) / length for form in forms]
            weight = torch.stack(squares) if squares else cells.new_zeros((0, *length.shape))
        else:
            # sum_m q_m (Q_m . f) = (sum_m q_m Q_m) . f
            directions = (quality * queries).sum(-2)  # (L, B, D)
            weight = (directions.transpose(0, 1) @ cells).transpose(0, 1)
        weight = weight / length
    if variant == "official":
        weight = weight.clamp(min=_OFFICIAL_FLOOR)
    valid = None if padding_mask is None else padding_mask.flatten(1)
    if valid is not None:
        weight = torch.where(valid, weight, 0.0)
    weight = weight / _normalizer(weight, valid, normalize, queries.shape[-2])
    return weight.reshape(*stages, features.shape[0], *features.shape[-2:])


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


def target_aware_feature_loss(
    student_features: Levels,
    teacher_features: Levels,
    teacher_queries: Tensor,
    quality: Tensor,
    *,
    variant: Variant = "paper",
    normalize: Normalize | None = None,
    padding_mask: Levels | None = None,
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
    is of the order of a plain mean squared error.

    Args:
        student_features: (B, D, H, W), or a sequence of levels. For other channels or sizes than the teacher's see
            :class:`TargetAwareFeatureLoss`.
        teacher_features: (B, D, H, W), or as many levels, each of the shape of the student's.
        teacher_queries: (B, M, D) or (L, B, M, D), the teacher's decoder outputs.
        quality: (B, M) or (L, B, M), from :func:`query_quality`.
        variant: ``"paper"`` or ``"official"``.
        normalize: See :func:`target_aware_mask`.
        padding_mask: (B, H, W) bool, True = a valid cell, or one per level. None: all valid.
        sync_normalizer: Whether the number of valid cells is averaged over replicas when torch.distributed is
            initialised.

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
    normalize = _check_options(variant, normalize)
    students, teachers = _as_levels(student_features), _as_levels(teacher_features)
    masks = [None] * len(students) if padding_mask is None else _as_levels(padding_mask)
    for name, levels in (("teacher_features", teachers), ("padding_mask", masks)):
        if len(levels) != len(students) or not students:
            msg = (
                f"`{name}` must have as many levels as `student_features`, at least 1; "
                f"got {len(levels)} and {len(students)}"
            )
            raise ValueError(msg)
    losses = []
    for student, teacher, valid in zip(students, teachers, masks, strict=True):
        _check_features("student_features", student)
        check_same_shape("student_features", student.shape, "teacher_features", teacher.shape, "(B, D, H, W)")
        check_same_device("student_features", student, teacher_features=teacher)
        _check_queries("teacher_queries", teacher_queries, quality, "teacher_features", teacher)
        _check_padding_mask(valid, "teacher_features", teacher)
        with torch.no_grad():
            weight = _loss_weight(teacher, teacher_queries, quality, valid, variant=variant, normalize=normalize)
        losses.append(_weighted_mean_square(student, teacher.detach(), weight, valid, sync=sync_normalizer))
    return torch.stack(losses).sum()


def _loss_weight(
    teacher: Tensor,
    queries: Tensor,
    quality: Tensor,
    padding_mask: Tensor | None,
    *,
    variant: Variant,
    normalize: Normalize,
) -> Tensor:
    """Weight (B, H, W) of the squared difference, stages added."""
    stages = queries.shape[:-3].numel()
    if variant == "paper" and normalize == "queries" and queries.ndim > 3:
        # The sum over stages is a sum over all their queries: one quadratic form for all.
        queries = queries.flatten(0, -4).transpose(0, 1).flatten(1, 2)
        quality = quality.flatten(0, -3).transpose(0, 1).flatten(1, 2)
        return stages * _weight_map(teacher, queries, quality, padding_mask, variant=variant, normalize=normalize)
    weight = _weight_map(teacher, queries, quality, padding_mask, variant=variant, normalize=normalize)
    if variant == "official":
        weight = weight.square()
    return weight.reshape(-1, *weight.shape[-3:]).sum(0)


def _weighted_mean_square(
    student: Tensor, teacher: Tensor, weight: Tensor, valid: Tensor | None, *, sync: bool
) -> Tensor:
    """Mean over valid cells and channels of `weight` (B, H, W) times the squared difference (B, D, H, W)."""
    student, teacher = shared_precision(student, teacher)
    if valid is None:
        cells = weight.new_full((), weight.numel())
    else:
        cells = valid.sum().to(weight.dtype)
        # Whatever is in the padding, not a number included, stays out of value and gradient.
        student, teacher = (features.where(valid.unsqueeze(1), 0.0) for features in (student, teacher))
    per_cell = (student - teacher).square().sum(1) * weight
    return per_cell.sum() / (replica_mean(cells, sync=sync) * max(student.shape[1], 1))


def _as_levels(levels: Levels) -> list[Tensor]:
    return [levels] if isinstance(levels, Tensor) else list(levels)


def _check_features(name: str, features: Tensor) -> None:
    check_floating(name, features)
    if features.ndim != 4:
        msg = f"`{name}` must have shape (B, D, H, W), got {tuple(features.shape)}"
        raise ValueError(msg)


def _check_options(variant: Variant, normalize: Normalize | None) -> Normalize:
    check_choice("variant", variant, VARIANTS)
    if normalize is None:
        return _DEFAULT_NORMALIZE[variant]
    check_choice("normalize", normalize, NORMALIZATIONS)
    return normalize


def _check_queries(name: str, queries: Tensor, quality: Tensor, features_name: str, features: Tensor) -> None:
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


def _check_padding_mask(padding_mask: Tensor | None, features_name: str, features: Tensor) -> None:
    if padding_mask is not None:
        check_dtype("padding_mask", padding_mask, torch.bool)
        shape = (features.shape[0], *features.shape[-2:])
        check_same_shape("padding_mask", padding_mask.shape, features_name, shape, "(B, H, W)")
        check_same_device(features_name, features, padding_mask=padding_mask)


class TargetAwareFeatureLoss(LossModule):
    """Module form of :func:`target_aware_feature_loss`, which maps the student's features to the teacher's space.

    Levels with other channels than the teacher's go through a learned 1 × 1 convolution, levels of another size
    through bilinear interpolation. The convolutions are parameters of this Module: give them to the optimizer.

    Args:
        student_channels: Channels of the student's feature map, or one number per level. None: as the teacher's.
        teacher_channels: Likewise for the teacher.
        variant: See :func:`target_aware_feature_loss`, as the other options.
        normalize: See there.
        sync_normalizer: See there.

    Examples:
        >>> loss = TargetAwareFeatureLoss(4, 8)
        >>> teacher, queries, quality = torch.randn(2, 8, 6, 6), torch.randn(2, 10, 8), torch.rand(2, 10)
        >>> loss(torch.randn(2, 4, 3, 3), teacher, queries, quality).shape
        torch.Size([])
        >>> [tuple(parameter.shape) for parameter in loss.parameters()]
        [(8, 4, 1, 1), (8,)]
    """

    def __init__(
        self,
        student_channels: int | Sequence[int] | None = None,
        teacher_channels: int | Sequence[int] | None = None,
        *,
        variant: Variant = "paper",
        normalize: Normalize | None = None,
        sync_normalizer: bool = True,
    ) -> None:
        super().__init__(variant=variant, normalize=normalize, sync_normalizer=sync_normalizer)
        students, teachers = _channels(student_channels), _channels(teacher_channels)
        if len(students) != len(teachers):
            msg = (
                "`student_channels` and `teacher_channels` must have one number per level, "
                f"got {student_channels} and {teacher_channels}"
            )
            raise ValueError(msg)
        self.projections = nn.ModuleList(
            nn.Identity() if student == teacher else nn.Conv2d(student, teacher, kernel_size=1)
            for student, teacher in zip(students, teachers, strict=True)
        )

    def forward(
        self,
        student_features: Levels,
        teacher_features: Levels,
        teacher_queries: Tensor,
        quality: Tensor,
        *,
        padding_mask: Levels | None = None,
    ) -> Tensor:
        """See :func:`target_aware_feature_loss`; the student's channels and size may differ."""
        students, teachers = _as_levels(student_features), _as_levels(teacher_features)
        if self.projections:
            if len(students) != len(self.projections):
                msg = (
                    f"`student_features` must have the {len(self.projections)} levels that `student_channels` has, "
                    f"got {len(students)}"
                )
                raise ValueError(msg)
            students = [project(level) for project, level in zip(self.projections, students, strict=True)]
        students = [_resize(student, teacher.shape[-2:]) for student, teacher in zip(students, teachers, strict=False)]
        return target_aware_feature_loss(
            students, teachers, teacher_queries, quality, padding_mask=padding_mask, **self.options
        )


def _channels(channels: int | Sequence[int] | None) -> list[int]:
    if channels is None:
        return []
    return [channels] if isinstance(channels, int) else list(channels)


def _resize(features: Tensor, size: torch.Size) -> Tensor:
    if features.shape[-2:] == size:
        return features
    return F.interpolate(full_precision(features), size=size, mode="bilinear", align_corners=False)
