"""Distillation of masks: which cells of an image a query takes for its object."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from detr_kd_losses._blocks import recompute_queries
from detr_kd_losses._options import OptionModule, Rules, boolean, validate_options
from detr_kd_losses._precision import shared_dtype
from detr_kd_losses._validation import (
    validate_boxes,
    validate_floating,
    validate_positive,
    validate_same_device,
    validate_same_shape,
)
from detr_kd_losses.boxes import box_cxcywh_to_xyxy, touched_cells
from detr_kd_losses.pairs import (
    gather_partners,
    mean_over_pairs,
    validate_assignment,
    validate_batched,
    validate_teacher_weight,
    weigh_pairs,
)

__all__ = ["MaskDistillationLoss", "mask_distillation_loss"]

RULES: Rules = {"temperature": validate_positive, "sync_normalizer": boolean}


def mask_distillation_loss(
    student_masks: Tensor,
    teacher_masks: Tensor,
    assignment: Tensor,
    *,
    boxes: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    temperature: float = 1.0,
    sync_normalizer: bool = True,
) -> Tensor:
    r"""Distil the mask of each teacher query into the student query matched to it.

    .. math::
        L = \sum_l \frac{1}{\sum w_m} \sum_{(n,m)} w_m \frac{T^2}{|C_m|} \sum_{x \in C_m} KL(p_{mx} \| q_{nx})

    over the decoder layers `l`, their pairs and the cells `C` of the student's mask: all of them, or those that the
    teacher's box touches, as in :func:`box_mask`. KL is that of the scores, sigmoids of the masks / T. The teacher's
    masks are resized bilinearly, as they are, to the student's size. Student queries without a partner have no part. A
    layer is normalised over its batch, then layers are added; a layer without pairs gives zero with a graph. No
    gradient reaches the teacher. Half-precision inputs are computed in float32.

    Args:
        student_masks: (L, B, N, H, W) or (B, N, H, W), raw.
        teacher_masks: (L, B, M, H', W') or (B, M, H', W'), raw.
        assignment: (L, B, N) or (B, N) int64: the teacher query of each student query, -1 = none.
        boxes: (L, B, M, 4) or (B, M, 4), cxcywh in [0, 1], of the teacher: only their cells count. A box that touches
            none has a distance of 0. None: all cells.
        teacher_weight: (L, B, M) or (B, M), not negative: how much each teacher query counts. None: all the same.
        temperature: T, the divisor of both masks.
        sync_normalizer: Whether the numbers of pairs, or the sums of their weights, are averaged over replicas when
            torch.distributed is initialised and gradients are enabled.

    Returns:
        A scalar.

    Raises:
        ValueError: If shapes, devices or options do not fit.
        TypeError: If a dtype does not fit.

    Examples:
        >>> masks, assignment = torch.randn(6, 2, 5, 8, 8), torch.arange(5).expand(6, 2, 5)
        >>> mask_distillation_loss(masks, masks, assignment)
        tensor(0.)
        >>> mask_distillation_loss(masks, torch.randn(6, 2, 5, 4, 4), assignment, boxes=torch.rand(6, 2, 5, 4)) > 0
        tensor(True)

    References:
        He et al., "Mask R-CNN", ICCV 2017, arXiv:1703.06870, for a mask inside its box.
    """
    validate_options(RULES, temperature=temperature, sync_normalizer=sync_normalizer)
    _validate_masks(student_masks, teacher_masks)
    validate_assignment("assignment", assignment, "student_masks", student_masks[..., 0], teacher_masks.shape[-3])
    if teacher_weight is not None:
        validate_teacher_weight(teacher_weight, "teacher_masks", teacher_masks, trailing=2)
    teachers = [teacher_masks.detach()]
    if boxes is not None:
        validate_boxes("boxes", boxes)
        validate_same_shape("boxes", boxes.shape[:-1], "teacher_masks", teacher_masks.shape[:-2], "(..., M)")
        validate_same_device("teacher_masks", teacher_masks, boxes=boxes)
        teachers.append(boxes.detach())
    assignment, weight = weigh_pairs(assignment, teacher_weight, shared_dtype(student_masks, teacher_masks))
    compare = partial(_compare, temperature=temperature)
    divergence = recompute_queries(compare, assignment, [student_masks], teachers) * temperature**2
    return mean_over_pairs(divergence, assignment >= 0, weight, sync=sync_normalizer)


def _validate_masks(student_masks: Tensor, teacher_masks: Tensor) -> None:
    """Raise unless the masks (..., N, H, W) and (..., M, H', W') are of the same images."""
    for name, masks in (("student_masks", student_masks), ("teacher_masks", teacher_masks)):
        validate_floating(name, masks)
        validate_batched(name, masks, "H, W")
        if not masks.shape[-2:].numel():
            msg = f"`{name}` must have at least one cell, got {tuple(masks.shape)}"
            raise ValueError(msg)
    batch = student_masks.shape[:-3]
    validate_same_shape("student_masks", batch, "teacher_masks", teacher_masks.shape[:-3], "(L, B)")
    validate_same_device("student_masks", student_masks, teacher_masks=teacher_masks)


def _compare(
    assignment: Tensor, student: Tensor, teacher: Tensor, boxes: Tensor | None = None, *, temperature: float
) -> Tensor:
    """The mean divergence of each student query (..., N) from its partner, over its cells."""
    size, matched = student.shape[-2:], (assignment >= 0)[..., None, None]
    dtype = shared_dtype(student, teacher)
    part, number = matched, student.new_tensor(size.numel(), dtype=dtype)
    if boxes is not None:
        own = gather_partners(boxes, assignment).where(matched.squeeze(-1), 0.0).to(dtype)
        left, top, right, bottom = box_cxcywh_to_xyxy(own).unbind(-1)
        rows, columns = touched_cells(top, bottom, size[0]), touched_cells(left, right, size[1])
        part = matched & rows.unsqueeze(-1) & columns.unsqueeze(-2)
        number = (rows.sum(-1) * columns.sum(-1)).clamp(min=1).to(dtype)
    with torch.no_grad():
        # Gathered before they are resized: nothing is of the size of all the teacher's masks at the student's.
        taught = gather_partners(teacher.flatten(-2), assignment).reshape(*assignment.shape, *teacher.shape[-2:])
        taught = _resize(_finite(taught.where(matched, 0.0).to(dtype)), size).where(part, 0.0)
        taught = _finite(taught / temperature)
        scores = taught.sigmoid()
        entropy = F.binary_cross_entropy_with_logits(taught, scores, reduction="none").sum((-2, -1))
        del taught
    own_masks = _finite(student.where(part, 0.0).to(dtype) / temperature)
    # The same function of both, so that equal masks have no distance, to the last bit.
    cross_entropy = F.binary_cross_entropy_with_logits(own_masks, scores, reduction="none").sum((-2, -1))
    return (cross_entropy - entropy) / number


def _finite(masks: Tensor) -> Tensor:
    """Infinite logits as the largest numbers: nothing, times an infinite logit, is not a number; here it is 0."""
    largest = torch.finfo(masks.dtype).max / 2  # half, as a resized one is a sum of rounded parts
    return masks.clamp(-largest, largest)


def _resize(masks: Tensor, size: tuple[int, ...]) -> Tensor:
    """Bilinear, (..., N, H', W') -> (..., N, H, W)."""
    if masks.shape[-2:] == size:
        return masks
    flat = masks.reshape(-1, 1, *masks.shape[-2:])
    if not len(flat):
        return masks.new_zeros((*masks.shape[:-2], *size))
    resized = F.interpolate(flat, size=size, mode="bilinear", align_corners=False)
    return resized.reshape(*masks.shape[:-2], *size)


class MaskDistillationLoss(OptionModule):
    """Module form of :func:`mask_distillation_loss`, with the same options and defaults.

    Examples:
        >>> loss = MaskDistillationLoss(temperature=2.0)
        >>> masks = torch.randn(2, 5, 8, 8)
        >>> loss(masks, masks, torch.arange(5).expand(2, 5))
        tensor(0.)
    """

    rules = RULES

    def __init__(self, *, temperature: float = 1.0, sync_normalizer: bool = True) -> None:
        super().__init__(temperature=temperature, sync_normalizer=sync_normalizer)

    def forward(
        self,
        student_masks: Tensor,
        teacher_masks: Tensor,
        assignment: Tensor,
        *,
        boxes: Tensor | None = None,
        teacher_weight: Tensor | None = None,
    ) -> Tensor:
        """See :func:`mask_distillation_loss`."""
        return mask_distillation_loss(
            student_masks, teacher_masks, assignment, boxes=boxes, teacher_weight=teacher_weight, **self.call_options
        )
