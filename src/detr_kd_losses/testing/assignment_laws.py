"""The laws of assignment solvers and matchers, for any callable with the signature of ours.

    >>> import detr_kd_losses as dkl
    >>> check_linear_sum_assignment(dkl.linear_sum_assignment, max_examples=5)
    >>> check_match_targets(dkl.match_targets, max_examples=5)

Assignments are compared by their cost in float64, never by index: which of several optima a solver finds is its own
business. Matchers are held to :func:`detection_cost` and :func:`distillation_cost` at their defaults.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from detr_kd_losses.costs import box_cost, detection_cost, distillation_cost
from detr_kd_losses.testing.arguments import Arguments
from detr_kd_losses.testing.cases import cost_arguments, detection_arguments, distillation_arguments
from detr_kd_losses.testing.law import Check, Function, check_laws, laws_by_name
from detr_kd_losses.testing.strategies import planted_costs

__all__ = [
    "ASSIGNMENT_LAWS",
    "TARGET_MATCHING_LAWS",
    "TEACHER_MATCHING_LAWS",
    "check_linear_sum_assignment",
    "check_match_targets",
    "check_match_teacher",
    "check_optimal",
    "pair_costs",
]

# What a solver may lose on each pair, as a share of the range of the finite costs: a fixed-point solver rounds to it.
RESOLUTION = 2.0**-26
# What may spoil an image: no number, an overflow, a height below 0.
POISONS = (float("nan"), float("inf"), -float("inf"), -1.0)


def require(condition: bool | np.bool_, what: str) -> None:
    """Raise AssertionError unless `condition`."""
    if not condition:
        raise AssertionError(what)


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


def _solver_optimal(solver: Function, arguments: Arguments) -> None:
    masks = (arguments.tensors.get(name) for name in ("row_mask", "column_mask"))
    _check_batch(arguments.call(solver), arguments["cost"], *masks)


def _solver_planted(solver: Function, case: tuple[Tensor, Tensor]) -> None:
    cost, planted = case
    for dtype in (torch.float64, torch.float32):
        found = solver(cost.to(dtype))
        # The optimum is the only one: here the indices must agree.
        require(torch.equal(found, planted), f"the optimum of this {dtype} cost is {planted}, got {found}")


def _solver_masks(solver: Function, arguments: Arguments) -> None:
    cost = arguments["cost"]
    rows = arguments.tensors.get("row_mask", torch.arange(cost.shape[-2]).expand(cost.shape[:-1]) % 2 == 0)
    columns = arguments.tensors.get("column_mask", torch.ones_like(cost[..., 0, :], dtype=torch.bool))
    valid = rows.unsqueeze(-1) & columns.unsqueeze(-2)
    for fill in (float("nan"), -1e30, 1e30):
        assignment = solver(torch.where(valid, cost, fill), row_mask=rows, column_mask=columns)
        _check_batch(assignment, cost, rows, columns)


def _solver_batch(solver: Function, arguments: Arguments) -> None:
    one = arguments.entry("B", 0)
    _solver_optimal(solver, one)
    stacked = one.replaced(**{name: torch.stack((tensor, tensor)).unsqueeze(1) for name, tensor in one.tensors.items()})
    _solver_optimal(solver, stacked)


def _solver_empty(solver: Function, arguments: Arguments) -> None:
    for axis in ("N", "T", "B"):
        _solver_optimal(solver, arguments.taken(axis, []))


def _deterministic(function: Function, arguments: Arguments) -> None:
    first, second = (_match(function, arguments) for _ in range(2))
    require(torch.equal(first, second), f"two runs must agree, got {first} and {second}")


# A matcher is called, and its answer judged by the cost of arguments, which may be others than those of the call.
Judge = Callable[[Tensor, Arguments], None]
Change = Callable[[Arguments], Arguments]


def _match(match: Function, arguments: Arguments) -> Tensor:
    assignment: Tensor = arguments.without("assignment").call(match)
    return assignment


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


def _optimal(judge: Judge, change: Change = lambda arguments: arguments) -> Check:
    def check(match: Function, arguments: Arguments) -> None:
        changed = change(arguments)
        judge(_match(match, changed), changed)

    return check


def _query_permutation(judge: Judge) -> Check:
    def check(match: Function, arguments: Arguments) -> None:
        judge(_match(match, arguments.permuted("N")).roll(-1, -1), arguments)

    return check


def _partner_permutation(judge: Judge, axis: str) -> Check:
    def check(match: Function, arguments: Arguments) -> None:
        partner = _match(match, arguments.permuted(axis))
        judge(torch.where(partner < 0, partner, (partner - 1) % max(arguments.size(axis), 1)), arguments)

    return check


def _target_padding(match: Function, arguments: Arguments) -> None:
    for fill in (1e30, float("nan")):
        _judge_targets(_match(match, arguments.padded("T", fill)), arguments)


def _bad_image(judge: Judge) -> Check:
    def check(match: Function, arguments: Arguments) -> None:
        for poison in POISONS:
            bad = {name: arguments[name].clone() for name in arguments.signature.student}
            for tensor in bad.values():
                tensor[:, 0, :, -1] = poison  # a class's logit; a box's height
            assignment = _match(match, arguments.replaced(**bad))
            judge(assignment, arguments.replaced(**bad))
            judge(assignment[:, 1:], arguments.taken("B", range(1, arguments.size("B"))))

    return check


def _half(arguments: Arguments) -> Arguments:
    return arguments.cast(torch.float16)


def _matching_laws(judge: Judge, axis: str) -> tuple[tuple[str, str, Check], ...]:
    return (
        ("optimal", "every problem has a full one-to-one matching of least cost", _optimal(judge)),
        ("half_precision", "in half precision it is the optimum of the float32 cost", _optimal(judge, _half)),
        ("query_permutation", "permuting the queries permutes the assignment", _query_permutation(judge)),
        ("partner_permutation", "permuting the partners renumbers the assignment", _partner_permutation(judge, axis)),
        ("bad_image", "bad numbers in one image leave the assignment of the others alone", _bad_image(judge)),
        ("deterministic", "two runs give the same assignment", _deterministic),
    )


TARGET_MATCHING_LAWS = laws_by_name(
    detection_arguments(),
    *_matching_laws(_judge_targets, "T"),
    ("target_padding", "padding targets changes nothing, whatever they hold", _target_padding),
)

TEACHER_MATCHING_LAWS = laws_by_name(distillation_arguments(), *_matching_laws(_judge_teacher, "M"))

ASSIGNMENT_LAWS = laws_by_name(
    cost_arguments(),
    ("optimal", "every problem has a full one-to-one matching of least cost", _solver_optimal),
    (
        "bad_numbers",
        "an entry that is not finite is used only if nothing else is left",
        _solver_optimal,
        cost_arguments(kinds=("non_finite",)),
    ),
    (
        "planted",
        "an optimum that is alone is found, beside large duals, in float32 too",
        _solver_planted,
        planted_costs(),
    ),
    ("masks", "what is masked changes nothing, whatever it holds", _solver_masks, cost_arguments(kinds=("generic",))),
    ("batch", "one problem, and batch dimensions, are solved as a batch is", _solver_batch),
    ("empty", "without rows, columns or problems there is no pair", _solver_empty),
    ("deterministic", "two runs give the same assignment", _deterministic),
)


def check_linear_sum_assignment(
    solver: Function, *, skip: Collection[str] = (), max_examples: int | None = None
) -> None:
    """Check ASSIGNMENT_LAWS by :func:`check_laws`."""
    check_laws(ASSIGNMENT_LAWS, solver, skip=skip, max_examples=max_examples)


def check_match_targets(match: Function, *, skip: Collection[str] = (), max_examples: int | None = None) -> None:
    """Check TARGET_MATCHING_LAWS by :func:`check_laws`."""
    check_laws(TARGET_MATCHING_LAWS, match, skip=skip, max_examples=max_examples)


def check_match_teacher(match: Function, *, skip: Collection[str] = (), max_examples: int | None = None) -> None:
    """Check TEACHER_MATCHING_LAWS by :func:`check_laws`."""
    check_laws(TEACHER_MATCHING_LAWS, match, skip=skip, max_examples=max_examples)
