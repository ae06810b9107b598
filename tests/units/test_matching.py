"""Matching, judged by the float64 cost of what is matched."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from detr_kd_losses import distillation_cost, match_targets, match_teacher, matching

from support import cases, oracles
from support.comparisons import assert_rejects, to_meta, to_tensors
from support.tolerances import TOLERANCES


def targets_case(**sizes):
    case = cases.detection(**sizes)
    del case["assignment"]
    return case


def teacher_case(**sizes):
    case = cases.distillation(**sizes)
    del case["assignment"]
    return case


def as_float64(arguments):
    """What the oracle sees: the arguments after rounding to the dtype under test."""
    return {
        name: (tensor.detach().double() if tensor.is_floating_point() else tensor).numpy()
        for name, tensor in arguments.items()
    }


def target_cost(case, **options):
    return oracles.detection_cost(*(array for name, array in case.items() if name != "target_mask"), **options)


def assert_targets_matched(case, dtype, **options):
    arguments = to_tensors(case, dtype)
    assignment = match_targets(**arguments, **options)
    assert assignment.dtype == torch.int64
    rounded = as_float64(arguments)
    cost = target_cost(rounded, **options)
    oracles.check_assignment(assignment, cost, column_mask=rounded["target_mask"], rtol=TOLERANCES[dtype][0])


def assert_teacher_matched(case, dtype, **options):
    arguments = to_tensors(case, dtype)
    assignment = match_teacher(**arguments, **options)
    assert assignment.dtype == torch.int64
    rounded = as_float64(arguments)
    positive = rounded.pop("teacher_positive", None)
    cost = oracles.distillation_cost(*rounded.values(), **options)
    weights = {name: value for name, value in options.items() if name in ("weight_bbox", "weight_giou")}
    location = oracles.location_cost(rounded["student_boxes"], rounded["teacher_boxes"], **weights)
    oracles.check_teacher_assignment(assignment.numpy(), cost, location, positive, rtol=TOLERANCES[dtype][0])


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"class_cost": "softmax"},
        {"weight_class": 0.0},
        {"weight_class": 20.0},
        {"weight_bbox": 0.0, "weight_giou": 10.0},
        {"weight_bbox": 30.0},
        {"alpha": 0.9, "gamma": 0.0, "weight_class": 10.0},
    ],
    ids=str,
)
def test_targets(options, dtype):
    for seed in range(3):
        activation = "softmax" if "class_cost" in options else "sigmoid"
        assert_targets_matched(targets_case(seed=seed, activation=activation), dtype, **options)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("stages", [None, 3])
@pytest.mark.parametrize(("queries", "count"), [(3, 8), (8, 3), (5, 0), (0, 3), (4, 2)])
def test_numbers_of_targets(queries, count, stages, dtype):
    """More targets than queries, as many, none, and (count 2) an image without any."""
    assert_targets_matched(targets_case(stages=stages, queries=queries, count=count), dtype)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("split", [True, False], ids=["positives first", "joint"])
@pytest.mark.parametrize("heads", cases.HEADS)
def test_teacher(heads, split, dtype):
    case = teacher_case(**heads)
    assert_teacher_matched(case if split else cases.predictions_only(case), dtype, **heads)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("split", [True, False], ids=["positives first", "joint"])
@pytest.mark.parametrize(
    "options", [{"weight_class": 0.0}, {"weight_class": 10.0}, {"weight_bbox": 30.0}, {"weight_giou": 30.0}], ids=str
)
def test_weights_of_teacher_matching(options, split, dtype):
    case = teacher_case()
    assert_teacher_matched(case if split else cases.predictions_only(case), dtype, **options)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("stages", [None, 3])
@pytest.mark.parametrize(("students", "teachers"), [(3, 8), (8, 3), (5, 5), (0, 3), (3, 0)])
def test_numbers_of_queries(students, teachers, stages, dtype):
    case = teacher_case(stages=stages, students=students, teachers=teachers)
    assert_teacher_matched(case, dtype)
    assert_teacher_matched(cases.predictions_only(case), dtype)


@pytest.mark.parametrize("positive", [True, False])
@pytest.mark.parametrize(("students", "teachers"), [(3, 8), (8, 3)])
def test_teacher_of_one_kind_only(students, teachers, positive):
    case = teacher_case(students=students, teachers=teachers)
    case["teacher_positive"][:] = positive
    assert_teacher_matched(case, torch.float64)


@pytest.mark.parametrize(("students", "teachers"), [(300, 900), (900, 300)])
@pytest.mark.parametrize("split", [True, False], ids=["positives first", "joint"])
def test_full_size(students, teachers, split):
    """The float64 costs are the package's own here; the small cases compare those with the oracle."""
    case = teacher_case(stages=None, students=students, teachers=teachers)
    if not split:
        case = cases.predictions_only(case)
    arguments = to_tensors(case, torch.float32)
    assignment = match_teacher(**arguments)
    wide = {name: torch.tensor(array) for name, array in as_float64(arguments).items()}
    positive = wide.pop("teacher_positive", None)
    cost, location = distillation_cost(**wide), distillation_cost(**wide, weight_class=0.0)
    positive = None if positive is None else positive.numpy()
    oracles.check_teacher_assignment(assignment.numpy(), cost.numpy(), location.numpy(), positive, rtol=1e-5)


