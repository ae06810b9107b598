"""The laws of assignment solvers and matchers, for any callable with the signature of ours.

    >>> import detr_kd_losses as dkl
    >>> ASSIGNMENT_LAWS["optimal"](dkl.linear_sum_assignment, max_examples=5)
    >>> TARGET_MATCHING_LAWS["optimal"](dkl.match_targets, max_examples=5)

Assignments are compared by their cost in float64, never by index: which of several optima a solver finds is its own
business. Matchers are held to :func:`detection_cost` and :func:`distillation_cost` at their defaults.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from detr_kd_losses.costs import box_cost, detection_cost, distillation_cost
from detr_kd_losses.testing.arguments import Arguments
from detr_kd_losses.testing.law import Function, law, laws_by_name
from detr_kd_losses.testing.makers import (
    cost_arguments,
    detection_arguments,
    distillation_arguments,
    planted_arguments,
)
from detr_kd_losses.testing.requirements import require
from detr_kd_losses.testing.signatures import COSTS, TARGET_MATCHING, TEACHER_MATCHING

__all__ = [
    "ASSIGNMENT_LAWS",
    "TARGET_MATCHING_LAWS",
    "TEACHER_MATCHING_LAWS",
    "check_optimal",
    "pair_costs",
]

# What a solver may lose on each pair, as a share of the range of the finite costs: a fixed-point solver rounds to it.
RESOLUTION = 2.0**-26
# What may spoil an image: no number, an overflow, a height below 0.
POISONS = (float("nan"), float("inf"), -float("inf"), -1.0)


def pair_costs(cost: Tensor, assignment: Tensor) -> Tensor:
    """The costs (..., N) of the pairs of an assignment in float64; 0 for a row without a pair."""
    if cost.shape[-1] == 0:
        return cost.new_zeros(assignment.shape, dtype=torch.float64)
    pairs = cost.double().gather(-1, assignment.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return torch.where(assignment >= 0, pairs, 0.0)


def optimal_assignment(cost: Tensor) -> Tensor:
    """Fewest non-finite entries, then least cost, of one problem (N, T): SciPy, in float64."""
    values = cost.double().numpy()
    finite = np.isfinite(values)
    low, high = (values[finite].min(), values[finite].max()) if finite.any() else (0.0, 0.0)
    # Dearer than all finite pairs together.
    dear = (high - low + 1.0) * (min(values.shape) + 1)
    rows, columns = linear_sum_assignment(np.where(finite, values - low, dear))
    assignment = torch.full((len(values),), -1, dtype=torch.int64)
    assignment[torch.from_numpy(rows)] = torch.from_numpy(columns)
    return assignment


def check_pairs(assignment: Tensor, rows: Tensor, columns: Tensor) -> None:
    """Raise unless one problem's assignment (N,) is a full one-to-one matching of the valid rows and columns."""
    require(assignment.dtype == torch.int64, f"dtype must be int64, got {assignment.dtype}")
    require(assignment.shape == rows.shape, f"shape must be {tuple(rows.shape)}, got {tuple(assignment.shape)}")
    matched = assignment[assignment != -1].tolist()
    number = min(int(rows.sum()), int(columns.sum()))
    require(all(0 <= column < len(columns) for column in matched), f"columns are out of range: {assignment}")
    require(len(set(matched)) == len(matched), f"a column is taken twice: {assignment}")
    require(len(matched) == number, f"there must be {number} pairs: {assignment}")
    require(bool(rows[assignment >= 0].all()), f"a masked row is matched: {assignment}")
    require(bool(columns[matched].all()), f"a masked column is taken: {assignment}")


def check_optimal(assignment: Tensor, cost: Tensor, rows: Tensor, columns: Tensor) -> None:
    """Raise unless one problem's assignment (N,) has the fewest non-finite entries and, of those, the least cost."""
    check_pairs(assignment, rows, columns)
    valid = cost[rows][:, columns].double()
    used, best = pair_costs(cost, assignment), pair_costs(valid, optimal_assignment(valid))
    finite, best_finite = torch.isfinite(used), torch.isfinite(best)
    wrong, fewest = int((~finite).sum()), int((~best_finite).sum())
    require(wrong == fewest, f"{wrong} pairs are not finite instead of {fewest}: {assignment}")
    numbers = valid[torch.isfinite(valid)]
    # What sums in float64 round, and solvers.
    size = float(numbers.abs().max()) if len(numbers) else 0.0
    spread = float(numbers.max() - numbers.min()) if len(numbers) else 0.0
    allowed = len(used) * (1e-12 * size + RESOLUTION * spread)
    excess = float(used[finite].sum() - best[best_finite].sum())
    require(excess <= allowed, f"the cost is {excess} above the optimum: {assignment}")


