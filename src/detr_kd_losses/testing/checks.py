"""One call for all laws of a signature.

All of them raise as :func:`check_laws` does. The letters are those of :mod:`~detr_kd_losses.testing.signatures`.
"""

from __future__ import annotations

from collections.abc import Collection

from detr_kd_losses.testing.law import Function, check_laws
from detr_kd_losses.testing.loss_laws import (
    CRITERION_LAWS,
    DETECTION_LAWS,
    FEATURE_LAWS,
    HUNGARIAN_DISTILLATION_LAWS,
)
from detr_kd_losses.testing.pair_laws import BOX_DISTRIBUTION_LAWS, MASK_LAWS
from detr_kd_losses.testing.plain_feature_laws import PLAIN_FEATURE_LAWS
from detr_kd_losses.testing.query_laws import SHARED_QUERY_LAWS, WEIGHTED_DISTILLATION_LAWS
from detr_kd_losses.testing.solver_laws import ASSIGNMENT_LAWS, TARGET_MATCHING_LAWS, TEACHER_MATCHING_LAWS

__all__ = [
    "check_box_distribution_loss",
    "check_detection_loss",
    "check_distillation_criterion",
    "check_feature_distillation_loss",
    "check_hungarian_distillation_loss",
    "check_linear_sum_assignment",
    "check_mask_distillation_loss",
    "check_match_targets",
    "check_match_teacher",
    "check_shared_query_distillation_loss",
    "check_target_aware_feature_loss",
    "check_weighted_distillation_loss",
]


def check_hungarian_distillation_loss(
    loss: Function, *, skip: Collection[str] = (), max_examples: int | None = None
) -> None:
    """Check a distillation loss by HUNGARIAN_DISTILLATION_LAWS.

    Args:
        loss: What takes this call, `signatures.DISTILLATION`:
            ``(student_logits (L, B, N, C), student_boxes (L, B, N, 4), teacher_logits (L, B, M, C),
            teacher_boxes (L, B, M, 4), assignment (L, B, N), *, teacher_positive (L, B, M))`` -> a dict of
            scalars by name, or a scalar
        skip: Names of laws that are not meant to hold.
        max_examples: Number of arguments for each law; None: as the profile of Hypothesis says.

    Raises:
        AssertionError: If a law is broken: ``law broken: <name>: <sentence>``.
        LawNotApplicable: If no law is broken, but some need what the function does not have.
        ValueError: If `skip` has a name that is no law's.

    Examples:
        >>> import detr_kd_losses as dkl
        >>> check_hungarian_distillation_loss(dkl.hungarian_distillation_loss, max_examples=1)
    """
    check_laws(HUNGARIAN_DISTILLATION_LAWS, loss, skip=skip, max_examples=max_examples)


def check_weighted_distillation_loss(
    loss: Function, *, skip: Collection[str] = (), max_examples: int | None = None
) -> None:
    """Check a distillation loss that takes weights of the teacher queries by WEIGHTED_DISTILLATION_LAWS.

    Args:
        loss: What takes this call, `signatures.WEIGHTED_DISTILLATION`:
            ``(student_logits (L, B, N, C), student_boxes (L, B, N, 4), teacher_logits (L, B, M, C),
            teacher_boxes (L, B, M, 4), assignment (L, B, N), *, teacher_positive (L, B, M),
            teacher_weight (L, B, M))`` -> a dict of scalars by name, or a scalar
        skip: Names of laws that are not meant to hold.
        max_examples: Number of arguments for each law; None: as the profile of Hypothesis says.

    Raises:
        AssertionError: If a law is broken: ``law broken: <name>: <sentence>``.
        LawNotApplicable: If no law is broken, but some need what the function does not have.
        ValueError: If `skip` has a name that is no law's.

    Examples:
        >>> import detr_kd_losses as dkl
        >>> check_weighted_distillation_loss(dkl.hungarian_distillation_loss, max_examples=1)
    """
    check_laws(WEIGHTED_DISTILLATION_LAWS, loss, skip=skip, max_examples=max_examples)


def check_shared_query_distillation_loss(
    loss: Function, *, skip: Collection[str] = (), max_examples: int | None = None
) -> None:
    """Check a loss of queries that ran through both decoders by SHARED_QUERY_LAWS.

    Args:
        loss: What takes this call, `signatures.SHARED_QUERIES`:
            ``(student_logits (L, B, K, C), student_boxes (L, B, K, 4), teacher_logits (L, B, K, C),
            teacher_boxes (L, B, K, 4))`` -> a dict of scalars by name, or a scalar
        skip: Names of laws that are not meant to hold.
        max_examples: Number of arguments for each law; None: as the profile of Hypothesis says.

    Raises:
        AssertionError: If a law is broken: ``law broken: <name>: <sentence>``.
        LawNotApplicable: If no law is broken, but some need what the function does not have.
        ValueError: If `skip` has a name that is no law's.

    Examples:
        >>> import detr_kd_losses as dkl
        >>> check_shared_query_distillation_loss(dkl.shared_query_distillation_loss, max_examples=1)
    """
    check_laws(SHARED_QUERY_LAWS, loss, skip=skip, max_examples=max_examples)


