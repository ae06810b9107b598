"""The oracles against numbers worked out by hand."""

from __future__ import annotations

from math import exp, log

import numpy as np
import pytest
from numpy.testing import assert_allclose

from support import oracles
from support.oracles import autodiff

LEFT, RIGHT = [0.5, 0.5, 0.4, 0.4], [0.7, 0.5, 0.4, 0.4]  # IoU = GIoU = 1 / 3, L1 = 0.2
CORNER, FAR = [0.1, 0.1, 0.2, 0.2], [0.5, 0.5, 0.2, 0.2]  # IoU = 0, GIoU = 0.08 / 0.36 - 1


def logit(p):
    return np.log(p) - np.log1p(-np.asarray(p))


@pytest.mark.parametrize(
    ("f", "x", "value", "slope"),
    [
        (lambda x: x * x + 2 * x, 3.0, 15.0, 8.0),
        (lambda x: 1 - x - x / 4, 2.0, -1.5, -1.25),
        (lambda x: np.float64(6.0) / x - (-x), 2.0, 5.0, -0.5),
        (lambda x: (x - x * x) / (x + 1), 3.0, -1.5, -0.875),
        (lambda x: x**3, 2.0, 8.0, 12.0),
        (lambda x: x**0, 0.0, 1.0, 0.0),
        (abs, -2.0, 2.0, -1.0),
        (abs, 0.0, 0.0, 0.0),
        (autodiff.exp, log(3), 3.0, 3.0),
        (autodiff.log, 4.0, log(4), 0.25),
        (autodiff.sqrt, 4.0, 2.0, 0.25),
        (autodiff.softplus, 0.0, log(2), 0.5),
        (autodiff.softplus, 800.0, 800.0, 1.0),
        (autodiff.softplus, -40.0, exp(-40), exp(-40)),
        (autodiff.sigmoid, log(3), 0.75, 0.1875),
        (lambda x: autodiff.maximum(x, 1.0), 1.0, 1.0, 0.5),
        (lambda x: autodiff.maximum(x, 1.0), 2.0, 2.0, 1.0),
        (lambda x: autodiff.minimum(x, 1.0), 1.0, 1.0, 0.5),
        (lambda x: autodiff.minimum(x, 1.0), 2.0, 1.0, 0.0),
    ],
)
def test_derivatives_of_scalar_functions(f, x, value, slope):
    result, (grad,) = oracles.value_and_grad(f, np.array(x))
    assert_allclose([result, grad], [value, slope], rtol=1e-14)


def test_gradient_has_an_array_for_each_argument():
    value, (grad_z, grad_unused) = oracles.value_and_grad(
        lambda z, _: autodiff.log_softmax(z)[0], np.array([0.0, log(3)]), np.zeros((2, 0))
    )
    assert_allclose(value, -log(4))
    assert_allclose(grad_z, [0.75, -0.75])
    assert grad_unused.shape == (2, 0)


@pytest.mark.parametrize(
    ("box1", "box2", "iou", "giou"),
    [
        (LEFT, RIGHT, 1 / 3, 1 / 3),
        (LEFT, LEFT, 1.0, 1.0),
        (CORNER, FAR, 0.0, 0.08 / 0.36 - 1),
        ([0.5, 0.5, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0], 1.0, 1.0),
        ([0.5, 0.5, 0.0, 0.0], [0.6, 0.5, 0.0, 0.0], 0.0, -1.0),
        ([0.5, 0.5, 0.0, 0.0], LEFT, 0.0, 0.0),
    ],
)
def test_iou_and_generalized_iou(box1, box2, iou, giou):
    assert_allclose(oracles.box_iou(box1, box2), iou, atol=1e-15)
    assert_allclose(oracles.generalized_box_iou(box1, box2), giou, atol=1e-15)


def test_gradient_of_generalized_iou():
    _, (grad,) = oracles.value_and_grad(lambda box: oracles.generalized_box_iou(box, FAR), np.array(CORNER))
    moved = 0.08 / 0.36**2 * 0.6  # the hull shrinks by 0.6 per unit of cx
    grown = 0.2 / 0.36 - 0.5 * moved  # the union grows by 0.2 per unit of w, the hull by half of 0.6
    assert_allclose(grad, [moved, moved, grown, grown])


