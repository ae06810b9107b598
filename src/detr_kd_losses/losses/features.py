"""Target-aware feature distillation: features weighted by their similarity to good teacher queries."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detr_kd_losses._checks import check_same_device, check_same_shape, full_precision
from detr_kd_losses._reduction import replica_mean
from detr_kd_losses.losses._comparison import Comparison, compare
from detr_kd_losses.losses._module import LossModule
from detr_kd_losses.losses._similarity import summarize_queries
from detr_kd_losses.losses.query_quality import Variant
from detr_kd_losses.losses.target_aware_mask import (
    Normalize,
    check_features,
    check_padding_mask,
    check_queries,
    check_weighting,
    weight_maps,
)

__all__ = ["TargetAwareFeatureLoss", "target_aware_feature_loss"]

Levels = Tensor | Sequence[Tensor]


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
    normalize = check_weighting(variant, normalize)
    students, teachers = _as_levels(student_features), _as_levels(teacher_features)
    masks: Sequence[Tensor | None] = [None] * len(students) if padding_mask is None else _as_levels(padding_mask)
    for name, levels in (("teacher_features", teachers), ("padding_mask", masks)):
        if len(levels) != len(students) or not students:
            msg = (
                f"`{name}` must have as many levels as `student_features`, at least 1; "
                f"got {len(levels)} and {len(students)}"
            )
            raise ValueError(msg)
    for student, teacher, valid in zip(students, teachers, masks, strict=True):
        check_features("student_features", student)
        check_same_shape("student_features", student.shape, "teacher_features", teacher.shape, "(B, D, H, W)")
        check_same_device("student_features", student, teacher_features=teacher)
        check_queries("teacher_queries", teacher_queries, quality, "teacher_features", teacher)
        check_padding_mask(valid, "teacher_features", teacher)
    # A map that is divided by M alone is a sum over queries, and its sum over stages is one over all their queries.
    summary = summarize_queries(teacher_queries.detach(), quality.detach(), variant, add_stages=normalize == "queries")
    losses = []
    for student, teacher, valid in zip(students, teachers, masks, strict=True):
        seen = compare(student, teacher, valid, summary)
        cells = None if valid is None else valid.flatten(1)
        weight = _loss_weight(seen, teacher_queries.shape[-2], cells, variant=variant, normalize=normalize)
        count = weight.new_full((), weight.numel()) if cells is None else cells.sum().to(weight.dtype)
        count = replica_mean(count, sync=sync_normalizer) * max(student.shape[1], 1)
        losses.append((seen.distance * weight).sum() / count)
    return torch.stack(losses).sum()


@torch.no_grad()
def _loss_weight(
    seen: Comparison, num_queries: int, valid: Tensor | None, *, variant: Variant, normalize: Normalize
) -> Tensor:
    """Weight (B, H*W) of the squared distance in each cell of a level, stages added."""
    inverse_length = seen.square.clamp(min=torch.finfo(seen.square.dtype).tiny).rsqrt()
    weight = weight_maps(seen.similarity, inverse_length, num_queries, valid, variant=variant, normalize=normalize)
    return (weight.square() if variant == "official" else weight).sum(0)


def _as_levels(levels: Levels) -> list[Tensor]:
    return [levels] if isinstance(levels, Tensor) else list(levels)


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
            students = [_project(level, conv) for level, conv in zip(students, self.projections, strict=True)]
        if len(students) == len(teachers):
            students = [
                _resize(student, teacher.shape[-2:]) for student, teacher in zip(students, teachers, strict=True)
            ]
        return target_aware_feature_loss(
            students, teachers, teacher_queries, quality, padding_mask=padding_mask, **self.options
        )


def _channels(channels: int | Sequence[int] | None) -> list[int]:
    if channels is None:
        return []
    return [channels] if isinstance(channels, int) else list(channels)


def _project(features: Tensor, projection: nn.Module) -> Tensor:
    """Half-precision features meet the parameters in the precision that those have."""
    if isinstance(projection, nn.Conv2d):
        features = features.to(projection.weight.dtype)
    projected: Tensor = projection(features)
    return projected


def _resize(features: Tensor, size: torch.Size) -> Tensor:
    if features.shape[-2:] == size:
        return features
    return F.interpolate(full_precision(features), size=size, mode="bilinear", align_corners=False)
