"""Hungarian-matched distillation of classes and boxes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import detr_kd_losses as dkl

from support import cases, oracles
from support.comparisons import (
    assert_agrees_with_oracle,
    assert_rejects,
    assert_same_evaluation,
    assert_vanishes,
    evaluate,
    to_meta,
    to_tensors,
)
from support.tolerances import TOLERANCES

STUDENT = ("student_logits", "student_boxes")


def assert_agrees(case, dtype, **options):
    return assert_agrees_with_oracle(
        dkl.hungarian_distillation_loss,
        oracles.hungarian_distillation_loss,
        case,
        dtype,
        wrt=STUDENT,
        **options,
    )


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("heads", cases.HEADS)
def test_heads_and_class_maps(heads, dtype):
    options = {**heads, "weight_negative_class": 0.5, "temperature": 2.0}
    assert_agrees(cases.distillation(**heads), dtype, **options)
    if heads["student_activation"] == "sigmoid":
        assert_agrees(cases.distillation(**heads, seed=1), dtype, **options, class_loss="bce")


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"class_loss": "bce"},
        {"temperature": 3.0},
        {"temperature": 0.5, "class_loss": "bce"},
        {"weight_class": 0.3},
        {"weight_bbox": 0.0},
        {"weight_bbox": 1.5},
        {"weight_giou": 0.7},
        {"weight_negative": 0.4},
        {"weight_negative_class": 0.6},
        {"weight_negative": 0.0, "weight_negative_class": 2.0, "weight_class": 3.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("split", [True, False], ids=["positives and negatives", "every pair positive"])
def test_options(split, options, dtype):
    case = cases.distillation()
    if not split:
        del case["teacher_positive"]
    assert_agrees(case, dtype, **options)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("stages", [None, 1, 3])
@pytest.mark.parametrize(("students", "teachers"), [(3, 8), (8, 3), (5, 5), (1, 1)])
def test_sizes(students, teachers, stages, dtype):
    assert_agrees(cases.distillation(stages=stages, students=students, teachers=teachers), dtype)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("stages", [None, 2])
@pytest.mark.parametrize("by_stage", [True, False])
@pytest.mark.parametrize("options", [{}, {"weight_negative_class": 0.6, "temperature": 2.0}], ids=str)
def test_weights_of_teacher_queries(options, by_stage, stages, dtype):
    for split in (True, False):
        case = cases.weighted(cases.distillation(stages=stages), stages=by_stage)
        if not split:
            del case["teacher_positive"]
        assert_agrees(case, dtype, **options)


def test_unit_weights_change_no_bit():
    case = cases.distillation()
    weighted = {**case, "teacher_weight": np.ones_like(case["teacher_boxes"][..., 0])}
    assert_same_evaluation(dkl.hungarian_distillation_loss, case, weighted, torch.float32, wrt=STUDENT)


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e20])
def test_weights_matter_by_their_ratios(scale):
    """Their sum may be far below 1, as a count of pairs may not."""
    case = cases.weighted(cases.distillation())
    scaled = {**case, "teacher_weight": scale * case["teacher_weight"]}
    terms, gradients = evaluate(dkl.hungarian_distillation_loss, to_tensors(case))
    scaled_terms, scaled_gradients = evaluate(dkl.hungarian_distillation_loss, to_tensors(scaled))
    torch.testing.assert_close(scaled_terms, terms, rtol=1e-12, atol=0)
    torch.testing.assert_close(scaled_gradients, gradients, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_no_weight_is_nothing_to_distil(dtype):
    case = cases.distillation()
    case = {**case, "teacher_weight": np.zeros_like(case["teacher_boxes"][..., 0])}
    for name in ("teacher_logits", "teacher_boxes", "student_boxes"):
        case = cases.filled(case, name, np.ones(case[name].shape[:-1], dtype=bool), np.nan)
    assert_vanishes(dkl.hungarian_distillation_loss, to_tensors(case, dtype), wrt=STUDENT)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_public_code(dtype):
    """With one joint assignment, every pair positive and "bce" the numbers are those of the paper's public code."""
    case = cases.distillation()
    del case["teacher_positive"]

    def official(**arguments):
        return dkl.hungarian_distillation_loss(**arguments, teacher_positive=None, class_loss="bce")

    assert_agrees_with_oracle(official, oracles.official_logits_loss, case, dtype, wrt=STUDENT)


