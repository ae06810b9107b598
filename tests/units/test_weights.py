"""Weights of teacher queries."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import detr_kd_losses as dkl

from support import cases, oracles
from support.comparisons import assert_rejects, to_meta, to_tensors
from support.tolerances import TOLERANCES, assert_close


def arguments_of(name, case):
    names = {
        "confidence_weight": ["teacher_logits"],
        "overlap_weight": ["teacher_boxes", "target_boxes", "target_mask"],
        "localization_weight": ["teacher_logits", "teacher_boxes", "target_boxes", "teacher_assignment"],
    }
    return {argument: case[argument] for argument in names[name]}


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("confidence_weight", {}),
        ("confidence_weight", {"activation": "softmax"}),
        ("overlap_weight", {}),
        ("overlap_weight", {"threshold": -1.0}),
        ("overlap_weight", {"threshold": 0.4}),
        ("localization_weight", {}),
        ("localization_weight", {"activation": "softmax"}),
    ],
)
@pytest.mark.parametrize("count", [3, 2, 0])
def test_agrees_with_its_oracle(count, name, options, dtype):
    """With an image without targets (2), and without any (0)."""
    case = cases.published_weights() if count == 3 else cases.of_teacher(cases.detection(count=count))
    arguments = to_tensors(arguments_of(name, case), dtype)
    weight = getattr(dkl, name)(**arguments, **options)
    assert weight.dtype == dtype
    assert not weight.requires_grad
    rounded = {
        key: tensor.detach().double() if tensor.is_floating_point() else tensor for key, tensor in arguments.items()
    }
    expected = getattr(oracles, name)(*(tensor.numpy() for tensor in rounded.values()), **options)
    assert_close(weight, expected)


@pytest.mark.parametrize("name", ["confidence_weight", "overlap_weight", "localization_weight"])
def test_half_precision_is_computed_in_float32(name):
    arguments = to_tensors(arguments_of(name, cases.published_weights()), torch.bfloat16)
    widened = {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in arguments.items()}
    weight = getattr(dkl, name)(**arguments)
    assert weight.dtype == torch.float32
    assert torch.equal(weight, getattr(dkl, name)(**widened))


def test_what_padding_holds_does_not_matter():
    case = cases.published_weights()
    broken = cases.filled(case, "target_boxes", ~case["target_mask"], np.nan)
    arguments = [to_tensors(arguments_of("overlap_weight", each)) for each in (case, broken)]
    assert torch.equal(*(dkl.overlap_weight(**each) for each in arguments))


def test_a_head_of_no_object_alone_has_no_confidence():
    assert dkl.confidence_weight(torch.randn(2, 3, 1), activation="softmax").eq(0).all()


@pytest.mark.parametrize(
    ("name", "argument", "change", "error", "match"),
    [
        ("confidence_weight", "teacher_logits", lambda x: x.long(), TypeError, "`teacher_logits` must have a floating"),
        (
            "confidence_weight",
            "activation",
            "tanh",
            ValueError,
            "`activation` must be one of 'sigmoid', 'softmax', got",
        ),
        ("overlap_weight", "threshold", 1.0, ValueError, r"`threshold` must be in \[-1, 1\), got 1.0"),
        ("overlap_weight", "threshold", "0", TypeError, "`threshold` must be a number, got '0'"),
        (
            "overlap_weight",
            "target_mask",
            lambda x: x.int(),
            TypeError,
            "`target_mask` must have dtype torch.bool, got",
        ),
        ("overlap_weight", "target_mask", lambda x: x[:, 1:], ValueError, "`target_boxes` and `target_mask` must have"),
        (
            "overlap_weight",
            "target_boxes",
            lambda x: x[:1],
            ValueError,
            "`target_boxes` must have the batch dimensions",
        ),
        (
            "localization_weight",
            "target_boxes",
            to_meta,
            ValueError,
            "`target_boxes` must be on the device of `teacher_",
        ),
        ("localization_weight", "teacher_assignment", lambda x: x[..., 1:], ValueError, "`teacher_assignment` and `t"),
    ],
)
def test_errors(name, argument, change, error, match):
    arguments = arguments_of(name, cases.published_weights())
    assert_rejects(getattr(dkl, name), arguments, argument, change, error, match)
