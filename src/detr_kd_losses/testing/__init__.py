"""A kit to property-test losses, matchers and solvers with Hypothesis (extra ``testing``).

    >>> import detr_kd_losses as dkl
    >>> from detr_kd_losses.testing import check_hungarian_distillation_loss
    >>> check_hungarian_distillation_loss(dkl.hungarian_distillation_loss, max_examples=2)

:mod:`~detr_kd_losses.testing.laws` and :mod:`~detr_kd_losses.testing.assignment_laws` have the laws, by name;
:mod:`~detr_kd_losses.testing.strategies` what they are tried on.
"""

from detr_kd_losses.testing.assignment_laws import (
    ASSIGNMENT_LAWS,
    TARGET_MATCHING_LAWS,
    TEACHER_MATCHING_LAWS,
    check_linear_sum_assignment,
    check_match_targets,
    check_match_teacher,
)
from detr_kd_losses.testing.law import Law, check_laws
from detr_kd_losses.testing.laws import (
    CRITERION_LAWS,
    DETECTION_LAWS,
    FEATURE_LAWS,
    HUNGARIAN_DISTILLATION_LAWS,
    check_detection_loss,
    check_distillation_criterion,
    check_hungarian_distillation_loss,
    check_target_aware_feature_loss,
)

__all__ = [
    "ASSIGNMENT_LAWS",
    "CRITERION_LAWS",
    "DETECTION_LAWS",
    "FEATURE_LAWS",
    "HUNGARIAN_DISTILLATION_LAWS",
    "TARGET_MATCHING_LAWS",
    "TEACHER_MATCHING_LAWS",
    "Law",
    "check_detection_loss",
    "check_distillation_criterion",
    "check_hungarian_distillation_loss",
    "check_laws",
    "check_linear_sum_assignment",
    "check_match_targets",
    "check_match_teacher",
    "check_target_aware_feature_loss",
]
