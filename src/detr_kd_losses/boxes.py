"""Box geometry: conversions, areas, IoU and generalized IoU, of all pairs or of partners.

Names and conventions are torchvision's: the overlap functions take corner boxes ``xyxy``, any number of
leading batch dimensions, and answer in float32 for half-precision inputs. Two rules make every value
finite and every gradient defined: a box with a negative extent is empty, and where a ratio of areas is
0 / 0 (boxes without area) it counts as 1 if the two boxes coincide and as 0 otherwise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from detr_kd_losses._precision import full_precision, shared_precision
from detr_kd_losses._validation import validate_boxes, validate_coordinates, validate_same_device, validate_same_shape

__all__ = [
    "box_area",
    "box_cxcywh_to_xyxy",
    "box_iou",
    "box_xyxy_to_cxcywh",
    "generalized_box_iou",
    "paired_box_iou",
    "paired_generalized_box_iou",
]


def box_cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Convert boxes from centre and size to corners.

    Args:
        boxes: (..., 4) as (cx, cy, w, h).

    Returns:
        (..., 4) as (x1, y1, x2, y2) in the dtype of `boxes`.

    Raises:
        ValueError: If the last dimension is not 4.
        TypeError: If the dtype is not floating.

    Examples:
        >>> box_cxcywh_to_xyxy(torch.tensor([0.5, 0.5, 0.5, 0.25])).tolist()
        [0.25, 0.375, 0.75, 0.625]
    """
    validate_coordinates("boxes", boxes)
    cx, cy, w, h = boxes.unbind(-1)
    return torch.stack((cx - 0.5 * w, cy - 0.5 * h, cx + 0.5 * w, cy + 0.5 * h), dim=-1)


def box_xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """Convert boxes from corners to centre and size.

    Args:
        boxes: (..., 4) as (x1, y1, x2, y2).

    Returns:
        (..., 4) as (cx, cy, w, h) in the dtype of `boxes`.

    Raises:
        ValueError: If the last dimension is not 4.
        TypeError: If the dtype is not floating.

    Examples:
        >>> box_xyxy_to_cxcywh(torch.tensor([0.25, 0.375, 0.75, 0.625])).tolist()
        [0.5, 0.5, 0.5, 0.25]
    """
    validate_coordinates("boxes", boxes)
    x1, y1, x2, y2 = boxes.unbind(-1)
    return torch.stack((0.5 * (x1 + x2), 0.5 * (y1 + y2), x2 - x1, y2 - y1), dim=-1)


def box_area(boxes: Tensor) -> Tensor:
    """Area of corner boxes; a box with a negative extent has area 0.

    Args:
        boxes: (..., 4) as xyxy.

    Returns:
        (...), in squared units of `boxes`.

    Raises:
        ValueError: If the last dimension is not 4.
        TypeError: If the dtype is not floating.

    Examples:
        >>> box_area(torch.tensor([[0.0, 0.0, 2.0, 3.0], [1.0, 1.0, 0.0, 2.0]])).tolist()
        [6.0, 0.0]
    """
    validate_coordinates("boxes", boxes)
    x1, y1, x2, y2 = full_precision(boxes).unbind(-1)
    return (x2 - x1).clamp(min=0) * (y2 - y1).clamp(min=0)


