"""A kit to property-test losses, matchers and solvers with Hypothesis (``pip install 'detr-kd-losses[testing]'``).

One call tries all laws, and raises "law broken: <name>: <sentence>" with the smallest calls that show it:

    >>> import detr_kd_losses as dkl
    >>> from detr_kd_losses.testing import HUNGARIAN_DISTILLATION_LAWS, check_hungarian_distillation_loss, law_report
    >>> check_hungarian_distillation_loss(dkl.hungarian_distillation_loss, max_examples=2)

Another makes a table of which laws are kept, broken or not applicable:

    >>> report = law_report(HUNGARIAN_DISTILLATION_LAWS, dkl.hungarian_distillation_loss, max_examples=2)
    >>> print(report)  # doctest: +ELLIPSIS
    no_pairs             passed          without pairs the loss is 0, with a graph
    zero_at_teacher      passed          where the student equals the teacher, loss and gradient are 0
    ...

In pytest, one line makes a test of each law::

    @pytest.mark.parametrize("law", HUNGARIAN_DISTILLATION_LAWS.values(), ids=str)
    def test_my_loss_obeys(law):
        law(my_loss)

What a function is called with stands in :mod:`~detr_kd_losses.testing.signatures`; options are set by
`functools.partial`. Arguments after ``*`` may be left out: a function that does not take them is tried without them,
and the laws that need them raise :class:`LawNotApplicable`, which says what to put into ``skip``. A loss that returns a
scalar is told likewise which laws need its terms by name.

:mod:`~detr_kd_losses.testing.loss_laws`, :mod:`~detr_kd_losses.testing.query_laws`,
:mod:`~detr_kd_losses.testing.pair_laws`, :mod:`~detr_kd_losses.testing.plain_feature_laws`,
:mod:`~detr_kd_losses.testing.relative_feature_laws` and :mod:`~detr_kd_losses.testing.solver_laws` have the laws,
:mod:`~detr_kd_losses.testing.law` how to write one,
:mod:`~detr_kd_losses.testing.makers`, :mod:`~detr_kd_losses.testing.query_makers` and
:mod:`~detr_kd_losses.testing.pair_makers` the calls that an error names,
:mod:`~detr_kd_losses.testing.strategies` what arguments are drawn from.
"""

try:
    import hypothesis as _  # noqa: F401
except ModuleNotFoundError as error:
    msg = "detr_kd_losses.testing needs Hypothesis: pip install 'detr-kd-losses[testing]'"
    raise ModuleNotFoundError(msg, name=error.name) from error

from detr_kd_losses.testing.checks import (
    check_box_distribution_loss,
    check_detection_loss,
    check_distillation_criterion,
    check_feature_distillation_loss,
    check_hungarian_distillation_loss,
    check_linear_sum_assignment,
    check_mask_distillation_loss,
    check_match_targets,
    check_match_teacher,
    check_shared_query_distillation_loss,
    check_target_aware_feature_loss,
    check_weighted_distillation_loss,
)
from detr_kd_losses.testing.law import Law, check_laws
from detr_kd_losses.testing.loss_laws import (
    CRITERION_LAWS,
    DETECTION_LAWS,
    FEATURE_LAWS,
    HUNGARIAN_DISTILLATION_LAWS,
)
from detr_kd_losses.testing.pair_laws import BOX_DISTRIBUTION_LAWS, MASK_LAWS
from detr_kd_losses.testing.plain_feature_laws import PLAIN_FEATURE_LAWS
from detr_kd_losses.testing.query_laws import SHARED_QUERY_LAWS, WEIGHTED_DISTILLATION_LAWS
from detr_kd_losses.testing.relative_feature_laws import RELATIVE_FEATURE_LAWS
from detr_kd_losses.testing.report import LawReport, Verdict, law_report
from detr_kd_losses.testing.solver_laws import ASSIGNMENT_LAWS, TARGET_MATCHING_LAWS, TEACHER_MATCHING_LAWS
from detr_kd_losses.testing.subject import LawNotApplicable

__all__ = [
    "ASSIGNMENT_LAWS",
    "BOX_DISTRIBUTION_LAWS",
    "CRITERION_LAWS",
    "DETECTION_LAWS",
    "FEATURE_LAWS",
    "HUNGARIAN_DISTILLATION_LAWS",
    "MASK_LAWS",
    "PLAIN_FEATURE_LAWS",
    "RELATIVE_FEATURE_LAWS",
    "SHARED_QUERY_LAWS",
    "TARGET_MATCHING_LAWS",
    "TEACHER_MATCHING_LAWS",
    "WEIGHTED_DISTILLATION_LAWS",
    "Law",
    "LawNotApplicable",
    "LawReport",
    "Verdict",
    "check_box_distribution_loss",
    "check_detection_loss",
    "check_distillation_criterion",
    "check_feature_distillation_loss",
    "check_hungarian_distillation_loss",
    "check_laws",
    "check_linear_sum_assignment",
    "check_mask_distillation_loss",
    "check_match_targets",
    "check_match_teacher",
    "check_shared_query_distillation_loss",
    "check_target_aware_feature_loss",
    "check_weighted_distillation_loss",
    "law_report",
]