def check_detection_loss(loss: Function, *, skip: Collection[str] = (), max_examples: int | None = None) -> None:
    """Check a detection loss by DETECTION_LAWS.

    Args:
        loss: What takes this call, `signatures.DETECTION`:
            ``(logits (L, B, N, C), boxes (L, B, N, 4), target_labels (B, T), target_boxes (B, T, 4),
            target_mask (B, T), assignment (L, B, N))`` -> a dict of scalars by name, or a scalar
        skip: Names of laws that are not meant to hold.
        max_examples: Number of arguments for each law; None: as the profile of Hypothesis says.

    Raises:
        AssertionError: If a law is broken: ``law broken: <name>: <sentence>``.
        LawNotApplicable: If no law is broken, but some need what the function does not have.
        ValueError: If `skip` has a name that is no law's.

    Examples:
        >>> import detr_kd_losses as dkl
        >>> check_detection_loss(dkl.detection_loss, max_examples=1)
    """
    check_laws(DETECTION_LAWS, loss, skip=skip, max_examples=max_examples)


def check_target_aware_feature_loss(
    loss: Function, *, skip: Collection[str] = (), max_examples: int | None = None
) -> None:
    """Check a feature loss by FEATURE_LAWS.

    Args:
        loss: What takes this call, `signatures.FEATURES`:
            ``(student_features (B, D, H, W), teacher_features (B, D, H, W), teacher_queries (L, B, M, D),
            quality (L, B, M), *, padding_mask (B, H, W))`` -> a dict of scalars by name, or a scalar
        skip: Names of laws that are not meant to hold.
        max_examples: Number of arguments for each law; None: as the profile of Hypothesis says.

    Raises:
        AssertionError: If a law is broken: ``law broken: <name>: <sentence>``.
        LawNotApplicable: If no law is broken, but some need what the function does not have.
        ValueError: If `skip` has a name that is no law's.

    Examples:
        >>> import detr_kd_losses as dkl
        >>> check_target_aware_feature_loss(dkl.target_aware_feature_loss, max_examples=1)
    """
    check_laws(FEATURE_LAWS, loss, skip=skip, max_examples=max_examples)


def check_feature_distillation_loss(
    loss: Function, *, skip: Collection[str] = (), max_examples: int | None = None
) -> None:
    """Check a plain distance of features by PLAIN_FEATURE_LAWS.

    Args:
        loss: What takes this call, `signatures.PLAIN_FEATURES`:
            ``(student_features (B, D, H, W), teacher_features (B, D, H, W), *, weight (B, H, W),
            padding_mask (B, H, W))`` -> a dict of scalars by name, or a scalar
        skip: Names of laws that are not meant to hold.
        max_examples: Number of arguments for each law; None: as the profile of Hypothesis says.

    Raises:
        AssertionError: If a law is broken: ``law broken: <name>: <sentence>``.
        LawNotApplicable: If no law is broken, but some need what the function does not have.
        ValueError: If `skip` has a name that is no law's.

    Examples:
        >>> import detr_kd_losses as dkl
        >>> check_feature_distillation_loss(dkl.feature_distillation_loss, max_examples=1)
    """
    check_laws(PLAIN_FEATURE_LAWS, loss, skip=skip, max_examples=max_examples)


def check_box_distribution_loss(loss: Function, *, skip: Collection[str] = (), max_examples: int | None = None) -> None:
    """Check a loss of box distributions, whose bins and scale are set, by BOX_DISTRIBUTION_LAWS.

    Args:
        loss: What takes this call, `signatures.BOX_DISTRIBUTIONS`:
            ``(student_distributions (L, B, N, E), student_references (L, B, N, 4), teacher_distributions (L, B, M, E),
            teacher_references (L, B, M, 4), assignment (L, B, N), *, teacher_weight (L, B, M))`` -> a dict of scalars
            by name, or a scalar
        skip: Names of laws that are not meant to hold.
        max_examples: Number of arguments for each law; None: as the profile of Hypothesis says.

    Raises:
        AssertionError: If a law is broken: ``law broken: <name>: <sentence>``.
        LawNotApplicable: If no law is broken, but some need what the function does not have.
        ValueError: If `skip` has a name that is no law's.

    Examples:
        >>> from functools import partial
        >>> import detr_kd_losses as dkl
        >>> from detr_kd_losses.testing.pair_makers import BINS, SCALE
        >>> loss = partial(dkl.box_distribution_loss, student_bins=BINS, student_scale=SCALE)
        >>> check_box_distribution_loss(loss, max_examples=1)
    """
    check_laws(BOX_DISTRIBUTION_LAWS, loss, skip=skip, max_examples=max_examples)


