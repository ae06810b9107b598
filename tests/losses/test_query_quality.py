"""The quality of teacher queries."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from detr_kd_losses import query_quality

from support import cases, oracles
from support.comparisons import assert_rejects, to_meta, to_tensors
from support.tolerances import TOLERANCES, assert_close


def quality_case(**options):
    return cases.of_teacher(cases.detection(**options))


def assert_agrees(case, dtype, **options):
    arguments = to_tensors(case, dtype)
    actual = query_quality(**arguments, **options)
    assert actual.dtype == dtype
    assert not actual.requires_grad
    rounded = [x.detach().double().numpy() if x.is_floating_point() else x.numpy() for x in arguments.values()]
    assert_close(actual, oracles.query_quality(*rounded, **options))
    return actual


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gamma": 0.0},
        {"gamma": 0.2},
        {"gamma": 1.0},
        {"variant": "official"},
        {"variant": "official", "topk": 1},
        {"variant": "official", "topk": 7},
    ],
    ids=str,
)
@pytest.mark.parametrize("stages", [None, 3])
def test_options(stages, options, activation, dtype):
    assert_agrees(quality_case(stages=stages, activation=activation), dtype, activation=activation, **options)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("variant", ["paper", "official"])
@pytest.mark.parametrize(("queries", "count"), [(8, 3), (3, 8), (4, 2), (5, 0), (0, 3)])
def test_sizes(queries, count, variant, dtype):
    """An image without targets (count 2), a batch without, no queries."""
    assert_agrees(quality_case(queries=queries, count=count), dtype, variant=variant)


@pytest.mark.parametrize("variant", ["paper", "official"])
def test_one_image_without_batch(variant):
    case = {name: array[0] for name, array in quality_case(stages=None).items()}
    assert_agrees(case, torch.float64, variant=variant)


def test_without_targets():
    """Nothing is good in the paper's sense; for the public code the score alone counts."""
    case = quality_case()
    case["target_mask"][:], case["teacher_assignment"][:] = False, -1
    assert (assert_agrees(case, torch.float64) == 0).all()
    assert (assert_agrees(case, torch.float64, variant="official") > 0).any()


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize("variant", ["paper", "official"])
def test_padding_does_not_matter(variant, value):
    case = quality_case()
    expected = query_quality(**to_tensors(case, torch.float32), variant=variant)
    broken = cases.filled(case, "target_boxes", ~case["target_mask"], value)
    actual = query_quality(**to_tensors(broken, torch.float32), variant=variant)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("label", [-1, cases.CLASSES, 255])
@pytest.mark.parametrize("variant", ["paper", "official"])
def test_labels_of_padding_do_not_matter(variant, label):
    case = quality_case(count=2)
    expected = query_quality(**to_tensors(case), variant=variant)
    broken = cases.filled(case, "target_labels", ~case["target_mask"], label)
    actual = query_quality(**to_tensors(broken), variant=variant)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("variant", ["paper", "official"])
def test_half_precision_is_computed_in_float32(variant, dtype):
    arguments = to_tensors(quality_case(), dtype)
    widened = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in arguments.items()}
    actual = query_quality(**arguments, variant=variant)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, query_quality(**widened, variant=variant), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("argument", "change", "error", "match"),
    [
        ("teacher_logits", [1.0], TypeError, "`teacher_logits` must be a torch.Tensor, got list"),
        (
            "teacher_logits",
            lambda x: x[:, :, 1:],
            ValueError,
            "`teacher_logits` and `teacher_boxes` must have the same",
        ),
        ("teacher_boxes", to_meta, ValueError, "`teacher_boxes` must be on the device of `teacher_logits` cpu, got"),
        ("target_labels", lambda x: x.int(), TypeError, "`target_labels` must have dtype torch.int64, got torch.int32"),
        ("target_boxes", lambda x: x[..., :3], ValueError, r"`target_boxes` must have shape \(\.\.\., N, 4\), got"),
        ("target_mask", lambda x: x[:, 1:], ValueError, "`target_labels` and `target_mask` must have the same dim"),
        ("target_mask", to_meta, ValueError, "`target_mask` must be on the device of `teacher_logits` cpu, got meta"),
        ("teacher_assignment", lambda x: x.int(), TypeError, "`teacher_assignment` must have dtype torch.int64, got"),
        ("teacher_assignment", lambda x: x[0], ValueError, "`teacher_assignment` and `teacher_logits` must have the"),
        ("teacher_assignment", to_meta, ValueError, "`teacher_assignment` must be on the device of `teacher_logits`"),
        ("gamma", 1.5, ValueError, r"`gamma` must be in \[0, 1\], got 1.5"),
        ("gamma", -0.1, ValueError, r"`gamma` must be in \[0, 1\], got -0.1"),
        ("topk", 0, ValueError, "`topk` must be greater than 0, got 0"),
        ("activation", "tanh", ValueError, "`activation` must be one of 'sigmoid', 'softmax', got 'tanh'"),
        ("variant", "mine", ValueError, "`variant` must be one of 'paper', 'official', got 'mine'"),
    ],
)
def test_errors(argument, change, error, match):
    assert_rejects(query_quality, quality_case(), argument, change, error, match)
