"""Matching costs."""

from __future__ import annotations

import pytest
import torch

from detr_kd_losses import detection_cost, distillation_cost

from support import cases, oracles
from support.comparisons import assert_rejects, to_meta, to_tensors
from support.tolerances import TOLERANCES, assert_close


def detection_case(**sizes):
    case = cases.detection(**sizes)
    return {name: case[name] for name in ("logits", "boxes", "target_labels", "target_boxes")}


def distillation_case(**sizes):
    return cases.predictions_only(cases.distillation(**sizes))


def assert_agrees(cost, oracle, case, dtype, **options):
    arguments = to_tensors(case, dtype)
    actual = cost(**arguments, **options)
    assert actual.dtype == dtype
    rounded = {name: tensor.detach().numpy() for name, tensor in arguments.items()}
    rounded = {name: array.astype(float) if array.dtype.kind == "f" else array for name, array in rounded.items()}
    assert_close(actual, oracle(*rounded.values(), **options))


DETECTION_OPTIONS = [
    {},
    {"class_cost": "softmax"},
    {"weight_class": 0.3, "class_cost": "softmax"},
    {"weight_class": 0.0},
    {"weight_bbox": 1.5},
    {"weight_giou": 0.7},
    {"alpha": 0.6},
    {"gamma": 0.5},
    {"gamma": 0.0, "weight_bbox": 0.0, "weight_giou": 0.0},
]


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("options", DETECTION_OPTIONS, ids=str)
def test_detection_cost(options, dtype):
    """Targets of (B, T) go with predictions of (L, B, N)."""
    case = detection_case(activation="softmax" if "class_cost" in options else "sigmoid")
    assert_agrees(detection_cost, oracles.detection_cost, case, dtype, **options)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("heads", cases.HEADS)
def test_distillation_cost(heads, dtype):
    assert_agrees(distillation_cost, oracles.distillation_cost, distillation_case(**heads), dtype, **heads)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(
    "options", [{"weight_class": 0.3}, {"weight_class": 0.0}, {"weight_bbox": 1.5}, {"weight_giou": 0.7}], ids=str
)
def test_weights_of_distillation_cost(options, dtype):
    assert_agrees(distillation_cost, oracles.distillation_cost, distillation_case(), dtype, **options)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("rows", "columns"), [(3, 8), (8, 3), (1, 1)])
@pytest.mark.parametrize("stages", [None, 3])
def test_sizes(stages, rows, columns, dtype):
    detection = detection_case(stages=stages, queries=rows, count=columns)
    assert_agrees(detection_cost, oracles.detection_cost, detection, dtype)
    distillation = distillation_case(stages=stages, students=rows, teachers=columns)
    assert_agrees(distillation_cost, oracles.distillation_cost, distillation, dtype)
    one_image = {name: array[(0,) * (array.ndim - 2)] for name, array in distillation.items()}
    assert_agrees(distillation_cost, oracles.distillation_cost, one_image, dtype)


@pytest.mark.parametrize(("rows", "columns"), [(0, 3), (3, 0), (0, 0)])
def test_empty(rows, columns):
    detection = detection_cost(**to_tensors(detection_case(queries=rows, count=columns)))
    distillation = distillation_cost(**to_tensors(distillation_case(students=rows, teachers=columns)))
    assert detection.shape == distillation.shape == (cases.STAGES, cases.IMAGES, rows, columns)


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_saturated_logits(activation):
    """Logits far beyond those whose probability rounds to 1 keep their order and stay finite."""
    logits = torch.tensor([[-200.0, 40.0], [-100.0, 40.0], [0.0, 40.0], [100.0, 40.0], [200.0, 40.0]])
    boxes = torch.full((5, 4), 0.5)
    cost = distillation_cost(
        logits, boxes, logits[-1:], boxes[-1:], student_activation=activation, teacher_activation=activation
    ).squeeze(-1)
    assert cost.isfinite().all()
    assert (cost.diff() <= 0).all()
    assert (cost[:3].diff() < 0).all()
    class_cost = {"sigmoid": "focal", "softmax": "softmax"}[activation]
    assert detection_cost(logits, boxes, torch.tensor([0]), boxes[:1], class_cost=class_cost).isfinite().all()


