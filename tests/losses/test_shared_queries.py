"""Distillation on queries that both decoders were given."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import detr_kd_losses as dkl

from support import cases, oracles
from support.comparisons import assert_agrees_with_oracle, assert_rejects, assert_vanishes, to_meta, to_tensors
from support.tolerances import TOLERANCES

STUDENT = ("student_logits", "student_boxes")
loss = dkl.shared_query_distillation_loss


def assert_agrees(case, dtype, **options):
    return assert_agrees_with_oracle(loss, oracles.shared_query_distillation_loss, case, dtype, wrt=STUDENT, **options)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("weighting", ["confidence", "uniform"])
@pytest.mark.parametrize("heads", cases.HEADS)
def test_heads_and_class_maps(heads, weighting, dtype):
    assert_agrees(cases.shared(**heads), dtype, weighting=weighting, temperature=2.0, **heads)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("stages", [None, 1, 3])
@pytest.mark.parametrize("queries", [1, 6])
def test_sizes(queries, stages, dtype):
    assert_agrees(cases.shared(stages=stages, queries=queries), dtype)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("weighting", ["confidence", "uniform"])
@pytest.mark.parametrize("case", [cases.shared(queries=0), cases.shared(stages=0)], ids=["no queries", "no stages"])
def test_nothing_to_distil(case, weighting, dtype):
    assert_vanishes(loss, to_tensors(case, dtype), wrt=STUDENT, weighting=weighting)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_a_teacher_that_is_sure_of_nothing_teaches_nothing(dtype):
    case = cases.shared()
    case["teacher_logits"][:] = -1e4
    case["teacher_boxes"][:] = np.nan
    assert_vanishes(loss, to_tensors(case, dtype), wrt=STUDENT)


@pytest.mark.parametrize(
    ("argument", "change", "error", "match"),
    [
        ("student_logits", lambda x: x.long(), TypeError, "`student_logits` must have a floating-point dtype, got"),
        ("student_boxes", lambda x: x[..., :3], ValueError, r"`student_boxes` must have shape \(\.\.\., N, 4\), got"),
        ("teacher_boxes", to_meta, ValueError, "`teacher_boxes` must be on the device of `teacher_logits` cpu, got"),
        ("weighting", "focal", ValueError, "`weighting` must be one of 'confidence', 'uniform', got 'focal'"),
        ("class_loss", "mse", ValueError, "`class_loss` must be one of 'kl', 'bce', got 'mse'"),
        ("teacher_activation", "softmax", ValueError, "`teacher_logits` must have the student's 4 classes .*, got 3"),
        ("student_activation", "tanh", ValueError, "`student_activation` must be one of 'sigmoid', 'softmax', got"),
        ("temperature", 0.0, ValueError, "`temperature` must be greater than 0, got 0.0"),
    ],
)
def test_errors(argument, change, error, match):
    assert_rejects(loss, cases.shared(), argument, change, error, match)


def test_errors_of_combinations():
    arguments = to_tensors(cases.shared())
    fewer = {name: arguments[name][:, :, 1:] for name in ("teacher_logits", "teacher_boxes")}
    message = r"`student_logits` and `teacher_logits` must have the same dimensions \(L, B, K\), got .*4\) and .*3\)"
    with pytest.raises(ValueError, match=message):
        loss(**{**arguments, **fewer})
    with pytest.raises(ValueError, match=r"`student_logits` must have shape \(L, B, N, C\) or \(B, N, C\), got"):
        loss(**{name: tensor[0, 0] for name, tensor in arguments.items()})
    with pytest.raises(ValueError, match="`class_loss` must be 'kl' for a softmax student, got 'bce'"):
        dkl.SharedQueryDistillationLoss(class_loss="bce", student_activation="softmax")


@pytest.mark.parametrize(("share", "number"), [(1.0, 9), (1 / 3, 3), (0.33333, 3), (0.34, 4), (0.01, 1)])
def test_best_queries(share, number):
    logits = torch.randn(2, 9, 4)
    index = dkl.best_queries(logits, share)
    assert index.shape == (2, number)
    confidence = dkl.confidence_weight(logits)
    assert torch.equal(confidence.gather(-1, index), confidence.sort(descending=True).values[:, :number])


@pytest.mark.parametrize(
    ("share", "message"),
    [(0.0, "`share` must be greater than 0, got 0.0"), (1.5, r"`share` must be in \[0, 1\], got 1.5")],
)
def test_best_queries_are_a_share(share, message):
    with pytest.raises(ValueError, match=message):
        dkl.best_queries(torch.randn(2, 9, 4), share)