@pytest.mark.parametrize(("built", "solved"), [(1, 1), (50, 100), (100, 250)])
def test_problems_that_do_not_fit_at_once(monkeypatch, built, solved):
    """Built and solved one by one, or a few at a time with a last part of another size."""
    monkeypatch.setattr("detr_kd_losses.matching.COSTS_BUILT", built)
    monkeypatch.setattr("detr_kd_losses.matching.COSTS_SOLVED", solved)
    for dtype in TOLERANCES:
        assert_targets_matched(targets_case(stages=3), dtype)
        assert_teacher_matched(teacher_case(stages=3), dtype)
        assert_teacher_matched(cases.predictions_only(teacher_case(stages=3)), dtype)


@pytest.fixture
def costs_built(monkeypatch):
    """Shapes of the costs that are built, at most 100 entries at a time."""
    monkeypatch.setattr(matching, "COSTS_BUILT", 100)
    monkeypatch.setattr(matching, "COSTS_SOLVED", 250)
    shapes = []
    for name in ("detection_cost", "distillation_cost", "distillation_costs"):
        function = getattr(matching, name)

        def recorded(*args, function=function, **options):
            costs = function(*args, **options)
            shapes.extend(cost.shape for cost in (costs if isinstance(costs, tuple) else [costs]))
            return costs

        monkeypatch.setattr(matching, name, recorded)
    return shapes


@pytest.mark.parametrize("positives_first", [False, True])
def test_no_larger_cost_is_built(positives_first, costs_built, monkeypatch):
    logits, boxes = torch.randn(3, 4, 7, 5), torch.rand(3, 4, 7, 4)
    positive = torch.rand(3, 4, 6) < 0.4 if positives_first else None
    arguments = logits, boxes, logits[:, :, 1:].flip(2), boxes[:, :, 1:].flip(2)
    in_parts = match_teacher(*arguments, teacher_positive=positive)
    assert sum(math.prod(shape) for shape in costs_built) == 3 * 4 * 7 * 6 * (1 + positives_first)
    assert all(math.prod(shape) <= 100 for shape in costs_built)
    monkeypatch.undo()
    assert in_parts.equal(match_teacher(*arguments, teacher_positive=positive))


def test_a_single_problem_may_be_larger_than_a_part(costs_built):
    logits, boxes = torch.randn(2, 20, 5), torch.rand(2, 20, 4)
    assert match_teacher(logits, boxes, logits, boxes).sort(-1).values.equal(torch.arange(20).expand(2, -1))
    assert len(costs_built) == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_matched_in_float32(dtype):
    for match, case in ((match_targets, targets_case()), (match_teacher, teacher_case())):
        arguments = to_tensors(case, dtype)
        widened = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in arguments.items()}
        assert torch.equal(match(**arguments), match(**widened))


@pytest.mark.parametrize("value", [np.nan, np.inf, -1e30])
def test_padding_does_not_matter(value):
    case = targets_case()
    padding = ~case["target_mask"]
    padded = cases.filled(case, "target_boxes", padding, value)
    assignment = match_targets(**to_tensors(padded))
    cost = target_cost(case)
    oracles.check_assignment(assignment, cost, column_mask=case["target_mask"])