@pytest.mark.parametrize("label", [-1, -100])
@pytest.mark.parametrize("class_cost", ["focal", "softmax"])
def test_negative_labels_of_padding_do_not_matter(class_cost, label):
    arguments = to_tensors(detection_case(activation="softmax" if class_cost == "softmax" else "sigmoid"))
    expected = detection_cost(**arguments, class_cost=class_cost)
    arguments["target_labels"][:, -1] = label
    actual = detection_cost(**arguments, class_cost=class_cost)
    torch.testing.assert_close(actual[..., :-1], expected[..., :-1], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("cost", "case"), [(detection_cost, detection_case()), (distillation_cost, distillation_case())]
)
def test_half_precision_is_computed_in_float32(cost, case, dtype):
    arguments = to_tensors(case, dtype)
    actual = cost(**arguments)
    assert actual.dtype == torch.float32
    widened = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in arguments.items()}
    torch.testing.assert_close(actual, cost(**widened), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("argument", "change", "error", "match"),
    [
        ("logits", [1.0], TypeError, "`logits` must be a torch.Tensor, got list"),
        ("logits", lambda x: x[..., 1:, :], ValueError, "`logits` and `boxes` must have the same dimensions"),
        ("boxes", lambda x: x.long(), TypeError, "`boxes` must have a floating-point dtype, got torch.int64"),
        ("boxes", to_meta, ValueError, "`boxes` must be on the device of `logits` cpu, got meta"),
        ("target_labels", lambda x: x.int(), TypeError, "`target_labels` must have dtype torch.int64, got"),
        ("target_labels", lambda x: x[:, 1:], ValueError, "`target_labels` and `target_boxes` must have the same"),
        ("target_labels", to_meta, ValueError, "`target_labels` must be on the device of `logits` cpu, got meta"),
        ("target_boxes", lambda x: x[..., :3], ValueError, r"`target_boxes` must have shape \(\.\.\., N, 4\), got"),
        ("target_boxes", to_meta, ValueError, "`target_boxes` must be on the device of `logits` cpu, got meta"),
        ("class_cost", "kl", ValueError, "`class_cost` must be one of 'focal', 'softmax', got 'kl'"),
    ],
)
def test_errors_of_detection_cost(argument, change, error, match):
    assert_rejects(detection_cost, detection_case(), argument, change, error, match)


def test_targets_of_another_batch():
    arguments = to_tensors(detection_case())
    fewer = {name: arguments[name][:1] for name in ("target_labels", "target_boxes")}
    with pytest.raises(ValueError, match=r"`target_labels` must have the batch dim.* `logits` \(2, 2\), got \(1,\)"):
        detection_cost(**{**arguments, **fewer})


@pytest.mark.parametrize(
    ("argument", "change", "error", "match"),
    [
        ("student_logits", lambda x: x[..., 1:, :], ValueError, "`student_logits` and `student_boxes` must have the"),
        ("teacher_logits", lambda x: x.long(), TypeError, "`teacher_logits` must have a floating-point dtype, got"),
        ("teacher_boxes", lambda x: x[..., :3], ValueError, r"`teacher_boxes` must have shape \(\.\.\., N, 4\), got"),
        ("teacher_boxes", to_meta, ValueError, "`teacher_boxes` must be on the device of `teacher_logits` cpu, got"),
        ("teacher_logits", lambda x: x[..., 1:], ValueError, "`teacher_logits` must have the student's 4 classes .* 3"),
        ("student_activation", "tanh", ValueError, "`student_activation` must be one of 'sigmoid', 'softmax', got"),
        ("teacher_activation", "tanh", ValueError, "`teacher_activation` must be one of 'sigmoid', 'softmax', got"),
        ("class_map", [0, 1], ValueError, "`class_map` must have one entry for each of the 4 teacher classes, got"),
        ("class_map", [0, 1, 2, 4], ValueError, r"`class_map` must have entries in \[-1, 4\), got 4"),
    ],
)
def test_errors_of_distillation_cost(argument, change, error, match):
    assert_rejects(distillation_cost, distillation_case(), argument, change, error, match)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            lambda x: x[:1],
            r"`student_logits` and `teacher_logits` must have the same dimensions .*\(2, 2\) and \(1, 2\)",
        ),
        (to_meta, "`teacher_logits` must be on the device of `student_logits` cpu, got meta"),
    ],
)
def test_teacher_of_another_batch_or_device(change, match):
    arguments = to_tensors(distillation_case())
    changed = {name: change(arguments[name]) for name in ("teacher_logits", "teacher_boxes")}
    with pytest.raises(ValueError, match=match):
        distillation_cost(**{**arguments, **changed})