def _check_batch(assignment: Tensor, cost: Tensor, rows: Tensor | None = None, columns: Tensor | None = None) -> None:
    """:func:`check_optimal` for every problem of a batch; masks broadcast."""
    rows = torch.ones(cost.shape[:-1], dtype=torch.bool) if rows is None else rows.expand(cost.shape[:-1])
    shape = (*cost.shape[:-2], cost.shape[-1])
    columns = torch.ones(shape, dtype=torch.bool) if columns is None else columns.expand(shape)
    require(assignment.shape == rows.shape, f"shape must be {tuple(rows.shape)}, got {tuple(assignment.shape)}")
    for problem in np.ndindex(*cost.shape[:-2]):
        check_optimal(assignment[problem], cost[problem], rows[problem], columns[problem])


def _answer(function: Function, arguments: Arguments) -> Tensor:
    answer = arguments.call(function)
    # SciPy's own solver, for one, returns pairs of indices.
    require(isinstance(answer, Tensor), f"the answer must be a tensor of partners, got {type(answer).__name__}")
    assignment: Tensor = answer
    return assignment


# Solvers.


@law("optimal", "every problem has a full one-to-one matching of least cost")
def solver_optimal(solver: Function, arguments: Arguments) -> None:
    masks = (arguments.tensors.get(name) for name in ("row_mask", "column_mask"))
    _check_batch(_answer(solver, arguments), arguments["cost"], *masks)


bad_numbers = solver_optimal.on(
    cost_arguments(kinds=("non_finite",)),
    name="bad_numbers",
    sentence="an entry that is not finite is used only if nothing else is left",
)


@law("planted", "an optimum that is alone is found, beside large duals, in float32 too")
def planted(solver: Function, arguments: Arguments) -> None:
    cost = arguments.without("planted")
    for dtype in (torch.float64, torch.float32):
        found = _answer(solver, cost.cast(dtype))
        # The optimum is the only one: here the indices must agree.
        expected = arguments["planted"]
        require(torch.equal(found, expected), f"the optimum of this {dtype} cost is {expected}, got {found}")


@law("masks", "what is masked changes nothing, whatever it holds", needs=["row_mask", "column_mask"])
def masks(solver: Function, arguments: Arguments) -> None:
    cost = arguments["cost"]
    rows = arguments.tensors.get("row_mask", torch.arange(cost.shape[-2]).expand(cost.shape[:-1]) % 2 == 0)
    columns = arguments.tensors.get("column_mask", torch.ones_like(cost[..., 0, :], dtype=torch.bool))
    valid = rows.unsqueeze(-1) & columns.unsqueeze(-2)
    for fill in (float("nan"), -1e30, 1e30):
        filled = arguments.replaced(cost=torch.where(valid, cost, fill), row_mask=rows, column_mask=columns)
        _check_batch(_answer(solver, filled), cost, rows, columns)


@law("batch", "one problem, and batch dimensions, are solved as a batch is")
def batch(solver: Function, arguments: Arguments) -> None:
    one = arguments.entry("B", 0)
    solver_optimal.check(solver, one)
    stacked = one.replaced(**{name: torch.stack((tensor, tensor)).unsqueeze(1) for name, tensor in one.tensors.items()})
    solver_optimal.check(solver, stacked)


@law("empty", "without rows, columns or problems there is no pair")
def empty(solver: Function, arguments: Arguments) -> None:
    for axis in ("N", "T", "B"):
        solver_optimal.check(solver, arguments.taken(axis, []))


@law("deterministic", "two runs give the same assignment")
def deterministic(function: Function, arguments: Arguments) -> None:
    first, second = (_answer(function, arguments) for _ in range(2))
    require(torch.equal(first, second), f"two runs must agree, got {first} and {second}")


# Matchers: called, and the answer judged by the cost of arguments, which may be others than those of the call.