def box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Intersection over union of every box of one set with every box of another.

    Args:
        boxes1: (..., N, 4) as xyxy.
        boxes2: (..., M, 4) as xyxy; leading dimensions broadcast.

    Returns:
        (..., N, M) in [0, 1].

    Raises:
        ValueError: If the last dimension is not 4 or the devices differ.
        TypeError: If a dtype is not floating.

    Examples:
        >>> a = torch.tensor([[0.0, 0.0, 2.0, 2.0]])
        >>> b = torch.tensor([[0.0, 0.0, 2.0, 2.0], [1.0, 0.0, 3.0, 2.0]])
        >>> [round(x, 4) for x in box_iou(a, b)[0].tolist()]
        [1.0, 0.3333]
    """
    boxes1, boxes2 = _validated_pair(boxes1, boxes2)
    return _overlap(boxes1.unsqueeze(-2), boxes2.unsqueeze(-3), generalized=False)


def generalized_box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    r"""Generalized IoU of every box of one set with every box of another.

    .. math:: GIoU = |A ∩ B| / |A ∪ B| - (|H| - |A ∪ B|) / |H|

    with `H` the smallest box around both.

    Args:
        boxes1: (..., N, 4) as xyxy.
        boxes2: (..., M, 4) as xyxy; leading dimensions broadcast.

    Returns:
        (..., N, M) in [-1, 1].

    Raises:
        ValueError: If the last dimension is not 4 or the devices differ.
        TypeError: If a dtype is not floating.

    Examples:
        >>> a = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
        >>> b = torch.tensor([[0.0, 0.0, 1.0, 1.0], [3.0, 0.0, 4.0, 1.0]])
        >>> generalized_box_iou(a, b)[0].tolist()
        [1.0, -0.5]

    References:
        Rezatofighi et al., "Generalized Intersection over Union", CVPR 2019, arXiv:1902.09630.
    """
    boxes1, boxes2 = _validated_pair(boxes1, boxes2)
    return _overlap(boxes1.unsqueeze(-2), boxes2.unsqueeze(-3), generalized=True)


def paired_box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """IoU of each box with its partner: the diagonal of :func:`box_iou`, without the rest.

    Args:
        boxes1: (..., N, 4) as xyxy.
        boxes2: (..., N, 4) as xyxy.

    Returns:
        (..., N) in [0, 1].

    Raises:
        ValueError: If the shapes differ or the last dimension is not 4.
        TypeError: If a dtype is not floating.

    Examples:
        >>> a = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 1.0, 1.0]])
        >>> paired_box_iou(a, a.flip(0)).tolist()
        [0.25, 0.25]
    """
    validate_same_shape("boxes1", boxes1.shape, "boxes2", boxes2.shape, "(..., N, 4)")
    return _overlap(*_validated_pair(boxes1, boxes2), generalized=False)


def paired_generalized_box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Generalized IoU of each box with its partner: the diagonal of :func:`generalized_box_iou`.

    Args:
        boxes1: (..., N, 4) as xyxy.
        boxes2: (..., N, 4) as xyxy.

    Returns:
        (..., N) in [-1, 1].

    Raises:
        ValueError: If the shapes differ or the last dimension is not 4.
        TypeError: If a dtype is not floating.

    Examples:
        >>> a = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
        >>> paired_generalized_box_iou(a, a + torch.tensor([3.0, 0.0, 3.0, 0.0])).tolist()
        [-0.5]
    """
    validate_same_shape("boxes1", boxes1.shape, "boxes2", boxes2.shape, "(..., N, 4)")
    return _overlap(*_validated_pair(boxes1, boxes2), generalized=True)


def _validated_pair(boxes1: Tensor, boxes2: Tensor) -> list[Tensor]:
    validate_boxes("boxes1", boxes1)
    validate_boxes("boxes2", boxes2)
    validate_same_device("boxes1", boxes1, boxes2=boxes2)
    return shared_precision(boxes1, boxes2)


def _overlap(boxes1: Tensor, boxes2: Tensor, *, generalized: bool) -> Tensor:
    """(G)IoU of broadcast xyxy boxes, coordinate by coordinate so that no (..., N, M, 2) tensor is formed."""
    left1, top1, right1, bottom1 = boxes1.unbind(-1)
    left2, top2, right2, bottom2 = boxes2.unbind(-1)
    inner_w = torch.minimum(right1, right2) - torch.maximum(left1, left2)
    inner_h = torch.minimum(bottom1, bottom2) - torch.maximum(top1, top2)
    hull_w = torch.maximum(right1, right2) - torch.minimum(left1, left2)
    hull_h = torch.maximum(bottom1, bottom2) - torch.minimum(top1, top2)
    coincide = (inner_w == hull_w) & (inner_h == hull_h)
    intersection = inner_w.clamp(min=0) * inner_h.clamp(min=0)
    union = box_area(boxes1) + box_area(boxes2) - intersection
    iou = _ratio(intersection, union, coincide)
    if not generalized:
        return iou
    hull = hull_w.clamp(min=0) * hull_h.clamp(min=0)
    return iou - 1 + _ratio(union, hull, coincide)


def _ratio(part: Tensor, whole: Tensor, coincide: Tensor) -> Tensor:
    """`part / whole`; where the boxes coincide 1, and where `whole` is no area at all 0, with no gradient.

    An area below eps² is lost in the rounding of coordinates of order 1, and its gradient would overflow. Where the
    boxes coincide both terms of the gradient cancel, in exact arithmetic.
    """
    settled = coincide | (whole <= torch.finfo(whole.dtype).eps ** 2)
    return torch.where(settled, coincide.to(whole.dtype), part / torch.where(settled, 1.0, whole))


def touched_cells(start: Tensor, stop: Tensor, number: int) -> Tensor:
    """Which of `number` equal parts of [0, 1] an interval (...) covers a part of -> (..., number)."""
    edges = torch.arange(number + 1, device=start.device, dtype=start.dtype) / number
    return (start.unsqueeze(-1) < edges[1:]) & (stop.unsqueeze(-1) > edges[:-1])
