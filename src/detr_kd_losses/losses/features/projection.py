"""How the features of a student come to the space of its teacher."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from detr_kd_losses._precision import full_precision

__all__ = ["FeatureProjection"]

Levels = Tensor | Sequence[Tensor]


def as_levels(levels: Levels) -> list[Tensor]:
    """A single map as one level."""
    return [levels] if isinstance(levels, Tensor) else list(levels)


class FeatureProjection(nn.ModuleList):
    """Maps the levels of a student to channels and size of the teacher's.

    Levels with other channels than the teacher's go through a learned 1 × 1 convolution, levels of another size
    through bilinear interpolation. The convolutions are parameters of this Module: give them to the optimizer.

    Args:
        student_channels: Channels of the student's feature map, or one number per level. None: as the teacher's.
        teacher_channels: Channels of the teacher's feature map, or one number per level.

    Raises:
        ValueError: If the two have not the same number of levels.

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

    def forward(self, student_features: Levels, teacher_features: Levels) -> list[Tensor]:
        """The student's levels, as the teacher's."""
        students, teachers = as_levels(student_features), as_levels(teacher_features)
        if len(self):
            if len(students) != len(self):
                msg = (
                    f"`student_features` must have the {len(self)} levels that `student_channels` has, "
                    f"got {len(students)}"
                )
                raise ValueError(msg)
            students = [_project(level, conv) for level, conv in zip(students, self, strict=True)]
        if len(students) != len(teachers):
            return students  # the loss says which levels are missing
        return [_resize(student, teacher.shape[-2:]) for student, teacher in zip(students, teachers, strict=True)]


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


def _resize(features: Tensor, size: tuple[int, ...]) -> Tensor:
    if features.shape[-2:] == size:
        return features
    return F.interpolate(full_precision(features), size=size, mode="bilinear", align_corners=False)
