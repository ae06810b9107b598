"""What a person looks at when distillation does not help: plain tensors, to be logged now and then.

A value is of one stage: tensors (L, B, N) give (L,), tensors (B, N) a scalar, over the images of this process. Where
there is nothing to average it is NaN.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from detr_kd_losses._reduction import masked_sum, sum_last
from detr_kd_losses._validation import (
    validate_boxes,
    validate_dtype,
    validate_floating,
    validate_ndim,
    validate_same_shape,
)
from detr_kd_losses.boxes import box_cxcywh_to_xyxy, paired_box_iou
from detr_kd_losses.pairs import gather_partners, validate_assignment

__all__ = [
    "LossMagnitude",
    "assignment_instability",
    "loss_magnitudes",
    "matched_iou",
    "mean_quality",
    "positives_per_image",
]


class LossMagnitude(NamedTuple):
    """Size of a loss term and of its gradient, and both relative to the task's loss.

    Attributes:
        value: Scalar.
        gradient_norm: Scalar, Euclidean, over all parameters together.
        relative_value: Scalar, `value` over that of the task's loss.
        relative_gradient_norm: Scalar, `gradient_norm` over that of the task's loss.

    Examples:
        >>> LossMagnitude(*torch.tensor([1.5, 0.25, 0.5, 0.125])).relative_gradient_norm.item()
        0.125
    """

    value: Tensor
    gradient_norm: Tensor
    relative_value: Tensor
    relative_gradient_norm: Tensor


def loss_magnitudes(
    terms: Mapping[str, Tensor], task_loss: Tensor, parameters: Iterable[Tensor]
) -> dict[str, LossMagnitude]:
    """How strongly each term pulls at the parameters, beside the task's own loss.

    A term whose gradient is a hundredth of the task's does nothing, one of a hundred times drowns it, whatever their
    values are. This costs a backward pass for each term; the graph is kept, so that training may go on with it.

    Args:
        terms: Weighted terms by name, as :class:`DETRDistillationLoss` returns them.
        task_loss: Scalar, the student's own loss.
        parameters: Those to differentiate by: all of the student, or of a layer that all terms share, which is cheaper.

    Returns:
        A :class:`LossMagnitude` for each term. The norm is 0 where a term does not depend on the parameters.

    Raises:
        ValueError: If there is no parameter that requires a gradient.

    Examples:
        >>> weight = torch.ones(3, requires_grad=True)
        >>> terms = {"loss_kd_class": 0.5 * weight.sum()}
        >>> magnitude = loss_magnitudes(terms, 2 * weight.sum(), [weight])["loss_kd_class"]
        >>> magnitude.value.item(), magnitude.relative_value.item(), magnitude.relative_gradient_norm.item()
        (1.5, 0.25, 0.25)
    """
    learned = learned_among(parameters)
    task_value, task_norm = task_loss.detach(), gradient_norm(task_loss, learned)
    magnitudes = {}
    for name, term in terms.items():
        value, norm = term.detach(), gradient_norm(term, learned)
        magnitudes[name] = LossMagnitude(value, norm, value / task_value, norm / task_norm)
    return magnitudes


def matched_iou(student_boxes: Tensor, partner_boxes: Tensor, assignment: Tensor) -> Tensor:
    """Mean IoU of the matched pairs: how well the student's boxes agree with their teacher queries, or targets.

    Args:
        student_boxes: (L, B, N, 4) or (B, N, 4), cxcywh in [0, 1].
        partner_boxes: (L, B, M, 4) or (B, M, 4), of the teacher or the targets.
        assignment: (L, B, N) or (B, N) int64: the partner of each query, -1 = none.

    Returns:
        (L,) or a scalar.

    Raises:
        ValueError: If shapes or devices do not fit.
        TypeError: If a dtype does not fit.

    Examples:
        >>> boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.2], [0.2, 0.2, 0.1, 0.1]]])
        >>> matched_iou(boxes, boxes, torch.tensor([[0, -1]])).round(decimals=4)
        tensor(1.)
    """
    validate_boxes("student_boxes", student_boxes)
    validate_boxes("partner_boxes", partner_boxes)
    validate_assignment("assignment", assignment, "student_boxes", student_boxes, partner_boxes.shape[-2])
    partners = partner_boxes.detach().expand(*assignment.shape[:-1], *partner_boxes.shape[-2:])
    partners = gather_partners(partners, assignment)
    iou = paired_box_iou(box_cxcywh_to_xyxy(student_boxes.detach()), box_cxcywh_to_xyxy(partners))
    return _mean(iou, assignment >= 0)


def mean_quality(quality: Tensor, teacher_assignment: Tensor) -> Tensor:
    """Mean quality of the teacher queries that have a target: near 0, the teacher has little to teach.

    Args:
        quality: (L, B, M) or (B, M), from :func:`query_quality`.
        teacher_assignment: (L, B, M) or (B, M) int64: the target of each teacher query, -1 = none.

    Returns:
        (L,) or a scalar.

    Raises:
        ValueError: If the shapes differ.
        TypeError: If a dtype does not fit.

    Examples:
        >>> mean_quality(torch.tensor([[0.5, 0.25, 0.0]]), torch.tensor([[1, 0, -1]]))
        tensor(0.3750)
    """
    validate_floating("quality", quality)
    validate_dtype("teacher_assignment", teacher_assignment, torch.int64)
    validate_same_shape("quality", quality.shape, "teacher_assignment", teacher_assignment.shape, "(..., M)")
    return _mean(quality.detach(), teacher_assignment >= 0)


def positives_per_image(assignment: Tensor) -> Tensor:
    """Mean number of queries of an image that have a partner.

    Args:
        assignment: (L, B, N) or (B, N) int64, -1 = none.

    Returns:
        (L,) or a scalar, float32.

    Raises:
        ValueError: If `assignment` has no batch dimension.
        TypeError: If its dtype is not int64.

    Examples:
        >>> positives_per_image(torch.tensor([[0, 1, -1], [-1, 2, -1]]))
        tensor(1.5000)
    """
    validate_dtype("assignment", assignment, torch.int64)
    validate_ndim("assignment", assignment, 2, "(..., B, N)")
    return (assignment >= 0).sum(-1).float().mean(-1)


def assignment_instability(before: Tensor, after: Tensor) -> Tensor:
    """Share of the matched queries whose partner is another one afterwards.

    Between two layers, or between two moments of the training for the same images: a matching that keeps changing
    gives a query contradictory targets. A query counts where it has a partner before or after; gaining or losing one
    is a change.

    Args:
        before: (L, B, N) or (B, N) int64: the partner of each query, -1 = none.
        after: As `before`.

    Returns:
        (L,) or a scalar, in [0, 1].

    Raises:
        ValueError: If the shapes differ.
        TypeError: If a dtype is not int64.

    Examples:
        Between the layers of one matching (L, B, N):

        >>> assignment = torch.tensor([[[0, 1, -1]], [[0, -1, 1]], [[0, -1, 1]]])
        >>> assignment_instability(assignment[:-1], assignment[1:])
        tensor([0.6667, 0.0000])

    References:
        Li et al., "DN-DETR", CVPR 2022, arXiv:2203.01305, which counts the changes.
        Chang et al., "DETRDistill", ICCV 2023, arXiv:2211.10156, Fig. 7.
    """
    validate_dtype("before", before, torch.int64)
    validate_dtype("after", after, torch.int64)
    validate_same_shape("before", before.shape, "after", after.shape, "(..., N)")
    return _mean((before != after).float(), (before >= 0) | (after >= 0))


def learned_among(parameters: Iterable[Tensor]) -> list[Tensor]:
    """The parameters that require a gradient; raise if there is none."""
    learned = [parameter for parameter in parameters if parameter.requires_grad]
    if not learned:
        msg = "`parameters` must have at least one that requires a gradient, got none"
        raise ValueError(msg)
    return learned


def gradient_norm(loss: Tensor, parameters: list[Tensor]) -> Tensor:
    """Norm of the gradient over all parameters; 0 for a loss that does not depend on them."""
    if not loss.requires_grad:
        return torch.zeros_like(loss)
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    norms = [torch.linalg.vector_norm(gradient) for gradient in gradients if gradient is not None]
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros_like(loss)


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of `values` (..., B, N) where `mask`; NaN where there is none."""
    return masked_sum(values, mask, 2) / sum_last(mask, 2)
