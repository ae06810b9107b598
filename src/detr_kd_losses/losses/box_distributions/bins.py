"""Bins of box distributions: where they lie, and a teacher's distributions in the bins of a student."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from detr_kd_losses._precision import shared_precision
from detr_kd_losses._validation import (
    validate_coordinates,
    validate_floating,
    validate_ndim,
    validate_number,
    validate_positive,
    validate_same_device,
    validate_same_shape,
    validate_type,
)

__all__ = ["rebin_box_distribution"]

Bins = Tensor | Sequence[float]
Scale = Tensor | float
Grid = tuple[Tensor, Tensor]
"""Bins (R + 1,) and scale ()."""

# The least width and height of a reference: the bins of a smaller one are all in one place.
_LEAST_SIZE = 1e-12


def rebin_box_distribution(
    probabilities: Tensor,
    teacher_reference: Tensor,
    student_reference: Tensor,
    *,
    teacher_bins: Bins,
    student_bins: Bins,
    teacher_scale: Scale,
    student_scale: Scale,
) -> Tensor:
    r"""Express a teacher's distributions of the edges of a box in the bins of the student.

    Bin `n` of the bins `W` lies, for a reference box (cx, cy, w, h) and a scale `s`, at

    .. math:: x_n = c_x - (s / 2 + W_n) w / s \text{ (left)}, \quad x_n = c_x + (s / 2 + W_n) w / s \text{ (right)}

    and likewise at the top and the bottom with cy and h. Each teacher bin's place is expressed in the student's
    coordinate, cut off at the first and the last student bin, and its mass is split linearly between the two nearest
    student bins. The mass as a whole stays, and where both have the same reference, bins and scale every bin does.
    References without width or height count as 1e-12 wide.

    Args:
        probabilities: (..., 4, R_T + 1) of the teacher, edges left, top, right, bottom.
        teacher_reference: (..., 4), cxcywh: the box that the teacher's distributions are about.
        student_reference: (..., 4), cxcywh: the box that the student's are about.
        teacher_bins: (R_T + 1,), ascending. A tensor, or numbers, which a GPU has to be sent.
        student_bins: (R_S + 1,), ascending.
        teacher_scale: A number, or a tensor of one number.
        student_scale: A number, or a tensor of one number.

    Returns:
        (..., 4, R_S + 1).

    Raises:
        ValueError: If shapes or devices do not fit, or numbers do not ascend.
        TypeError: If a dtype does not fit.

    Examples:
        >>> probabilities = torch.tensor([[0.0, 1.0, 0.0]]).expand(4, 3)
        >>> box = torch.tensor([0.5, 0.5, 0.2, 0.2])
        >>> bins = {"teacher_bins": [-2, 0, 2], "student_bins": [-2, 0, 2], "teacher_scale": 4.0, "student_scale": 4.0}
        >>> moved = rebin_box_distribution(probabilities, box, box + torch.tensor([0.05, 0, 0, 0]), **bins)
        >>> moved.round(decimals=4)
        tensor([[0.0000, 0.5000, 0.5000],
                [0.0000, 1.0000, 0.0000],
                [0.5000, 0.5000, 0.0000],
                [0.0000, 1.0000, 0.0000]])

    References:
        Peng et al., "D-FINE: Redefine Regression Task in DETRs as Fine-grained Distribution Refinement", ICLR 2025,
        arXiv:2410.13842.
    """
    validate_floating("probabilities", probabilities)
    validate_ndim("probabilities", probabilities, 2, "(..., 4, R + 1)")
    for name, reference in (("teacher_reference", teacher_reference), ("student_reference", student_reference)):
        validate_coordinates(name, reference)
        validate_same_shape(name, reference.shape, "probabilities", probabilities.shape[:-1], "(..., 4)")
        validate_same_device("probabilities", probabilities, **{name: reference})
    probabilities, teacher_reference, student_reference = shared_precision(
        probabilities, teacher_reference, student_reference
    )
    dtype = probabilities.dtype
    teacher_grid = grid_of("teacher_", teacher_bins, teacher_scale, probabilities, dtype, edges=1)
    student_bins = _as_bins("student_bins", student_bins, probabilities)
    student_grid = student_bins, _as_scale("student_scale", student_scale, probabilities)
    return rebin(probabilities, teacher_reference, student_reference, teacher_grid, student_grid)


def grid_of(prefix: str, bins: Bins, scale: Scale, distributions: Tensor, dtype: torch.dtype, edges: int = 4) -> Grid:
    """Bins (R + 1,) and scale () of `distributions` (..., `edges` (R + 1)), as tensors beside them."""
    like = distributions.new_empty((), dtype=dtype)
    bins, number = _as_bins(f"{prefix}bins", bins, like), distributions.shape[-1]
    if number != edges * len(bins):
        what = "`probabilities`" if edges == 1 else f"`{prefix}distributions`"
        msg = f"{what} must have {'' if edges == 1 else '4 x '}{len(bins)} channels, as `{prefix}bins`, got {number}"
        raise ValueError(msg)
    return bins, _as_scale(f"{prefix}scale", scale, like)


def _as_bins(name: str, bins: Bins, like: Tensor) -> Tensor:
    """Bins as a tensor of the dtype and device of `like`; numbers must ascend, which of a tensor nobody reads."""
    if isinstance(bins, Tensor):
        validate_floating(name, bins)
        validate_same_device("the distributions", like, **{name: bins})
    else:
        validate_type(name, bins, (Sequence, np.ndarray), "a tensor or a sequence of numbers")
        for number in bins:
            validate_number(name, number)
        if any(right < left for left, right in pairwise(bins)):
            msg = f"`{name}` must ascend, got {list(bins)}"
            raise ValueError(msg)
        bins = torch.tensor(bins, dtype=like.dtype, device=like.device)
    if bins.ndim != 1 or not len(bins):
        msg = f"`{name}` must have shape (R + 1,), at least one bin, got {tuple(bins.shape)}"
        raise ValueError(msg)
    return bins.detach().to(like.dtype)


def _as_scale(name: str, scale: Scale, like: Tensor) -> Tensor:
    """A scale as a tensor () of the dtype and on the device of `like`."""
    if not isinstance(scale, Tensor):
        validate_positive(name, scale)
        return torch.full((), scale, dtype=like.dtype, device=like.device)
    validate_floating(name, scale)
    validate_same_device("the distributions", like, **{name: scale})
    if scale.numel() != 1:
        msg = f"`{name}` must be a number or a tensor of one number, got shape {tuple(scale.shape)}"
        raise ValueError(msg)
    return scale.detach().to(like.dtype).reshape(())


def rebin(
    probabilities: Tensor,
    teacher_reference: Tensor,
    student_reference: Tensor,
    teacher_grid: Grid,
    student_grid: Grid,
) -> Tensor:
    """See :func:`rebin_box_distribution`. One edge at a time: what an edge needs beside its mass is of its size."""
    (teacher_bins, teacher_scale), (student_bins, student_scale) = teacher_grid, student_grid
    if len(student_bins) == 1:
        return probabilities.sum(-1, keepdim=True)
    teacher, student = teacher_reference.detach(), student_reference.detach()
    centre, size, own_centre, own_size = teacher[..., :2], teacher[..., 2:], student[..., :2], student[..., 2:]
    size, own_size = size.clamp(min=_LEAST_SIZE), own_size.clamp(min=_LEAST_SIZE)
    # d = W_n stretch + grown -+ shift: written so that equal references and scales leave W_n as it is, to the last bit.
    stretch = (size / own_size) * (student_scale / teacher_scale)
    grown = (size - own_size) / own_size * (student_scale / 2)
    shift = (own_centre - centre) / own_size * student_scale
    edges = []
    for edge, mass in enumerate(probabilities.unbind(-2)):
        axis, sign = edge % 2, 1 if edge < 2 else -1
        places = teacher_bins * stretch[..., axis, None] + (grown + sign * shift)[..., axis, None]
        edges.append(_split(mass, places, student_bins))
    return torch.stack(edges, dim=-2)


def _split(mass: Tensor, places: Tensor, bins: Tensor) -> Tensor:
    """The `mass` (..., n) at each of the `places`, split linearly between the two nearest bins -> (..., R + 1)."""
    last = len(bins) - 1
    places = places.clamp(bins[0], bins[last])
    below = (torch.searchsorted(bins, places, right=True) - 1).clamp(0, last - 1)
    gap = bins.diff()
    share = (places - bins[below]) / torch.where(gap > 0, gap, 1.0)[below]
    rebinned = mass.new_zeros((*mass.shape[:-1], last + 1))
    return rebinned.scatter_add(-1, below, mass * (1 - share)).scatter_add(-1, below + 1, mass * share)