def _judge(assignment: Tensor, arguments: Arguments) -> None:
    of_targets = arguments.signature.partner_axis == "T"
    (_judge_targets if of_targets else _judge_teacher)(assignment, arguments)


def _judge_targets(assignment: Tensor, arguments: Arguments) -> None:
    names = ("logits", "boxes", "target_labels", "target_boxes")
    _check_batch(assignment, detection_cost(*(arguments[name] for name in names)), columns=arguments["target_mask"])


def _judge_teacher(assignment: Tensor, arguments: Arguments) -> None:
    student, teacher = arguments["student_boxes"], arguments["teacher_boxes"]
    cost = distillation_cost(arguments["student_logits"], student, arguments["teacher_logits"], teacher)
    positive = arguments.tensors.get("teacher_positive")
    if positive is None:
        _check_batch(assignment, cost)
        return
    # Positive teacher queries choose first; the others share what is left, by boxes alone.
    chosen = (assignment >= 0) & positive.gather(-1, assignment.clamp(min=0))
    _check_batch(torch.where(chosen, assignment, -1), cost, columns=positive)
    location = box_cost(student, teacher, weight_bbox=5.0, weight_giou=2.0)
    _check_batch(torch.where(chosen, -1, assignment), location, ~chosen, ~positive)


@law("optimal", "every problem has a full one-to-one matching of least cost")
def optimal(match: Function, arguments: Arguments) -> None:
    _judge(_answer(match, arguments), arguments)


@law("half_precision", "in half precision it is the optimum of the float32 cost")
def half_precision(match: Function, arguments: Arguments) -> None:
    optimal.check(match, arguments.cast(torch.float16))


@law("query_permutation", "permuting the queries permutes the assignment")
def query_permutation(match: Function, arguments: Arguments) -> None:
    _judge(_answer(match, arguments.permuted("N")).roll(-1, -1), arguments)


@law("partner_permutation", "permuting the partners renumbers the assignment")
def partner_permutation(match: Function, arguments: Arguments) -> None:
    axis = arguments.signature.partner_axis
    partner = _answer(match, arguments.permuted(axis))
    _judge(torch.where(partner < 0, partner, (partner - 1) % max(arguments.size(axis), 1)), arguments)


@law("target_padding", "padding targets changes nothing, whatever they hold")
def target_padding(match: Function, arguments: Arguments) -> None:
    for fill in (1e30, float("nan")):
        _judge(_answer(match, arguments.padded("T", fill)), arguments)


@law("bad_image", "bad numbers in one image leave the assignment of the others alone")
def bad_image(match: Function, arguments: Arguments) -> None:
    for poison in POISONS:
        spoiled = {name: arguments[name].clone() for name in arguments.signature.student}
        for tensor in spoiled.values():
            tensor[:, 0, :, -1] = poison  # a class's logit; a box's height
        bad = arguments.replaced(**spoiled)
        assignment = _answer(match, bad)
        _judge(assignment, bad)
        _judge(assignment[:, 1:], arguments.taken("B", range(1, arguments.size("B"))))


@law(
    "positives_first",
    "positive teacher queries choose first, the others share what is left by their boxes",
    needs=["teacher_positive"],
)
def positives_first(match: Function, arguments: Arguments) -> None:
    shape = arguments["teacher_logits"].shape[:-1]
    every_other = (torch.arange(shape[-1]) % 2 == 0).expand(shape)
    positive = arguments.tensors.get("teacher_positive", every_other)
    optimal.check(match, arguments.replaced(teacher_positive=positive))


_MATCHING = (optimal, half_precision, query_permutation, partner_permutation, bad_image, deterministic)

TARGET_MATCHING_LAWS = laws_by_name(
    TARGET_MATCHING,
    detection_arguments().map(lambda arguments: arguments.without("assignment")),
    *_MATCHING,
    target_padding,
)

TEACHER_MATCHING_LAWS = laws_by_name(
    TEACHER_MATCHING,
    distillation_arguments().map(lambda arguments: arguments.without("assignment")),
    *_MATCHING,
    positives_first,
)

ASSIGNMENT_LAWS = laws_by_name(
    COSTS,
    cost_arguments(),
    solver_optimal,
    bad_numbers,
    planted.on(planted_arguments()),
    masks.on(cost_arguments(kinds=("generic",))),
    batch,
    empty,
    deterministic,
)