@pytest.mark.parametrize(("student_depth", "teacher_depth"), [(3, 6), (6, 3)])
def test_other_depth(student_depth, teacher_depth):
    """The stages that the teacher's become are those that the oracle is given by index."""
    student = cases.distillation(stages=student_depth)
    teacher = cases.distillation(stages=teacher_depth, seed=1)
    stages = [1, 3, 5] if student_depth == 3 else [0, 0, 1, 1, 2, 2]
    teachers = {name: teacher[name] for name in ("teacher_logits", "teacher_boxes", "teacher_positive")}

    def loss(**arguments):
        selected = {name: dkl.select_stages(arguments[name], student_depth) for name in teachers}
        return dkl.hungarian_distillation_loss(**{**arguments, **selected})

    def oracle(**arguments):
        selected = {name: arguments[name][stages] for name in teachers}
        return oracles.hungarian_distillation_loss(**{**arguments, **selected})

    assert_agrees_with_oracle(loss, oracle, {**student, **teachers}, torch.float64, wrt=STUDENT)


@pytest.mark.parametrize(("students", "teachers"), [(300, 900), (900, 300)])
@pytest.mark.parametrize("split", [True, False], ids=["positives first", "joint"])
def test_matched_at_full_size(students, teachers, split):
    case = cases.distillation(stages=None, students=students, teachers=teachers)
    positive = torch.tensor(case["teacher_positive"]) if split else None
    assignment = dkl.match_teacher(**to_tensors(cases.predictions_only(case)), teacher_positive=positive)
    assert ((assignment >= 0).sum(-1) == 300).all()
    case["assignment"] = assignment.numpy()
    if not split:
        del case["teacher_positive"]
    assert_agrees(case, torch.float32)


def nothing_matched(case):
    return {**case, "assignment": np.full_like(case["assignment"], -1)}


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("class_loss", ["kl", "bce"])
@pytest.mark.parametrize(
    "case",
    [
        nothing_matched(cases.distillation()),
        nothing_matched(cases.distillation(teachers=0)),
        cases.distillation(students=0),
        cases.distillation(stages=0),
    ],
    ids=["no pairs", "no teacher queries", "no student queries", "no stages"],
)
def test_nothing_to_distil(case, class_loss, dtype):
    loss = dkl.hungarian_distillation_loss
    assert_vanishes(loss, to_tensors(case, dtype), wrt=STUDENT, class_loss=class_loss)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_all_negative_teacher(dtype):
    """Only boxes are distilled, and a stage without a pair leaves the other stage alone."""
    case = cases.distillation()
    case["teacher_positive"][:] = False
    case["assignment"][0] = -1
    terms = assert_agrees(case, dtype)
    assert terms["loss_class"] == 0
    assert terms["loss_bbox"] > 0


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("options", [{}, {"temperature": 2.0, "weight_negative_class": 1.0}], ids=str)
@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_equal_to_the_teacher(activation, options, dtype):
    """Boxes without area and saturated logits included."""
    heads = {"student_activation": activation, "teacher_activation": activation}
    case = cases.distillation(students=6, teachers=6, **heads)
    case["student_boxes"][..., 0, 2:] = 0.0
    case["student_boxes"][..., 1, 2] = 0.0
    case["student_boxes"][..., 2, :] = 0.0
    case["student_logits"][..., 3, 0] = 90.0
    case["student_logits"][..., 4, 0] = -90.0
    for name in ("logits", "boxes"):
        case[f"teacher_{name}"] = case[f"student_{name}"]
    case["assignment"] = np.broadcast_to(np.arange(6), case["assignment"].shape)
    assert_vanishes(
        dkl.hungarian_distillation_loss, to_tensors(case, dtype), wrt=STUDENT, class_loss="kl", **heads, **options
    )


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize("class_map", [None, [3, 0]], ids=["same classes", "class map"])
@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_unmatched_queries_do_not_matter(activation, class_map, value):
    heads = {"student_activation": activation, "teacher_activation": activation, "class_map": class_map}
    case = cases.distillation(**heads)
    unmatched = case["assignment"] == -1
    unused = np.ones(case["teacher_positive"].shape, dtype=bool)
    for (stage, image, _), partner in np.ndenumerate(case["assignment"]):
        unused[stage, image, partner] &= partner == -1
    assert unmatched.any(axis=-1).all()
    assert unused.any(axis=-1).all()
    broken = case
    for name in ("logits", "boxes"):
        broken = cases.filled(broken, f"student_{name}", unmatched, value)
        broken = cases.filled(broken, f"teacher_{name}", unused, value)
    loss = dkl.hungarian_distillation_loss
    assert_same_evaluation(loss, case, broken, torch.float32, wrt=STUDENT, **heads)


