"""Partners: of what an assignment makes, in either direction, and what every loss over matched pairs needs of them."""

from __future__ import annotations

import torch
from torch import Tensor

from detr_kd_losses._labels import validate_partners
from detr_kd_losses._reduction import masked_sum, replica_means, replica_weight, sum_last
from detr_kd_losses._validation import (
    validate_batch,
    validate_dtype,
    validate_floating,
    validate_ndim,
    validate_not_negative,
    validate_same_device,
    validate_same_shape,
    validate_type,
)
from detr_kd_losses.boxes import box_cxcywh_to_xyxy, paired_generalized_box_iou

__all__ = ["assignment_to_indices", "invert_assignment", "match_through_targets"]


def validate_assignment(
    name: str, assignment: Tensor, predictions_name: str, predictions: Tensor, num_partners: int
) -> None:
    """Raise unless `assignment` is int64, has the dimensions (..., N) of `predictions` and partners that exist."""
    validate_dtype(name, assignment, torch.int64)
    validate_same_shape(name, assignment.shape, predictions_name, predictions.shape[:-1], "(..., N)")
    validate_same_device(predictions_name, predictions, **{name: assignment})
    validate_partners(name, assignment, num_partners)


def validate_teacher_positive(teacher_positive: Tensor, teacher_logits: Tensor) -> None:
    """Raise unless `teacher_positive` is bool and has the dimensions (..., M) of `teacher_logits` (..., M, C)."""
    validate_dtype("teacher_positive", teacher_positive, torch.bool)
    validate_same_shape(
        "teacher_positive", teacher_positive.shape, "teacher_logits", teacher_logits.shape[:-1], "(..., M)"
    )
    validate_same_device("teacher_logits", teacher_logits, teacher_positive=teacher_positive)


def validate_teacher_weight(teacher_weight: Tensor | None, name: str, teacher: Tensor, trailing: int = 1) -> None:
    """Raise unless `teacher_weight`, if given, is floating and (L, B, M) or (B, M), as the argument `name`."""
    if teacher_weight is None:
        return
    validate_floating("teacher_weight", teacher_weight)
    shape, queries = tuple(teacher_weight.shape), tuple(teacher.shape[: teacher.ndim - trailing])
    if shape not in (queries, queries[-2:]):
        msg = f"`teacher_weight` must have the dimensions (L, B, M) or (B, M) of `{name}` {queries}, got {shape}"
        raise ValueError(msg)
    validate_same_device(name, teacher, teacher_weight=teacher_weight)


def validated_mask(name: str, mask: Tensor, other: str, predictions: Tensor) -> Tensor:
    """A mask of queries (..., N), of the leading dimensions of `predictions` (..., N, K)."""
    validate_dtype(name, mask, torch.bool)
    validate_ndim(name, mask, 1, "(..., N)")
    validate_same_shape(name, mask.shape[-1:], other, predictions.shape[-2:-1], "(N,)")
    validate_batch(name, mask.shape[:-1], other, predictions.shape[:-2])
    validate_same_device(other, predictions, **{name: mask})
    return mask.expand(predictions.shape[:-1])


def validate_batched(name: str, tensor: Tensor, trailing: str = "C") -> None:
    """Raise unless `tensor` has queries, a batch dimension, and perhaps stages before it; `trailing` names the rest."""
    if tensor.ndim - len(trailing.split(",")) not in (2, 3):
        msg = f"`{name}` must have shape (L, B, N, {trailing}) or (B, N, {trailing}), got {tuple(tensor.shape)}"
        raise ValueError(msg)


def gather_partners(values: Tensor, assignment: Tensor) -> Tensor:
    """`values` (..., M) or (..., M, K) in the order of `assignment` (..., N); unmatched queries get entry 0.

    Without partners at all (M = 0) they get zeros.
    """
    trailing = values.shape[assignment.ndim :]
    if values.shape[assignment.ndim - 1] == 0:
        return values.new_zeros((*assignment.shape, *trailing))
    index = assignment.clamp(min=0)
    if trailing:
        index = index.unsqueeze(-1).expand(*assignment.shape, *trailing)
    return values.gather(assignment.ndim - 1, index)


def weight_of_partners(weight: Tensor, assignment: Tensor) -> Tensor:
    """The `weight` (..., M), perhaps without stages, of the partner of each query (..., N); 0 of unmatched ones."""
    weight = weight.expand(*assignment.shape[:-1], -1)
    return gather_partners(weight, assignment).where(assignment >= 0, 0.0)


