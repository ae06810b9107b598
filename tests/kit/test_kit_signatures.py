"""The calls that laws make: printed, in the docstrings, and accepted by our own functions."""

from __future__ import annotations

import inspect
from functools import partial

import pytest

import detr_kd_losses as dkl
from detr_kd_losses import testing
from detr_kd_losses.testing import checks, signatures
from detr_kd_losses.testing.pair_makers import BINS, SCALE
from detr_kd_losses.testing.subject import Subject

OURS = {
    "CRITERION": (dkl.DETRDistillationLoss(), testing.CRITERION_LAWS, testing.check_distillation_criterion),
    "COSTS": (dkl.linear_sum_assignment, testing.ASSIGNMENT_LAWS, testing.check_linear_sum_assignment),
    "DETECTION": (dkl.detection_loss, testing.DETECTION_LAWS, testing.check_detection_loss),
    "DISTILLATION": (
        dkl.hungarian_distillation_loss,
        testing.HUNGARIAN_DISTILLATION_LAWS,
        testing.check_hungarian_distillation_loss,
    ),
    "FEATURES": (dkl.target_aware_feature_loss, testing.FEATURE_LAWS, testing.check_target_aware_feature_loss),
    "WEIGHTED_DISTILLATION": (
        dkl.hungarian_distillation_loss,
        testing.WEIGHTED_DISTILLATION_LAWS,
        testing.check_weighted_distillation_loss,
    ),
    "SHARED_QUERIES": (
        dkl.shared_query_distillation_loss,
        testing.SHARED_QUERY_LAWS,
        testing.check_shared_query_distillation_loss,
    ),
    "PLAIN_FEATURES": (
        dkl.feature_distillation_loss,
        testing.PLAIN_FEATURE_LAWS,
        testing.check_feature_distillation_loss,
    ),
    "BOX_DISTRIBUTIONS": (
        partial(dkl.box_distribution_loss, student_bins=BINS, student_scale=SCALE),
        testing.BOX_DISTRIBUTION_LAWS,
        testing.check_box_distribution_loss,
    ),
    "MASKS": (dkl.mask_distillation_loss, testing.MASK_LAWS, testing.check_mask_distillation_loss),
    "TARGET_MATCHING": (dkl.match_targets, testing.TARGET_MATCHING_LAWS, testing.check_match_targets),
    "TEACHER_MATCHING": (dkl.match_teacher, testing.TEACHER_MATCHING_LAWS, testing.check_match_teacher),
}


def test_every_check_has_a_signature():
    assert {check.__name__ for _, _, check in OURS.values()} == set(checks.__all__)


@pytest.mark.parametrize("name", OURS)
def test_a_check_says_what_it_calls(name):
    _, laws, check = OURS[name]
    signature = getattr(signatures, name)
    assert all(law.signature == signature for law in laws.values())
    text = " ".join(inspect.getdoc(check).replace("``", "").split())
    assert f"`signatures.{name}`: {signature} skip:" in text


@pytest.mark.parametrize("name", OURS)
def test_ours_accept_their_signature(name):
    function, laws, _ = OURS[name]
    signature = getattr(signatures, name)
    signature.require_accepted(Subject(function), {keyword for law in laws.values() for keyword in law.needs})
    parameters = inspect.signature(function.forward if name == "CRITERION" else function).parameters
    if name != "CRITERION":
        assert list(parameters)[: len(signature.by_position)] == signature.by_position
        assert set(signature.by_keyword) <= set(parameters)


@pytest.mark.parametrize("name", OURS)
def test_what_is_drawn_has_the_axes_of_its_signature(name):
    signature = getattr(signatures, name)
    law = next(iter(OURS[name][1].values()))

    def look(function, arguments):
        assert set(arguments.tensors) <= set(signature.axes)
        for argument, tensor in arguments.tensors.items():
            assert tensor.ndim == len(signature.axes[argument])
        for axis in set("".join(signature.axes.values())):
            sizes = {
                arguments[argument].shape[signature.axes[argument].index(axis)] for argument in arguments.having(axis)
            }
            assert len(sizes) <= 1
        assert set(signature.by_position) <= set(arguments.tensors) or signature.pack

    type(law)("axes", "every axis has one size", look, law.arguments, signature)(OURS[name][0], max_examples=20)


def test_a_signature_is_printed_as_a_call():
    assert str(signatures.DISTILLATION) == (
        "(student_logits (L, B, N, C), student_boxes (L, B, N, 4), "
        "teacher_logits (L, B, M, C), teacher_boxes (L, B, M, 4), "
        "assignment (L, B, N), *, teacher_positive (L, B, M)) -> a dict of scalars by name, or a scalar"
    )
    assert str(signatures.CRITERION).startswith("(student: DetectorOutput, teacher: DetectorOutput, targets: Targets)")