@pytest.mark.parametrize(
    ("argument", "change", "error", "match"),
    [
        ("student_logits", [1.0], TypeError, "`student_logits` must be a torch.Tensor, got list"),
        ("student_logits", lambda x: x.long(), TypeError, "`student_logits` must have a floating-point dtype, got"),
        ("student_logits", lambda x: x[0, 0, 0], ValueError, r"`student_logits` must have shape \(\.\.\., N, C\), got"),
        ("student_logits", lambda x: x[..., :0], ValueError, "`student_logits` must have at least one class channel"),
        (
            "student_logits",
            lambda x: x[:, :, 1:],
            ValueError,
            "`student_logits` and `student_boxes` must have the same",
        ),
        ("student_logits", to_meta, ValueError, "`student_boxes` must be on the device of `student_logits` meta"),
        ("student_boxes", lambda x: x[..., :3], ValueError, r"`student_boxes` must have shape \(\.\.\., N, 4\), got"),
        ("teacher_boxes", lambda x: x.long(), TypeError, "`teacher_boxes` must have a floating-point dtype, got"),
        ("teacher_boxes", lambda x: x[:1], ValueError, "`teacher_logits` and `teacher_boxes` must have the same"),
        ("teacher_boxes", to_meta, ValueError, "`teacher_boxes` must be on the device of `teacher_logits` cpu, got"),
        ("assignment", lambda x: x.int(), TypeError, "`assignment` must have dtype torch.int64, got torch.int32"),
        ("assignment", lambda x: x[..., 1:], ValueError, "`assignment` and `student_logits` must have the same dim"),
        ("assignment", to_meta, ValueError, "`assignment` must be on the device of `student_logits` cpu, got meta"),
        ("teacher_positive", lambda x: x.int(), TypeError, "`teacher_positive` must have dtype torch.bool, got"),
        ("teacher_positive", lambda x: x[..., 1:], ValueError, "`teacher_positive` and `teacher_logits` must have the"),
        ("teacher_positive", to_meta, ValueError, "`teacher_positive` must be on the device of `teacher_logits` cpu"),
        ("class_loss", "mse", ValueError, "`class_loss` must be one of 'kl', 'bce', got 'mse'"),
        ("student_activation", "tanh", ValueError, "`student_activation` must be one of 'sigmoid', 'softmax', got"),
        ("teacher_activation", "tanh", ValueError, "`teacher_activation` must be one of 'sigmoid', 'softmax', got"),
        ("teacher_activation", "softmax", ValueError, "`teacher_logits` must have the student's 4 classes .*, got 3"),
        ("class_map", [0, 1], ValueError, "`class_map` must have one entry for each of the 4 teacher classes, got"),
        ("class_map", [0, 1, 2, 4], ValueError, r"`class_map` must have entries in \[-1, 4\), got 4"),
        ("temperature", 0.0, ValueError, "`temperature` must be greater than 0, got 0.0"),
        ("temperature", np.nan, ValueError, "`temperature` must be greater than 0, got nan"),
    ],
)
def test_errors(argument, change, error, match):
    assert_rejects(dkl.hungarian_distillation_loss, cases.distillation(), argument, change, error, match)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda x: x.long(), TypeError, "`teacher_weight` must have a floating-point dtype, got torch.int64"),
        (
            lambda x: x[0, 0],
            ValueError,
            r"`teacher_weight` must have the dimensions \(L, B, M\) or \(B, M\) of `teacher_logits` .*, got \(6,\)",
        ),
        (lambda x: x[..., 1:], ValueError, r"`teacher_weight` must have the dimensions .*, got \(2, 2, 5\)"),
        (to_meta, ValueError, "`teacher_weight` must be on the device of `teacher_logits` cpu, got meta"),
    ],
)
def test_errors_of_weights(change, error, match):
    case = cases.weighted(cases.distillation())
    assert_rejects(dkl.hungarian_distillation_loss, case, "teacher_weight", change, error, match)


def test_errors_of_combinations():
    case = cases.distillation()
    arguments = to_tensors(case)
    with pytest.raises(ValueError, match="`class_loss` must be 'kl' for a softmax student, got 'bce'"):
        dkl.hungarian_distillation_loss(**arguments, class_loss="bce", student_activation="softmax")
    fewer = {f"teacher_{name}": arguments[f"teacher_{name}"][1:] for name in ("logits", "boxes")}
    with pytest.raises(ValueError, match=r"`student_logits` and `teacher_logits` must have the same dimensions \(L, B"):
        dkl.hungarian_distillation_loss(**{**arguments, **fewer})
    meta = {f"teacher_{name}": to_meta(arguments[f"teacher_{name}"]) for name in ("logits", "boxes")}
    with pytest.raises(ValueError, match="`teacher_logits` must be on the device of `student_logits` cpu, got meta"):
        dkl.hungarian_distillation_loss(**{**arguments, **meta})
    unbatched = {name: value[0, 0] for name, value in arguments.items()}
    with pytest.raises(ValueError, match=r"`student_logits` must have shape \(L, B, N, C\) or \(B, N, C\), got"):
        dkl.hungarian_distillation_loss(**unbatched)
