"""The kit under functions that lack what some laws need: it says so, and never passes such a law."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from functools import partial

import pytest
import torch

import detr_kd_losses as dkl
from detr_kd_losses import testing
from detr_kd_losses.testing import loss_laws, signatures
from detr_kd_losses.testing.arguments import Arguments, Signature
from detr_kd_losses.testing.law import Law, law, laws_by_name
from detr_kd_losses.testing.makers import cost_arguments, distillation_arguments
from detr_kd_losses.testing.pair_makers import BINS, SCALE
from detr_kd_losses.testing.signatures import COSTS
from detr_kd_losses.testing.subject import MissingError, Subject

LISTS = [getattr(testing, name) for name in testing.__all__ if name.endswith("_LAWS")]


def scalar_loss(*args, teacher_positive=None, weight_class=1.0, weight_bbox=5.0, weight_giou=2.0):
    weights = {"weight_class": weight_class, "weight_bbox": weight_bbox, "weight_giou": weight_giou}
    return sum(dkl.hungarian_distillation_loss(*args, teacher_positive=teacher_positive, **weights).values())


def plain_loss(student_logits, student_boxes, teacher_logits, teacher_boxes, assignment):
    return scalar_loss(student_logits, student_boxes, teacher_logits, teacher_boxes, assignment)


def solver(cost):
    return dkl.linear_sum_assignment(cost)


def not_applicable(law, function):
    with pytest.raises(testing.LawNotApplicable) as error:
        law(function, max_examples=2)
    return str(error.value)


def test_a_scalar_loss_has_no_terms_by_name():
    assert not_applicable(testing.HUNGARIAN_DISTILLATION_LAWS["weights_linear"], scalar_loss) == (
        "law not applicable: weights_linear needs a loss that returns terms by name (a dict), got a scalar; "
        "skip=('weights_linear',)"
    )
    testing.check_hungarian_distillation_loss(scalar_loss, skip=("weights_linear",), max_examples=5)


def test_terms_by_other_names():
    def renamed(*args, **options):
        return {f"kd_{name}": term for name, term in dkl.detection_loss(*args, **options).items()}

    message = not_applicable(testing.DETECTION_LAWS["no_targets"], renamed)
    assert "returns the terms loss_bbox, loss_giou, got kd_loss_class, kd_loss_bbox, kd_loss_giou;" in message


@pytest.mark.parametrize("answer", [1.0, (torch.zeros(()),), None])
def test_a_loss_returns_tensors(answer):
    message = not_applicable(testing.DETECTION_LAWS["non_negative"], lambda *args: answer)
    assert f"needs a loss that returns a tensor or a dict of tensors, got {type(answer).__name__};" in message


@pytest.mark.parametrize("law", ["non_negative", "no_targets", "weights_linear"])
@pytest.mark.parametrize(
    ("answer", "got"),
    [
        ({}, "an empty dict"),
        ({"loss_class": torch.zeros(()), "loss_bbox": 0.5}, "dict with {'loss_bbox': 'float'}"),
        (None, "NoneType"),
    ],
)
def test_what_is_no_tensor_is_no_term(law, answer, got):
    """Terms that were summed up by `.item()` have no gradient; an empty dict would be finite, and at least 0."""
    message = not_applicable(testing.DETECTION_LAWS[law], lambda *args, **options: answer)
    assert f"{law} needs a loss that returns a tensor or a dict of tensors, got {got};" in message


def test_all_that_must_be_skipped_is_told_at_once():
    with pytest.raises(testing.LawNotApplicable) as error:
        testing.check_hungarian_distillation_loss(plain_loss, max_examples=2)
    assert str(error.value).splitlines() == [
        "laws not applicable:",
        "  weights_linear needs the options weight_class, weight_bbox, weight_giou, which plain_loss does not take",
        "  negatives_by_box needs the option teacher_positive, which plain_loss does not take",
        "  skip=('weights_linear', 'negatives_by_box')",
    ]
    testing.check_hungarian_distillation_loss(plain_loss, skip=tuple(error.value.reasons), max_examples=5)


def test_a_solver_without_masks():
    with pytest.raises(testing.LawNotApplicable) as error:
        testing.check_linear_sum_assignment(solver, max_examples=2)
    assert str(error.value) == (
        "law not applicable: masks needs the options row_mask, column_mask, which solver does not take; skip=('masks',)"
    )
    testing.check_linear_sum_assignment(solver, skip=("masks",), max_examples=10)


def test_it_can_be_sent_to_another_process():
    error = testing.LawNotApplicable({"masks": "needs masks"}, "add them")
    copy = pickle.loads(pickle.dumps(error))
    assert str(copy) == str(error) == "law not applicable: masks needs masks; add them"
    assert copy.reasons == error.reasons


def test_one_mask_is_not_enough():
    message = not_applicable(
        testing.ASSIGNMENT_LAWS["masks"],
        lambda cost, *, row_mask=None: dkl.linear_sum_assignment(cost, row_mask=row_mask),
    )
    assert "needs the option column_mask" in message


def test_a_matcher_that_knows_no_positives():
    def match(*predictions):
        return dkl.match_teacher(*predictions)

    with pytest.raises(testing.LawNotApplicable, match="positives_first needs the option teacher_positive"):
        testing.check_match_teacher(match, max_examples=5)


def test_a_matcher_that_ignores_positives():
    def match(*predictions, teacher_positive=None):
        return dkl.match_teacher(*predictions)

    for name in ("optimal", "positives_first"):
        with pytest.raises(AssertionError, match=f"^law broken: {name}: "):
            testing.TEACHER_MATCHING_LAWS[name](match, max_examples=200)


def test_a_broken_law_is_told_before_what_does_not_apply():
    def attached(student_logits, student_boxes, teacher_logits, teacher_boxes, assignment):
        numbers = teacher_logits.nan_to_num()
        loss = plain_loss(student_logits, student_boxes, teacher_logits, teacher_boxes, assignment)
        return loss + (numbers - numbers.detach()).sum()

    with pytest.raises(AssertionError, match=r"^law broken: teacher_detached: "):
        testing.check_hungarian_distillation_loss(attached, max_examples=5)


@pytest.mark.parametrize(
    ("function", "said"),
    [(lambda logits, boxes: 0, "(logits, boxes): too many positional"), (lambda *args, gamma: 0, "argument: 'gamma'")],
)
def test_a_function_that_does_not_accept_the_call_is_shown_it(function, said):
    with pytest.raises(testing.LawNotApplicable) as error:
        testing.check_match_targets(function)
    message = str(error.value)
    assert message.startswith("law not applicable: optimal needs a function that takes\n  (logits (L, B, N, C), boxes ")
    assert said in message
    assert message.endswith("wrap <lambda> in a function that takes them")


def test_what_a_wrapper_hides_is_told_when_it_is_met():
    def hidden(*args, **options):
        return solver(*args, **options)

    message = not_applicable(testing.ASSIGNMENT_LAWS["masks"], hidden)
    assert "needs a function that takes row_mask, got TypeError: solver() got an unexpected keyword" in message


def test_another_type_error_breaks_the_law():
    def fails(cost, *, row_mask=None, column_mask=None):
        msg = "no such thing"
        raise TypeError(msg)

    with pytest.raises(AssertionError, match=r"^law broken: optimal: .*\nTypeError: no such thing\n"):
        testing.ASSIGNMENT_LAWS["optimal"](fails)


@pytest.mark.parametrize("accepted", [True, False])
def test_a_module_is_asked_for_its_forward(accepted):
    class Solver(torch.nn.Module):
        def forward(self, cost):
            return solver(cost)

    class Masked(torch.nn.Module):
        def forward(self, cost, *, row_mask=None, column_mask=None):
            return dkl.linear_sum_assignment(cost, row_mask=row_mask, column_mask=column_mask)

    masks = testing.ASSIGNMENT_LAWS["masks"]
    if accepted:
        masks(Masked(), max_examples=5)
    else:
        assert "which Solver does not take" in not_applicable(masks, Solver())


def test_what_cannot_be_inspected_accepts_all():
    class Odd:
        __signature__ = "unknown"

        def __call__(self):
            return None

    subject = Subject(Odd())
    assert subject.accepts("anything")
    subject.require_call(3, ["anything"], "(three arguments)")


@pytest.mark.parametrize(
    "law", [law for laws in LISTS for law in laws.values() if law.needs and not law.signature.pack], ids=str
)
def test_every_law_that_needs_a_keyword_says_which(law):
    """By a function that takes what is passed by position, and nothing else."""
    message = not_applicable(law, lambda *args: pytest.fail("was called"))
    assert (
        f"needs the option{'s' * (len(law.needs) > 1)} {', '.join(law.needs)}, which <lambda> does not take" in message
    )


@pytest.mark.parametrize("law", [law for laws in LISTS for law in laws.values()], ids=str)
def test_no_law_passes_a_function_without_any_keyword_by_a_type_error(law):
    """A law that adds a keyword by itself must say that it needs it."""
    ours = {
        "COSTS": dkl.linear_sum_assignment,
        "TARGET_MATCHING": dkl.match_targets,
        "TEACHER_MATCHING": dkl.match_teacher,
        "DISTILLATION": dkl.hungarian_distillation_loss,
        "WEIGHTED_DISTILLATION": dkl.hungarian_distillation_loss,
        "SHARED_QUERIES": dkl.shared_query_distillation_loss,
        "DETECTION": dkl.detection_loss,
        "FEATURES": dkl.target_aware_feature_loss,
        "PLAIN_FEATURES": dkl.feature_distillation_loss,
        "BOX_DISTRIBUTIONS": partial(dkl.box_distribution_loss, student_bins=BINS, student_scale=SCALE),
        "MASKS": dkl.mask_distillation_loss,
        "CRITERION": dkl.DETRDistillationLoss(),
    }
    function = ours[next(name for name in ours if getattr(signatures, name) == law.signature)]
    if law.name in testing.RELATIVE_FEATURE_LAWS.keys() - testing.FEATURE_LAWS.keys():
        function = partial(function, relative=True)

    def by_position(*args):
        return function(*args)

    try:
        law(by_position, max_examples=2)
    except testing.LawNotApplicable:
        assert law.needs


def test_laws_of_another_signature_say_what_they_lack():
    signature = Signature({"logits": "BN"}, student=("logits",))
    drawn = distillation_arguments().map(lambda _: Arguments(signature, {"logits": torch.ones(1, 2)}))
    laws = laws_by_name(
        signature, drawn, loss_laws.zero_at_teacher, loss_laws.no_pairs, loss_laws.stages_add, loss_laws.non_negative
    )
    report = testing.law_report(laws, lambda logits: logits.sum(), max_examples=2)
    assert {name: verdict.reason for name, verdict in report.verdicts.items()} == {
        "zero_at_teacher": "needs a signature that says how a student equals its teacher (`twin`)",
        "no_pairs": "needs an argument assignment, and there is none in (logits (B, N))",
        "stages_add": "needs an argument with the axis L, and there is none in (logits (B, N))",
        "non_negative": "",
    }
    assert report.names("passed") == ("non_negative",)


def test_a_law_without_arguments_is_no_law_yet():
    with pytest.raises(ValueError, match="law stages_add has no arguments: give it some by `on`"):
        loss_laws.stages_add(plain_loss)


def test_a_law_of_ones_own():
    @law("rows_first", "a row is matched where there are enough columns", needs=["row_mask"])
    def rows_first(function, arguments):
        assert function is not dkl.linear_sum_assignment
        if arguments.size("N") <= arguments.size("T"):
            assert (arguments.without("column_mask", "row_mask").call(function) >= 0).all()

    assert isinstance(rows_first, Law)
    laws = laws_by_name(COSTS, cost_arguments(kinds=("generic",)), rows_first)
    assert isinstance(laws, Mapping)
    testing.check_laws(laws, dkl.linear_sum_assignment, max_examples=10)
    with pytest.raises(AssertionError, match=r"^law broken: rows_first: a row is matched"):
        testing.check_laws(laws, lambda cost, *, row_mask=None: torch.full(cost.shape[:-1], -1), max_examples=10)


def test_missing_is_no_passing():
    """What a law misses in one example is told, even if it holds in all the others."""
    seen = []

    @law("sometimes", "some examples lack something")
    def sometimes(function, arguments):
        seen.append(arguments)
        if len(seen) == 3:
            msg = "needs more"
            raise MissingError(msg)

    laws = laws_by_name(COSTS, cost_arguments(), sometimes)
    with pytest.raises(testing.LawNotApplicable, match=re.escape("sometimes needs more; skip=('sometimes',)")):
        testing.check_laws(laws, partial(dkl.linear_sum_assignment), max_examples=20)