def test_costs():
    z, label = np.array([0.0, log(3)]), 1
    focal = 0.25 * 0.25**2 * -log(0.75) - 0.75 * 0.75**2 * -log(0.25)
    assert_allclose(oracles.focal_class_cost(z, label), focal)
    assert_allclose(oracles.softmax_class_cost(z, label), -0.75)
    location = 5 * 0.2 - 2 / 3
    cost = oracles.detection_cost(z[None, None], np.array([[LEFT]]), np.array([[label]]), np.array([[RIGHT]]))
    assert_allclose(cost, [[[2 * focal + location]]])
    assert_allclose(oracles.location_cost(np.array([LEFT]), np.array([RIGHT])), [[location]])
    cost = oracles.distillation_cost(np.zeros((1, 1)), np.array([LEFT]), np.zeros((1, 1)), np.array([RIGHT]))
    assert_allclose(cost, [[log(2) + location]])


@pytest.mark.parametrize(
    ("assignment", "error"),
    [
        ([1, 0, -1], None),
        ([0, 1, -1], "cost 5.0 instead of 4.0"),
        ([1, 0, 2], "3 pairs instead of 2"),
        ([1, -1, -1], "1 pairs instead of 2"),
        ([1, 1, -1], "not one-to-one"),
        ([-2, 0, -1], "out of range"),
        ([1, -1, 0], "masked row"),
        ([1, 2, -1], "masked column"),
    ],
)
def test_check_assignment(assignment, error):
    cost = np.array([[[1.0, 2.0, 0.0], [2.0, 4.0, 0.0], [0.0, 0.0, 0.0]]])
    rows, columns = np.array([[True, True, False]]), np.array([True, True, False])
    if error is None:
        oracles.check_assignment([assignment], cost, rows, columns)
    else:
        with pytest.raises(AssertionError, match=error):
            oracles.check_assignment([assignment], cost, rows, columns)


def test_a_solver_in_whole_numbers_may_lose_its_resolution_on_each_pair():
    cost = np.array([[0.0, 1.0], [1.0, 2.5]])
    oracles.check_assignment(np.array([0, 1]), cost, resolution=0.25)  # 2.5 instead of 2.0
    with pytest.raises(AssertionError, match=r"cost 2\.5 instead of 2\.0"):
        oracles.check_assignment(np.array([0, 1]), cost, resolution=0.24)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_costs_are_used_last(bad):
    cost = np.array([[bad, 1.0, 2.0], [bad, 1.5, 9.0], [bad, bad, bad]])
    assert oracles.optimal_cost(cost) == (1, 3.5)
    assert oracles.optimal_cost(np.array([[0.0, 9.0], [9.0, bad]])) == (0, 18.0)
    oracles.check_assignment(np.array([2, 1, 0]), cost)
    with pytest.raises(AssertionError, match="2 non-finite pairs instead of 1"):
        oracles.check_assignment(np.array([0, 1, 2]), cost)
    with pytest.raises(AssertionError, match=r"cost 10\.0 instead of 3\.5"):
        oracles.check_assignment(np.array([1, 2, 0]), cost)


def test_optimum_of_an_empty_problem():
    assert oracles.optimal_cost(np.zeros((3, 2)), None, np.zeros(2, dtype=bool)) == (0, 0.0)


def test_check_teacher_assignment():
    cost = np.array([[5.0, 3.0], [0.0, 2.0], [6.0, 4.0]])
    location = np.array([[3.0, 7.0], [0.0, 7.0], [1.0, 7.0]])
    positive = np.array([False, True])
    oracles.check_teacher_assignment(np.array([1, 0, -1]), cost, location)
    oracles.check_teacher_assignment(np.array([-1, 1, 0]), cost, location, positive)
    with pytest.raises(AssertionError, match=r"cost 3\.0 instead of 2\.0"):  # the positive chooses first
        oracles.check_teacher_assignment(np.array([1, 0, -1]), cost, location, positive)
    with pytest.raises(AssertionError, match=r"cost 3\.0 instead of 1\.0"):  # the negative goes by location
        oracles.check_teacher_assignment(np.array([0, 1, -1]), cost, location, positive)
    with pytest.raises(AssertionError, match="0 pairs instead of 1"):  # the negative gets a query too
        oracles.check_teacher_assignment(np.array([-1, 1, -1]), cost, location, positive)


