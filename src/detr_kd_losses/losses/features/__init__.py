"""Target-aware feature distillation: loss, mask and quality, and the passes over the feature maps that they take."""

import torch
from torch import Tensor

from detr_kd_losses.losses.features import _passes

__all__ = ["unsupported_reasons"]


@torch.no_grad()
def unsupported_reasons(student_features: Tensor, teacher_features: Tensor) -> list[str]:
    """Why the GPU kernels of the feature loss cannot take these features, so that plain operations compute it.

    Args:
        student_features: (B, D, H, W), a level of the student's.
        teacher_features: (B, D, H, W), the teacher's.

    Returns:
        One sentence for each reason; none if the kernels run.

    Examples:
        >>> maps = torch.zeros(2, 8, 5, 4, dtype=torch.float64)
        >>> unsupported_reasons(maps, maps)[-1]
        'they compute in float32, and a tensor is in float64'
    """
    return _passes.unsupported_reasons(student_features, teacher_features)
