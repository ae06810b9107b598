"""The detection loss under a given assignment."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from detr_kd_losses import detection_loss

from support import cases, oracles
from support.comparisons import (
    assert_agrees_with_oracle,
    assert_rejects,
    assert_same_evaluation,
    assert_vanishes,
    to_meta,
    to_tensors,
)
from support.tolerances import TOLERANCES

PREDICTIONS = ("logits", "boxes")
HEADS = {"focal": "sigmoid", "cross_entropy": "softmax"}


def assert_agrees(case, dtype, **options):
    return assert_agrees_with_oracle(detection_loss, oracles.detection_loss, case, dtype, wrt=PREDICTIONS, **options)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"alpha": 0.7},
        {"gamma": 0.5},
        {"gamma": 0.0},
        {"no_object_weight": 0.4},
        {"no_object_weight": 0.0},
        {"weight_class": 0.3},
        {"weight_bbox": 1.5},
        {"weight_giou": 0.7},
    ],
    ids=str,
)
@pytest.mark.parametrize("class_loss", HEADS)
def test_options(class_loss, options, dtype):
    assert_agrees(cases.detection(activation=HEADS[class_loss]), dtype, class_loss=class_loss, **options)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("stages", [None, 1, 3])
@pytest.mark.parametrize(("queries", "count"), [(3, 8), (8, 3), (4, 2), (5, 0), (0, 3), (0, 0)])
@pytest.mark.parametrize("class_loss", HEADS)
def test_sizes(class_loss, queries, count, stages, dtype):
    """More targets than queries, an image without targets (count 2), a batch without, no queries."""
    case = cases.detection(stages=stages, queries=queries, count=count, activation=HEADS[class_loss])
    assert_agrees(case, dtype, class_loss=class_loss)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("no_object_weight", [0.1, 0.0])
@pytest.mark.parametrize("class_loss", HEADS)
def test_batch_without_targets(class_loss, no_object_weight, dtype):
    """All targets are padding: every query learns the background, and no box is supervised."""
    case = cases.detection(activation=HEADS[class_loss])
    case["target_mask"][:], case["assignment"][:] = False, -1
    options = {"class_loss": class_loss, "no_object_weight": no_object_weight}
    terms = assert_agrees(case, dtype, **options)
    assert terms["loss_bbox"] == terms["loss_giou"] == 0
    assert (terms["loss_class"] > 0) == (class_loss == "focal" or no_object_weight > 0)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("class_loss", HEADS)
def test_perfect_predictions(class_loss, dtype):
    """Saturated logits of the right class and the targets' own boxes, one of them without area."""
    case = cases.detection(activation=HEADS[class_loss])
    case["target_boxes"][0, 0, 2:] = 0.0
    background = -200.0 if class_loss == "focal" else 0.0
    case["logits"][:] = background
    if class_loss == "cross_entropy":
        case["logits"][..., -1] = 200.0
    for (stage, image, query), target in np.ndenumerate(case["assignment"]):
        if target != -1:
            case["logits"][stage, image, query] = background
            case["logits"][stage, image, query, case["target_labels"][image, target]] = 200.0
            case["boxes"][stage, image, query] = case["target_boxes"][image, target]
    assert_vanishes(detection_loss, to_tensors(case, dtype), wrt=PREDICTIONS, class_loss=class_loss)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize("class_loss", HEADS)
def test_padding_and_unmatched_boxes_do_not_matter(class_loss, value):
    case = cases.detection(activation=HEADS[class_loss])
    broken = cases.filled(case, "boxes", case["assignment"] == -1, value)
    broken = cases.filled(broken, "target_boxes", ~case["target_mask"], value)
    assert_same_evaluation(detection_loss, case, broken, torch.float32, wrt=PREDICTIONS, class_loss=class_loss)


@pytest.mark.parametrize("label", [-1, cases.CLASSES, 255])
@pytest.mark.parametrize("class_loss", HEADS)
def test_labels_of_padding_do_not_matter(class_loss, label):
    case = cases.detection(count=2, activation=HEADS[class_loss])
    broken = cases.filled(case, "target_labels", ~case["target_mask"], label)
    assert_same_evaluation(detection_loss, case, broken, torch.float32, wrt=PREDICTIONS, class_loss=class_loss)


@pytest.mark.parametrize(
    ("argument", "change", "error", "match"),
    [
        ("logits", [1.0], TypeError, "`logits` must be a torch.Tensor, got list"),
        ("logits", lambda x: x[:, :, 1:], ValueError, "`logits` and `boxes` must have the same dimensions"),
        ("boxes", lambda x: x[..., :3], ValueError, r"`boxes` must have shape \(\.\.\., N, 4\), got"),
        ("boxes", to_meta, ValueError, "`boxes` must be on the device of `logits` cpu, got meta"),
        ("target_labels", lambda x: x.int(), TypeError, "`target_labels` must have dtype torch.int64, got torch.int32"),
        ("target_labels", lambda x: x[:, 1:], ValueError, "`target_labels` and `target_boxes` must have the same dim"),
        ("target_boxes", lambda x: x.long(), TypeError, "`target_boxes` must have a floating-point dtype, got"),
        ("target_boxes", to_meta, ValueError, "`target_boxes` must be on the device of `logits` cpu, got meta"),
        ("target_mask", lambda x: x.int(), TypeError, "`target_mask` must have dtype torch.bool, got torch.int32"),
        ("target_mask", lambda x: x[:, 1:], ValueError, "`target_labels` and `target_mask` must have the same dim"),
        ("assignment", lambda x: x.int(), TypeError, "`assignment` must have dtype torch.int64, got torch.int32"),
        ("assignment", lambda x: x[0], ValueError, "`assignment` and `logits` must have the same dimensions"),
        ("assignment", to_meta, ValueError, "`assignment` must be on the device of `logits` cpu, got meta"),
        ("class_loss", "bce", ValueError, "`class_loss` must be one of 'focal', 'cross_entropy', got 'bce'"),
    ],
)
def test_errors(argument, change, error, match):
    assert_rejects(detection_loss, cases.detection(), argument, change, error, match)


@pytest.mark.parametrize(
    "change",
    [lambda x: x[:1], lambda x: x[0], lambda x: x.expand(cases.STAGES, *x.shape)],
    ids=["other batch", "no batch", "stages"],
)
def test_targets_have_the_batch_of_the_predictions(change):
    """The number of targets would be wrong if one set of targets stood for several images or stages."""
    arguments = to_tensors(cases.detection())
    changed = {name: change(value) for name, value in arguments.items() if name.startswith("target")}
    with pytest.raises(ValueError, match="`target_labels` must have"):
        detection_loss(**{**arguments, **changed})


def test_predictions_have_a_batch():
    one_image = {name: value[0, 0] for name, value in to_tensors(cases.detection()).items() if value.ndim > 2}
    targets = {name: value[0] for name, value in to_tensors(cases.detection()).items() if name.startswith("target")}
    with pytest.raises(ValueError, match=r"`logits` must have shape \(L, B, N, C\) or \(B, N, C\), got \(5, 4\)"):
        detection_loss(**{**one_image, **targets})
