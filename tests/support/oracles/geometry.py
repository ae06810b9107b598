"""Boxes (cxcywh), and what makes an assignment valid and optimal."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment

from .autodiff import Scalar, maximum, minimum, value

__all__ = [
    "box_iou",
    "check_assignment",
    "check_teacher_assignment",
    "generalized_box_iou",
    "l1_distance",
    "match_through_targets",
    "optimal_cost",
    "pairwise",
    "rows_of_positives",
]


def over_images(signature: str) -> Callable[[Callable], Callable[..., np.ndarray]]:
    """Spread a function of one image over leading dimensions, which broadcast; keywords pass through."""

    def decorate(function: Callable) -> Callable[..., np.ndarray]:
        @functools.wraps(function)
        def batched(*arrays: np.ndarray, **options: object) -> np.ndarray:
            one_image = functools.partial(function, **options)
            return np.vectorize(one_image, otypes=[np.float64], signature=signature)(*arrays)

        return batched

    return decorate


def pairwise(function: Callable[..., float], rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Return the matrix function(row, column)."""
    table = [[function(row, column) for column in columns] for row in rows]
    return np.array(table, dtype=np.float64).reshape(len(rows), len(columns))


def corners(box: Sequence[Scalar]) -> tuple[Scalar, ...]:
    """Convert one box from cxcywh to xyxy."""
    cx, cy, w, h = box
    return cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2


def l1_distance(box1: Sequence[Scalar], box2: Sequence[Scalar]) -> Scalar:
    """Return |b1 - b2|_1 in cxcywh."""
    return sum(abs(a - b) for a, b in zip(box1, box2, strict=True))


def _ratios(box1: Sequence[Scalar], box2: Sequence[Scalar]) -> tuple[Scalar, Scalar]:
    """Return intersection / union and union / hull; 0 / 0 is 1 where the two boxes coincide, else 0."""
    left1, top1, right1, bottom1 = corners(box1)
    left2, top2, right2, bottom2 = corners(box2)
    intersection = maximum(minimum(right1, right2) - maximum(left1, left2), 0.0) * maximum(
        minimum(bottom1, bottom2) - maximum(top1, top2), 0.0
    )
    area1 = (right1 - left1) * (bottom1 - top1)
    area2 = (right2 - left2) * (bottom2 - top2)
    union = area1 + area2 - intersection
    hull_width = maximum(right1, right2) - minimum(left1, left2)
    hull_height = maximum(bottom1, bottom2) - minimum(top1, top2)
    hull = hull_width * hull_height
    coincide = float(all(value(a) == value(b) for a, b in zip(box1, box2, strict=True)))
    iou = intersection / union if value(union) else coincide
    fill = union / hull if value(hull) else coincide
    return iou, fill


def box_iou(box1: Sequence[Scalar], box2: Sequence[Scalar]) -> Scalar:
    """Return intersection / union of two boxes."""
    return _ratios(box1, box2)[0]


def generalized_box_iou(box1: Sequence[Scalar], box2: Sequence[Scalar]) -> Scalar:
    """Return IoU - (hull - union) / hull = IoU + union / hull - 1 of two boxes.

    The second form extends to boxes without area: 1 for two that coincide, -1 for any others.
    """
    iou, fill = _ratios(box1, box2)
    return iou + fill - 1.0


def _optimal_entries(cost: np.ndarray) -> np.ndarray:
    """Return the entries of the cost (N, M) that an optimal assignment uses."""
    finite = np.isfinite(cost)
    # Avoiding one more bad entry must always pay: it is worth more than all finite pairs can differ by.
    span = np.ptp(cost[finite]) if finite.any() else 0.0
    bad = cost[finite].max(initial=0.0) + (span + 1.0) * (min(cost.shape) + 1)
    return cost[linear_sum_assignment(np.where(finite, cost, bad))]


def _total(entries: np.ndarray) -> tuple[int, float]:
    finite = np.isfinite(entries)
    return int((~finite).sum()), float(entries[finite].sum())


def optimal_cost(
    cost: np.ndarray, row_mask: np.ndarray | None = None, column_mask: np.ndarray | None = None
) -> tuple[int, float]:
    """Return the optimum of one (N, M) problem: non-finite pairs it cannot avoid, cost of the finite pairs.

    As many rows and columns as possible are paired. Fewest non-finite pairs come first, then the lowest cost.
    """
    cost = np.asarray(cost, dtype=np.float64)
    rows = np.ones(cost.shape[0], dtype=bool) if row_mask is None else row_mask
    columns = np.ones(cost.shape[1], dtype=bool) if column_mask is None else column_mask
    return _total(_optimal_entries(cost[rows][:, columns]))


