"""How heads turn the states of a decoder into boxes and distributions."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["inverse_sigmoid", "move", "scale_and_shift", "weighting_function"]


def inverse_sigmoid(coordinates: Tensor, eps: float = 1e-5) -> Tensor:
    """Logit of coordinates, clamped as in Deformable DETR and its heirs: logit and 1 - logit each at least `eps`."""
    coordinates = coordinates.clamp(0, 1)
    return (coordinates.clamp(min=eps) / (1 - coordinates).clamp(min=eps)).log()


def move(offsets: Tensor, reference: Tensor) -> Tensor:
    """Offsets (..., 4) plus a reference (..., 4), or plus a reference point (..., 2) for the centre alone."""
    channels = reference.shape[-1]
    return torch.cat([offsets[..., :channels] + reference, offsets[..., channels:]], -1)


def scale_and_shift(offsets: Tensor, reference: Tensor) -> Tensor:
    """Boxes from shifts in sizes of a reference box, and log-scales of it."""
    (shift, scale), (centre, size) = offsets.tensor_split(2, -1), reference.tensor_split(2, -1)
    return torch.cat([shift * size + centre, scale.exp() * size], -1)


def weighting_function(num_bins: int, up: Tensor, scale: Tensor) -> Tensor:
    r"""The bins of D-FINE, fine in the middle and coarse at the ends, ascending.

    .. math:: W(n) = \operatorname{sign}(2n - R) \, c \left[(a/c + 1)^{|2n - R| / (R - 2)} - 1\right]

    for 0 < n < R, and W(0) = -2a, W(R) = 2a. Here in units in which c = 1, as `reg_scale` is 1/c.

    Args:
        num_bins: R, even; there are R + 1 bins.
        up: a, one number.
        scale: 1/c, one number.

    References:
        Peng et al., "D-FINE: Redefine Regression Task in DETRs as Fine-grained Distribution Refinement", ICLR 2025,
        arXiv:2410.13842.
    """
    bound = (up.abs() * scale.abs()).reshape(())
    steps = torch.arange(2 - num_bins, num_bins, 2, device=bound.device)  # 2n - R
    inner = steps.sign() * ((bound + 1) ** (steps.abs() / (num_bins - 2)) - 1)
    ends = 2 * bound.reshape(1)
    return torch.cat([-ends, inner.to(ends.dtype), ends])