@pytest.mark.parametrize(
    ("p", "heads", "class_map", "expected", "known"),
    [
        ([0.5, 0.75], "sigmoid to sigmoid", None, [0.5, 0.75], [1, 1]),
        ([0.5, 0.75, 0.9], "sigmoid to sigmoid", [1, 1, -1], [0, 0.75, 0], [0, 1, 0]),
        ([0.5, 0.75], "sigmoid to softmax", None, [0.4, 0.6, 0], [1, 1, 1]),
        ([0.5, 0.75], "sigmoid to softmax", [1, 1], [0, 0.75, 0.25], [0, 1, 1]),
        ([0.1, 0.2, 0.3, 0.4], "softmax to softmax", [0, 0, -1], [0.3, 0, 0.7], [1, 0, 1]),
        ([0.1, 0.2, 0.3, 0.4], "softmax to sigmoid", [0, 0, -1], [0.3, 0], [1, 0]),
        ([0.1, 0.2, 0.3, 0.4], "softmax to sigmoid", None, [0.1, 0.2, 0.3], [1, 1, 1]),
    ],
)
def test_teacher_scores(p, heads, class_map, expected, known):
    teacher, student = heads.split(" to ")
    logits = logit(p) if teacher == "sigmoid" else np.log(p)
    scores = oracles.teacher_scores(
        2 * logits,
        len(expected),
        student_activation=student,
        teacher_activation=teacher,
        class_map=class_map,
        temperature=2.0,
    )
    assert_allclose(scores[0], expected, atol=1e-15)
    assert scores[1] == [bool(is_known) for is_known in known]


def test_class_term_leaves_out_unknown_channels():
    z, p, known = [0.0, 5.0, log(3)], [0.75, 0.0, 0.25], [True, False, True]
    bernoulli = log(2) - 0.75 * log(0.25) - 0.25 * log(0.75)
    assert_allclose(oracles.class_cross_entropy(z, p, known, "sigmoid"), bernoulli)
    assert_allclose(oracles.class_entropy(p, known, "sigmoid"), -2 * (0.75 * log(0.75) + 0.25 * log(0.25)))
    categorical = -0.75 * log(0.25) - 0.25 * log(0.75)
    assert_allclose(oracles.class_cross_entropy(z, p, known, "softmax"), categorical)
    assert_allclose(oracles.class_entropy(p, known, "softmax"), -(0.75 * log(0.75) + 0.25 * log(0.25)))


def test_hungarian_distillation_loss():
    """Two positives and a negative in two images; the second stage has no pair."""
    student_logits, teacher_logits = np.zeros((2, 2, 2, 1)), np.full((2, 2, 2, 1), 2 * log(3))
    student_boxes, teacher_boxes = np.tile(LEFT, (2, 2, 2, 1)), np.tile(RIGHT, (2, 2, 2, 1))
    assignment = np.array([[[1, 0], [0, -1]], [[-1, -1], [-1, -1]]])
    positive = np.array([[[True, False], [True, True]]] * 2)
    terms = oracles.hungarian_distillation_loss(
        student_logits,
        student_boxes,
        teacher_logits,
        teacher_boxes,
        assignment,
        teacher_positive=positive,
        temperature=2.0,
        weight_negative=0.5,
        weight_negative_class=0.1,
    )
    kl = 4 * (0.75 * log(1.5) + 0.25 * log(0.5))
    assert_allclose(terms["loss_class"], 1.1 * kl)
    assert_allclose(terms["loss_bbox"], 1.5 * 5 * 0.2)
    assert_allclose(terms["loss_giou"], 1.5 * 2 * 2 / 3)


def test_official_logits_loss():
    """Two pairs of equal boxes and one pair of overlapping boxes: each term is a mean over the three."""
    student_boxes = np.array([[[LEFT, LEFT, LEFT]]])
    teacher_boxes = np.array([[[LEFT, RIGHT, LEFT]]])
    logits = np.zeros((1, 1, 3, 2))
    assignment = np.array([[[0, 1, 2]]])
    terms = oracles.official_logits_loss(logits, student_boxes, logits, teacher_boxes, assignment)
    assert_allclose(list(terms.values()), [2 * log(2), 5 * 0.2 / 3, 2 * (2 / 3) / 3])


@pytest.mark.parametrize(
    ("class_loss", "logits", "expected"),
    [
        ("focal", [[0.0, 0.0], [0.0, 0.0]], (0.25 + 3 * 0.75) * 0.25 * log(2)),
        ("cross_entropy", [[log(2), 0.0, 0.0], [0.0, 0.0, 0.0]], (log(2) + 0.1 * log(3)) / 1.1),
    ],
)
def test_detection_loss(class_loss, logits, expected):
    """One target, one padded target without meaning, and two equal stages."""
    terms = oracles.detection_loss(
        np.array([[logits]] * 2),
        np.array([[[LEFT, FAR]]] * 2),
        np.array([[0, 99]]),
        np.array([[RIGHT, [np.nan] * 4]]),
        np.array([[True, False]]),
        np.array([[[0, -1]]] * 2),
        class_loss=class_loss,
    )
    assert_allclose(list(terms.values()), [2 * expected, 2 * 5 * 0.2, 2 * 2 * 2 / 3])