def _check_problem(
    assignment: np.ndarray, cost: np.ndarray, rows: np.ndarray, columns: np.ndarray, rtol: float, resolution: float
) -> None:
    matched = np.flatnonzero(assignment != -1)
    partners = assignment[matched]
    count = min(rows.sum(), columns.sum())
    assert len(matched) == count, f"{len(matched)} pairs instead of {count}: {assignment}"
    assert ((partners >= 0) & (partners < len(columns))).all(), f"partner out of range: {assignment}"
    assert len(set(partners.tolist())) == count, f"not one-to-one: {assignment}"
    assert rows[matched].all(), f"a masked row is matched: {assignment}"
    assert columns[partners].all(), f"a masked column is matched: {assignment}"
    used, best = cost[matched, partners], _optimal_entries(cost[rows][:, columns])
    (non_finite, total), (fewest, optimum) = _total(used), _total(best)
    assert non_finite == fewest, f"{non_finite} non-finite pairs instead of {fewest}"
    rounding = rtol * (_total(abs(used))[1] + _total(abs(best))[1])
    assert total <= optimum + rounding + resolution * count, f"cost {total} instead of {optimum}"


def check_assignment(
    assignment: np.ndarray,
    cost: np.ndarray,
    row_mask: np.ndarray | None = None,
    column_mask: np.ndarray | None = None,
    *,
    rtol: float = 1e-12,
    resolution: float = 0.0,
) -> None:
    """Raise AssertionError unless the assignment (..., N) is complete, one-to-one, masked and optimal.

    The optimum is that of the float64 cost (..., N, M); rtol, relative to the magnitude of the costs used,
    allows for the rounding of the arithmetic that made the assignment. `resolution` is what each pair may cost
    beyond the optimum, for a solver in whole numbers. Masks broadcast.
    """
    cost = np.asarray(cost, dtype=np.float64)
    *lead, n, m = cost.shape
    assignment = np.asarray(assignment)
    assert assignment.shape == (*lead, n), f"shape {assignment.shape} instead of {(*lead, n)}"
    rows = np.broadcast_to(True if row_mask is None else row_mask, (*lead, n))
    columns = np.broadcast_to(True if column_mask is None else column_mask, (*lead, m))
    for problem in np.ndindex(*lead):
        _check_problem(assignment[problem], cost[problem], rows[problem], columns[problem], rtol, resolution)


def match_through_targets(
    student_assignment: np.ndarray, teacher_assignment: np.ndarray, num_targets: int
) -> np.ndarray:
    """Return the teacher query (..., N) that has the same of the `num_targets` as the student query, else -1."""
    pairs = np.full(student_assignment.shape, -1)
    for entry in np.ndindex(*student_assignment.shape):
        for m, target in enumerate(teacher_assignment[entry[:-1]]):
            if target in range(num_targets) and target == student_assignment[entry]:
                pairs[entry] = m
    return pairs


def rows_of_positives(assignment: np.ndarray, teacher_positive: np.ndarray) -> np.ndarray:
    """Return the mask (..., N) of the student queries whose partner is a positive teacher query."""
    teacher_positive = np.broadcast_to(teacher_positive, (*assignment.shape[:-1], teacher_positive.shape[-1]))
    taken = np.zeros(assignment.shape, dtype=bool)
    for entry in np.ndindex(*assignment.shape):
        partner = assignment[entry]
        taken[entry] = partner != -1 and teacher_positive[(*entry[:-1], partner)]
    return taken


def check_teacher_assignment(
    assignment: np.ndarray,
    cost: np.ndarray,
    location_cost: np.ndarray,
    teacher_positive: np.ndarray | None = None,
    *,
    rtol: float = 1e-12,
) -> None:
    """Raise AssertionError unless an assignment (..., N) of teacher to student queries solves both phases.

    Phase 1: positives against all student queries under `cost`. Phase 2: negatives against the queries that
    phase 1 left, under `location_cost`. Without `teacher_positive` one joint problem under `cost`.
    """
    if teacher_positive is None:
        check_assignment(assignment, cost, rtol=rtol)
        return
    taken = rows_of_positives(assignment, teacher_positive)
    check_assignment(np.where(taken, assignment, -1), cost, None, teacher_positive, rtol=rtol)
    check_assignment(np.where(taken, -1, assignment), location_cost, ~taken, ~teacher_positive, rtol=rtol)
