"""Our own losses, matching and solvers under the laws of `detr_kd_losses.testing`."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import detr_kd_losses as dkl
from detr_kd_losses import testing
from detr_kd_losses.assignment import BACKENDS, _cpu

# Laws that an option gives up by its meaning: a cross-entropy has the teacher's entropy as its least value, and so has
# a student whose head cannot say what the teacher's does.
NOT_ZERO = ("zero_at_teacher", "zero_at_empty_boxes")


def applied(laws, function, *skipped, **options):
    """One test case per law that the function with these options obeys."""
    name = " ".join([function.__name__, *(f"{key}={value}" for key, value in options.items())])
    return [
        pytest.param(law, partial(function, **options), id=f"{name}-{law}")
        for law in laws.values()
        if law.name not in skipped
    ]


def of_other_heads(**options):
    """The distillation loss between heads of which the sigmoid one has a channel less."""

    def loss(student_logits, student_boxes, teacher_logits, *others, **more):
        if options["student_activation"] == "softmax":
            teacher_logits = teacher_logits[..., :-1]
        else:
            student_logits = student_logits[..., :-1]
        return dkl.hungarian_distillation_loss(
            student_logits, student_boxes, teacher_logits, *others, **options, **more
        )

    loss.__name__ = " to ".join([options["teacher_activation"], options["student_activation"]])
    return loss


distillation = partial(applied, testing.HUNGARIAN_DISTILLATION_LAWS)
detection = partial(applied, testing.DETECTION_LAWS)
features = partial(applied, testing.FEATURE_LAWS)


@pytest.mark.parametrize(
    ("law", "loss"),
    [
        *distillation(dkl.hungarian_distillation_loss),
        *distillation(dkl.hungarian_distillation_loss, *NOT_ZERO, class_loss="bce"),
        *distillation(
            dkl.hungarian_distillation_loss, student_activation="softmax", teacher_activation="softmax", temperature=2.0
        ),
        *distillation(of_other_heads(student_activation="softmax", teacher_activation="sigmoid"), *NOT_ZERO),
        *distillation(of_other_heads(student_activation="sigmoid", teacher_activation="softmax"), *NOT_ZERO),
        *distillation(
            dkl.hungarian_distillation_loss, "negatives_by_box", weight_negative=0.5, weight_negative_class=0.3
        ),
        *detection(dkl.detection_loss),
        *detection(dkl.detection_loss, class_loss="cross_entropy"),
        *detection(dkl.teacher_assigned_query_loss),
        *features(dkl.target_aware_feature_loss),
        *features(dkl.target_aware_feature_loss, variant="official"),
        *features(dkl.target_aware_feature_loss, normalize="max"),
        *features(dkl.target_aware_feature_loss, normalize="mean"),
        *features(dkl.target_aware_feature_loss, variant="official", normalize="mean"),
    ],
)
def test_a_loss_obeys(law, loss):
    law(loss)


@pytest.mark.parametrize(
    "options",
    [
        {"preset": "official"},
        {"preset": "paper"},
        {"student_activation": "softmax", "teacher_activation": "softmax", "temperature": 2.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("law", testing.CRITERION_LAWS.values(), ids=str)
def test_the_criterion_obeys(law, options):
    law(dkl.DETRDistillationLoss(**options))


RUNNABLE = [name for name, solver in BACKENDS.items() if not solver.unsupported_reasons(torch.zeros(1, 2, 2))]


@pytest.mark.parametrize(
    ("law", "function"),
    [
        case
        for backend in RUNNABLE
        for case in [
            *applied(testing.ASSIGNMENT_LAWS, dkl.linear_sum_assignment, backend=backend),
            *applied(testing.TARGET_MATCHING_LAWS, dkl.match_targets, backend=backend),
            *applied(testing.TEACHER_MATCHING_LAWS, dkl.match_teacher, backend=backend),
        ]
    ],
)
def test_a_solver_or_matcher_obeys(law, function, monkeypatch):
    monkeypatch.setattr(_cpu, "_LAPX_SIZE", 0)  # small problems would go to SciPy
    law(function)
