"""How the features of a student come to the space of its teacher."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detr_kd_losses._options import TypedCall
from detr_kd_losses._precision import full_precision
from detr_kd_losses._validation import validate_count, validate_type

__all__ = ["FeatureProjection"]

Levels = Tensor | Sequence[Tensor]

_WHOLE = 1 - 1e-5
_KEEPS_CHANNELS = (nn.Identity, type(None))  # a tuple: the compiler of PyTorch 2.6 cannot trace a union


def as_levels(name: str, levels: Levels) -> list[Tensor]:
    """The argument `name` as levels; a single map is one."""
    if isinstance(levels, Tensor):
        return [levels]
    validate_type(name, levels, Iterable, "a tensor or a sequence of levels")
    each = list(levels)
    for index, level in enumerate(each):
        validate_type(f"{name}[{index}]", level, Tensor, "a tensor")
    return each


class FeatureProjection(TypedCall, nn.ModuleList):
    """Maps the levels of a student to channels and size of the teacher's.

    Levels with other channels than the teacher's go through a learned 1 × 1 convolution, levels of another size
    through bilinear interpolation. The convolutions are parameters of this Module: give them to the optimizer.

    Args:
        student_channels: Channels of the student's feature map, or one number per level. None: as the teacher's.
        teacher_channels: Channels of the teacher's feature map, or one number per level.

    Raises:
        ValueError: If the two have not the same number of levels.
        TypeError: If a number of channels is no whole number.

    Examples:
        >>> projection = FeatureProjection([4, 8], [8, 8])
        >>> students = torch.rand(2, 4, 3, 3), torch.rand(2, 8, 2, 2)
        >>> teachers = torch.rand(2, 8, 6, 6), torch.rand(2, 8, 2, 2)
        >>> [tuple(level.shape) for level in projection(students, teachers)]
        [(2, 8, 6, 6), (2, 8, 2, 2)]
    """

    def __init__(
        self,
        student_channels: int | Sequence[int] | None = None,
        teacher_channels: int | Sequence[int] | None = None,
    ) -> None:
        students, teachers = _channels(student_channels), _channels(teacher_channels)
        if len(students) != len(teachers):
            msg = (
                "`student_channels` and `teacher_channels` must have one number per level, "
                f"got {student_channels} and {teacher_channels}"
            )
            raise ValueError(msg)
        super().__init__(
            nn.Identity() if student == teacher else nn.Conv2d(student, teacher, kernel_size=1)
            for student, teacher in zip(students, teachers, strict=True)
        )

    def forward(
        self, student_features: Levels, teacher_features: Levels, padding_mask: Levels | None = None
    ) -> list[Tensor]:
        """The student's levels, as the teacher's.

        Args:
            student_features: (B, D', H', W'), or levels.
            teacher_features: (B, D, H, W), or as many levels.
            padding_mask: (B, H, W) or (B, H', W') bool, True = a valid cell, or one per level. Other cells in which the
                student has a number that is not finite count as absent: in a projection, whose weights would get it in
                their gradient, and beside valid cells, which are interpolated from those that are left.

        Raises:
            ValueError: If the channels are not those that the options say, or levels are missing.
        """
        students = as_levels("student_features", student_features)
        teachers = as_levels("teacher_features", teacher_features)
        if len(self) and len(students) != len(self):
            msg = (
                f"`student_features` must have the {len(self)} levels that `student_channels` has, got {len(students)}"
            )
            raise ValueError(msg)
        masks = [None] * len(students) if padding_mask is None else as_levels("padding_mask", padding_mask)
        if not len(students) == len(teachers) == len(masks):
            return students  # the loss says which levels are missing
        projections: list[nn.Module | None] = list(self) if len(self) else [None] * len(students)
        levels = enumerate(zip(students, teachers, masks, projections, strict=True))
        return [self._as_teachers(index, *level) for index, level in levels]

    def _as_teachers(
        self, index: int, student: Tensor, teacher: Tensor, mask: Tensor | None, projection: nn.Module | None
    ) -> Tensor:
        """One level, projected and resized. Where neither mixes cells or channels the loss itself blanks padding."""
        _validate_channels(index, student, teacher, projection)
        projects, size = not isinstance(projection, _KEEPS_CHANNELS), teacher.shape[-2:]
        there = None
        if mask is not None and mask.ndim == 3 and (projects or student.shape[-2:] != size):
            there = resized_mask(mask, student.shape[-2:]).unsqueeze(1) | student.isfinite().all(1, keepdim=True)
            student = student.where(there, 0.0)
        if projection is not None:
            student = _project(student, projection)
        return _resize(student, size, there)


def resized_mask(mask: Tensor, size: tuple[int, ...]) -> Tensor:
    """A mask (B, H, W) for maps of another size: what is in the middle of each cell."""
    if mask.shape[-2:] == size:
        return mask
    return F.interpolate(mask.unsqueeze(1).float(), size=size, mode="nearest-exact").squeeze(1) > 0


def _validate_channels(index: int, student: Tensor, teacher: Tensor, projection: nn.Module | None) -> None:
    """Raise where channels differ, and say by which option they are brought together."""
    if student.ndim != 4 or teacher.ndim != 4:
        return  # the loss says so
    channels = student.shape[1], teacher.shape[1]
    if isinstance(projection, nn.Conv2d):
        expected = projection.in_channels, projection.out_channels
        if channels != expected:
            msg = (
                f"`student_features` and `teacher_features` must have the channels that `student_channels` and "
                f"`teacher_channels` say for level {index}, {expected[0]} and {expected[1]}, "
                f"got {channels[0]} and {channels[1]}"
            )
            raise ValueError(msg)
    elif isinstance(projection, _KEEPS_CHANNELS) and channels[0] != channels[1]:
        msg = (
            f"`student_features` and `teacher_features` must have the same channels in level {index}, or set "
            f"`student_channels` and `teacher_channels`, one number per level, to learn a projection; "
            f"got {channels[0]} and {channels[1]}"
        )
        raise ValueError(msg)


def _channels(channels: int | Sequence[int] | None) -> list[int]:
    if channels is None:
        return []
    each = [channels] if isinstance(channels, int) else list(channels)
    for number in each:
        validate_count("channels", number)
    return each


def _project(features: Tensor, projection: nn.Module) -> Tensor:
    """Half-precision features meet the parameters in the precision that those have."""
    if isinstance(projection, nn.Conv2d):
        features = features.to(projection.weight.dtype)
    projected: Tensor = projection(features)
    return projected


def _resize(features: Tensor, size: tuple[int, ...], there: Tensor | None) -> Tensor:
    """Bilinear, from the cells (B, 1, H, W) that are `there`."""
    if features.shape[-2:] == size:
        return features
    features = full_precision(features)
    if there is None:
        return _bilinear(features, size)
    # A projection gives cells without features its bias.
    features = features.where(there, 0.0)
    share = _bilinear(there.to(features.dtype), size)
    # Where all neighbours count, the share is 1 but for its rounding.
    between = (share > 0) & (share < _WHOLE)
    return _bilinear(features, size) / torch.where(between, share, 1.0)


def _bilinear(features: Tensor, size: tuple[int, ...]) -> Tensor:
    return F.interpolate(features, size=size, mode="bilinear", align_corners=False)