@pytest.mark.parametrize("label", [-1, cases.CLASSES, 255])
def test_labels_of_padding_do_not_matter(label):
    case = targets_case()
    padded = cases.filled(case, "target_labels", ~case["target_mask"], label)
    assignment = match_targets(**to_tensors(padded))
    cost = target_cost(case)
    oracles.check_assignment(assignment, cost, column_mask=case["target_mask"])


def test_a_broken_image_leaves_the_others_alone():
    case = teacher_case()
    broken = {name: array.copy() for name, array in case.items()}
    broken["student_logits"][:, 0, 2] = np.nan
    broken["teacher_boxes"][:, 0, 1] = np.inf
    assignment = match_teacher(**to_tensors(broken))
    healthy = {name: array[:, 1] for name, array in case.items()}
    positive = healthy.pop("teacher_positive")
    cost = oracles.distillation_cost(*healthy.values())
    location = oracles.location_cost(healthy["student_boxes"], healthy["teacher_boxes"])
    oracles.check_teacher_assignment(assignment[:, 1].numpy(), cost, location, positive)
    pairs = min(case["student_logits"].shape[-2], case["teacher_logits"].shape[-2])
    assert ((assignment[:, 0] >= 0).sum(-1) == pairs).all()


@pytest.mark.parametrize(
    ("argument", "change", "error", "match"),
    [
        ("logits", [1.0], TypeError, "`logits` must be a torch.Tensor, got list"),
        ("logits", lambda x: x.long(), TypeError, "`logits` must have a floating-point dtype, got torch.int64"),
        ("boxes", lambda x: x[..., :3], ValueError, r"`boxes` must have shape \(\.\.\., N, 4\), got"),
        ("boxes", to_meta, ValueError, "`boxes` must be on the device of `logits` cpu, got meta"),
        ("target_labels", lambda x: x.int(), TypeError, "`target_labels` must have dtype torch.int64, got"),
        ("target_boxes", to_meta, ValueError, "`target_boxes` must be on the device of `logits` cpu, got meta"),
        ("target_mask", lambda x: x.int(), TypeError, "`target_mask` must have dtype torch.bool, got torch.int32"),
        ("target_mask", lambda x: x[:, 1:], ValueError, "`target_labels` and `target_mask` must have the same dim"),
        ("target_mask", to_meta, ValueError, "`target_mask` must be on the device of `logits` cpu, got meta"),
        ("class_cost", "kl", ValueError, "`class_cost` must be one of 'focal', 'softmax', got 'kl'"),
        ("backend", "magic", ValueError, r"`backend` must be 'auto' or one of \[.*'scipy'.*\], got 'magic'"),
    ],
)
def test_errors_of_match_targets(argument, change, error, match):
    assert_rejects(match_targets, targets_case(), argument, change, error, match)


@pytest.mark.parametrize(
    ("argument", "change", "error", "match"),
    [
        ("student_boxes", lambda x: x.long(), TypeError, "`student_boxes` must have a floating-point dtype, got"),
        ("teacher_logits", lambda x: x[1:], ValueError, "`teacher_logits` and `teacher_boxes` must have the same dim"),
        ("teacher_positive", lambda x: x.int(), TypeError, "`teacher_positive` must have dtype torch.bool, got"),
        ("teacher_positive", lambda x: x[..., 1:], ValueError, "`teacher_positive` and `teacher_logits` must have the"),
        ("teacher_positive", to_meta, ValueError, "`teacher_positive` must be on the device of `teacher_logits` cpu"),
        ("student_activation", "tanh", ValueError, "`student_activation` must be one of 'sigmoid', 'softmax', got"),
        ("class_map", [0, 1], ValueError, "`class_map` must have one entry for each of the 4 teacher classes, got"),
        ("backend", "magic", ValueError, r"`backend` must be 'auto' or one of \[.*'scipy'.*\], got 'magic'"),
    ],
)
def test_errors_of_match_teacher(argument, change, error, match):
    assert_rejects(match_teacher, teacher_case(), argument, change, error, match)