def test_query_quality():
    logits, boxes = logit([[0.75, 0.1], [0.6, 0.5]]), np.array([LEFT, FAR])
    labels, targets, mask = np.array([0, 1]), np.array([RIGHT, LEFT]), np.array([True, False])
    paper = oracles.query_quality(logits, boxes, labels, targets, mask, np.array([0, -1]))
    assert_allclose(paper, [0.5, 0.0])  # sqrt(0.75 / 3)
    official = {"variant": "official", "topk": 3}
    best = oracles.query_quality(logits, boxes, labels, targets, mask, np.array([0, -1]), **official)
    far_iou = 0.1 * 0.2 / (0.16 + 0.04 - 0.1 * 0.2)
    assert_allclose(best, [0.75 / 3, 1.1 * far_iou])
    no_targets, unmatched = np.zeros(2, dtype=bool), np.array([-1, -1])
    empty = oracles.query_quality(logits, boxes, labels, targets, no_targets, unmatched, **official)
    assert_allclose(empty, [0.75, 1.1])
    logits, options = np.log([[0.25, 0.15, 0.6]]), {"activation": "softmax", "gamma": 1}
    softmax = oracles.query_quality(logits, boxes[:1], labels, targets, mask, np.array([0]), **options)
    assert_allclose(softmax, [0.25])
    options = {"activation": "softmax", "variant": "official", "topk": 1}
    softmax = oracles.query_quality(logits, boxes[:1], labels, targets, mask, np.array([0]), **options)
    assert_allclose(softmax, [0.25 / 3])


@pytest.mark.parametrize(
    ("variant", "normalize", "expected"),
    [
        ("paper", None, [0.25, 0.09]),
        ("paper", "max", [1.0, 0.36]),
        ("paper", "mean", [0.5 / 0.34, 0.18 / 0.34]),
        ("official", None, [1.0, 0.02]),
        ("official", "queries", [0.25, 0.005]),
        ("official", "mean", [0.5 / 0.255, 0.01 / 0.255]),
    ],
)
def test_target_aware_mask_and_loss(variant, normalize, expected):
    """Cells with cosines 1 and -0.6 to the query of quality 0.5, a padded cell, and a query of quality 0."""
    features = np.array([[[[2.0, -3.0, 9.0]], [[0.0, 4.0, 9.0]]]])
    queries, quality = np.array([[[5.0, 0.0], [1.0, 1.0]]]), np.array([[0.5, 0.0]])
    options = {"variant": variant, "normalize": normalize, "padding_mask": np.array([[[True, True, False]]])}
    mask = oracles.target_aware_mask(features, queries, quality, **options)
    assert_allclose(mask, [[[*expected, 0.0]]], rtol=1e-13)
    student = features + np.array([[[[1.0, 2.0, 7.0]], [[0.0, 0.0, 7.0]]]])
    weights = np.array(expected) ** (1 if variant == "paper" else 2)
    loss, (grad,) = oracles.value_and_grad(
        lambda level: oracles.target_aware_feature_loss(level, features, queries, quality, **options), student
    )
    assert_allclose(loss, weights @ [1.0, 4.0] / (2 * 2))
    assert_allclose(grad, [[[[weights[0] / 2, weights[1], 0]], [[0, 0, 0]]]], rtol=1e-13)


def test_official_feature_loss():
    """One query, two stages, two equal levels: s = (1, 0.02) as the query's cosines are 1 and 0."""
    features = np.array([[[[2.0, 0.0]], [[0.0, 3.0]]]])
    loss = oracles.official_feature_loss(
        [features + 1] * 2,
        [features] * 2,
        np.tile([5.0, 0.0], (2, 1, 1, 1)),
        np.tile(logit([0.3, 0.2, 0.1]), (2, 1, 1, 1)),
        np.tile(LEFT, (2, 1, 1, 1)),
        np.zeros((1, 1, 4)),
        np.array([[False]]),
        topk=2,
    )
    assert_allclose(loss, 2 * 2 * (1 + 0.02**2) / 2)