def check_mask_distillation_loss(
    loss: Function, *, skip: Collection[str] = (), max_examples: int | None = None
) -> None:
    """Check a loss of masks by MASK_LAWS.

    Args:
        loss: What takes this call, `signatures.MASKS`:
            ``(student_masks (L, B, N, H, W), teacher_masks (L, B, M, H, W), assignment (L, B, N), *,
            boxes (L, B, M, 4), teacher_weight (L, B, M))`` -> a dict of scalars by name, or a scalar
        skip: Names of laws that are not meant to hold.
        max_examples: Number of arguments for each law; None: as the profile of Hypothesis says.

    Raises:
        AssertionError: If a law is broken: ``law broken: <name>: <sentence>``.
        LawNotApplicable: If no law is broken, but some need what the function does not have.
        ValueError: If `skip` has a name that is no law's.

    Examples:
        >>> import detr_kd_losses as dkl
        >>> check_mask_distillation_loss(dkl.mask_distillation_loss, max_examples=1)
    """
    check_laws(MASK_LAWS, loss, skip=skip, max_examples=max_examples)


def check_distillation_criterion(
    criterion: Function, *, skip: Collection[str] = (), max_examples: int | None = None
) -> None:
    """Check a whole criterion by CRITERION_LAWS.

    Args:
        criterion: What takes this call, `signatures.CRITERION`:
            ``(student: DetectorOutput, teacher: DetectorOutput, targets: Targets)`` -> a dict of scalars by
            name, or a scalar
        skip: Names of laws that are not meant to hold.
        max_examples: Number of arguments for each law; None: as the profile of Hypothesis says.

    Raises:
        AssertionError: If a law is broken: ``law broken: <name>: <sentence>``.
        LawNotApplicable: If no law is broken, but some need what the function does not have.
        ValueError: If `skip` has a name that is no law's.

    Examples:
        >>> import detr_kd_losses as dkl
        >>> check_distillation_criterion(dkl.DETRDistillationLoss(), max_examples=1)
    """
    check_laws(CRITERION_LAWS, criterion, skip=skip, max_examples=max_examples)


def check_linear_sum_assignment(
    solver: Function, *, skip: Collection[str] = (), max_examples: int | None = None
) -> None:
    """Check an assignment solver by ASSIGNMENT_LAWS.

    Args:
        solver: What takes this call, `signatures.COSTS`:
            ``(cost (B, N, T), *, row_mask (B, N), column_mask (B, T))`` -> column of each row (B, N) int64, -1
            = none
        skip: Names of laws that are not meant to hold.
        max_examples: Number of arguments for each law; None: as the profile of Hypothesis says.

    Raises:
        AssertionError: If a law is broken: ``law broken: <name>: <sentence>``.
        LawNotApplicable: If no law is broken, but some need what the function does not have.
        ValueError: If `skip` has a name that is no law's.

    Examples:
        >>> import detr_kd_losses as dkl
        >>> check_linear_sum_assignment(dkl.linear_sum_assignment, max_examples=1)
    """
    check_laws(ASSIGNMENT_LAWS, solver, skip=skip, max_examples=max_examples)


def check_match_targets(match: Function, *, skip: Collection[str] = (), max_examples: int | None = None) -> None:
    """Check a matcher of targets by TARGET_MATCHING_LAWS.

    Args:
        match: What takes this call, `signatures.TARGET_MATCHING`:
            ``(logits (L, B, N, C), boxes (L, B, N, 4), target_labels (B, T), target_boxes (B, T, 4),
            target_mask (B, T))`` -> partner of each query (L, B, N) int64, -1 = none
        skip: Names of laws that are not meant to hold.
        max_examples: Number of arguments for each law; None: as the profile of Hypothesis says.

    Raises:
        AssertionError: If a law is broken: ``law broken: <name>: <sentence>``.
        LawNotApplicable: If no law is broken, but some need what the function does not have.
        ValueError: If `skip` has a name that is no law's.

    Examples:
        >>> import detr_kd_losses as dkl
        >>> check_match_targets(dkl.match_targets, max_examples=1)
    """
    check_laws(TARGET_MATCHING_LAWS, match, skip=skip, max_examples=max_examples)


def check_match_teacher(match: Function, *, skip: Collection[str] = (), max_examples: int | None = None) -> None:
    """Check a matcher of teacher queries by TEACHER_MATCHING_LAWS.

    Args:
        match: What takes this call, `signatures.TEACHER_MATCHING`:
            ``(student_logits (L, B, N, C), student_boxes (L, B, N, 4), teacher_logits (L, B, M, C),
            teacher_boxes (L, B, M, 4), *, teacher_positive (L, B, M))`` -> partner of each query (L, B, N)
            int64, -1 = none
        skip: Names of laws that are not meant to hold.
        max_examples: Number of arguments for each law; None: as the profile of Hypothesis says.

    Raises:
        AssertionError: If a law is broken: ``law broken: <name>: <sentence>``.
        LawNotApplicable: If no law is broken, but some need what the function does not have.
        ValueError: If `skip` has a name that is no law's.

    Examples:
        >>> import detr_kd_losses as dkl
        >>> check_match_teacher(dkl.match_teacher, max_examples=1)
    """
    check_laws(TEACHER_MATCHING_LAWS, match, skip=skip, max_examples=max_examples)