def weigh_pairs(assignment: Tensor, teacher_weight: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """`assignment` (..., N) without the partners of weight 0, and the weight of each partner (..., N), if there are."""
    if teacher_weight is None:
        return assignment, None
    weight = weight_of_partners(teacher_weight.detach().to(dtype), assignment)
    return assignment.where(weight != 0, -1), weight


def count_pairs(pairs: Tensor, dtype: torch.dtype, weight: Tensor | None, *, sync: bool) -> Tensor:
    """What sums over the `pairs` (..., B, N) of each layer are divided by: their number, or all their weight."""
    if weight is None:
        (counts,) = replica_means(sum_last(pairs.to(dtype), 2), sync=sync)
        return counts
    return replica_weight(masked_sum(weight, pairs, 2), sync=sync)


def mean_over_pairs(term: Tensor, pairs: Tensor, weight: Tensor | None, *, sync: bool) -> Tensor:
    """Weighted mean of `term` (..., B, N) over the `pairs` of each layer, layers added."""
    counts = count_pairs(pairs, term.dtype, weight, sync=sync)
    return (masked_sum(term if weight is None else weight * term, pairs, 2) / counts).sum()


def box_terms(boxes: Tensor, partners: Tensor) -> tuple[Tensor, Tensor]:
    """L1 distance and 1 - GIoU of each box (..., N, 4) and its partner, cxcywh -> two tensors (..., N)."""
    giou = paired_generalized_box_iou(box_cxcywh_to_xyxy(boxes), box_cxcywh_to_xyxy(partners))
    return (boxes - partners).abs().sum(-1), 1 - giou


def invert_assignment(assignment: Tensor, num_columns: int) -> Tensor:
    """Row of each column, from the column of each row.

    Args:
        assignment: (..., N) int64, entries in [-1, `num_columns`), none twice but -1.
        num_columns: T, the number of columns.

    Returns:
        (..., T) int64: the row of each column, -1 = none.

    Raises:
        ValueError: If an entry is no column, where it can be read without waiting for a device.
        TypeError: If `assignment` is not int64.

    Examples:
        >>> invert_assignment(torch.tensor([2, -1, 0]), 4).tolist()
        [2, -1, 0, -1]
    """
    validate_dtype("assignment", assignment, torch.int64)
    validate_ndim("assignment", assignment, 1, "(..., N)")
    validate_type("num_columns", num_columns, (int, torch.SymInt), "a whole number")
    validate_partners("assignment", assignment, num_columns)
    rows = torch.arange(assignment.shape[-1], device=assignment.device).expand(assignment.shape)
    # Unassigned rows write to a slot of their own, which is cut off.
    slots = torch.where(assignment < 0, num_columns, assignment)
    inverse = assignment.new_full((*assignment.shape[:-1], num_columns + 1), -1)
    return inverse.scatter(-1, slots, rows)[..., :-1]


def match_through_targets(student_assignment: Tensor, teacher_assignment: Tensor, num_targets: int) -> Tensor:
    """Pair queries of student and teacher that have the same target.

    A student query is taught the object that its own detection loss gives it, and no cost between student and teacher
    is computed: both assignments are at hand or, from :func:`match_targets`, small problems.

    Args:
        student_assignment: (..., N) int64: the target of each student query, -1 = none; of targets none twice.
        teacher_assignment: (..., M) int64: the target of each teacher query, -1 = none, with the same leading
            dimensions: in the student's depth (:func:`select_stages`).
        num_targets: T, the number of targets with their padding.

    Returns:
        (..., N) int64: the teacher query that has the target of the student query, -1 = none.

    Raises:
        ValueError: If shapes or devices do not fit, or `num_targets` is negative.
        TypeError: If an assignment is not int64, or `num_targets` not a whole number.

    Examples:
        >>> match_through_targets(torch.tensor([-1, 2, 0]), torch.tensor([0, -1, 1, 2]), 3).tolist()
        [-1, 3, 0]
    """
    validate_dtype("student_assignment", student_assignment, torch.int64)
    validate_ndim("student_assignment", student_assignment, 1, "(..., N)")
    validate_dtype("teacher_assignment", teacher_assignment, torch.int64)
    validate_ndim("teacher_assignment", teacher_assignment, 1, "(..., M)")
    batches = student_assignment.shape[:-1], "teacher_assignment", teacher_assignment.shape[:-1]
    validate_same_shape("student_assignment", *batches, "(...)")
    validate_same_device("student_assignment", student_assignment, teacher_assignment=teacher_assignment)
    validate_type("num_targets", num_targets, (int, torch.SymInt), "a whole number")
    validate_not_negative("num_targets", num_targets)
    validate_partners("student_assignment", student_assignment, num_targets)
    validate_partners("teacher_assignment", teacher_assignment, num_targets)
    partner = gather_partners(invert_assignment(teacher_assignment, num_targets), student_assignment)
    return partner.where(student_assignment >= 0, -1)


def assignment_to_indices(assignment: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The index lists that DETR criterions take, image by image. Reads the device: for adapters.

    Args:
        assignment: (B, N) int64, -1 = none.

    Returns:
        For each image the matched rows in ascending order and their columns, both int64.

    Raises:
        ValueError: If `assignment` is not (B, N).
        TypeError: If it is not int64.

    Examples:
        >>> rows, columns = assignment_to_indices(torch.tensor([[2, -1, 0]]))[0]
        >>> rows.tolist(), columns.tolist()
        ([0, 2], [2, 0])
    """
    validate_dtype("assignment", assignment, torch.int64)
    if assignment.ndim != 2:
        msg = f"`assignment` must have shape (B, N), got {tuple(assignment.shape)}"
        raise ValueError(msg)
    pairs = []
    for image in assignment:
        rows = (image >= 0).nonzero().squeeze(-1)
        pairs.append((rows, image[rows]))
    return pairs
