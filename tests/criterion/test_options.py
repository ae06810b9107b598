"""Options of terms: each in one place, validated when it is set, and in force at once."""

from __future__ import annotations

import inspect
from functools import partial

import pytest
import torch
from torch.testing import assert_close

import detr_kd_losses as dkl
from detr_kd_losses.testing.replicas import run_replicas

from support.registry import LOSSES
from support.steps import C, make_output, make_targets, over_tensors

# Where the options of the functions beside the losses are.
HOMES = {loss.function: loss.term for loss in LOSSES.values() if not isinstance(loss.term, str)} | {
    dkl.match_teacher: dkl.LogitsTerm,
    dkl.query_quality: dkl.FeatureTerm,
    dkl.match_targets: dkl.TargetMatching,
}
DATA = {"teacher_positive", "teacher_weight", "weight", "padding_mask", "boxes", "query_mask", "teacher_mask"}
DATA |= {f"{model}_{what}" for model in ("student", "teacher") for what in ("bins", "scale")}
RENAMED = {
    (dkl.match_teacher, "weight_class"): "cost_class",
    (dkl.match_teacher, "weight_bbox"): "cost_bbox",
    (dkl.match_teacher, "weight_giou"): "cost_giou",
    (dkl.query_quality, "activation"): "teacher_activation",
}
# Defaults that differ on purpose: a term is of the order of the others, and knows its heads.
OTHER_DEFAULTS = {"normalize", "relative", "class_loss", "class_cost"}

ANOTHER = {loss.term: loss.other_options for loss in LOSSES.values() if not isinstance(loss.term, str)} | {
    dkl.DETRDistillationLoss: {
        "student_activation": "softmax",
        "teacher_activation": "softmax",
        "class_map": [1, 0, 2, 3, 4],
    },
    dkl.TargetMatching: {
        "class_cost": ("focal", {"teacher_activation": "softmax"}),
        "weight_class": 30.0,
        "weight_bbox": 0.0,
        "weight_giou": 30.0,
        "alpha": 0.9,
        "gamma": 0.0,
        "backend": "counting",
    },
}
# The default of the class loss is what the head asks for, so that naming it changes nothing.
SAME_RESULT = {(dkl.QueryGroupTerm, "class_loss")}
CASES = [(owner, name) for owner in ANOTHER for name in owner.rules]


def part_of(criterion, owner):
    return criterion if owner is dkl.DETRDistillationLoss else next(m for m in criterion.modules() if type(m) is owner)


def make_criterion(owner, **options):
    """A criterion in which the one that owns the options was made with them."""
    heads = {name: options.pop(name) for name in list(options) if name in dkl.DETRDistillationLoss.rules}
    made = {} if owner is dkl.DETRDistillationLoss else {owner: owner(**options)}
    kinds = [kind for kind in ANOTHER if issubclass(kind, dkl.Term)]
    matching = {"teacher_matching": made[owner]} if owner is dkl.TargetMatching else {}
    return dkl.DETRDistillationLoss([made.get(kind) or kind() for kind in kinds], **heads, **matching)


def make_step(heads):
    channels = C + (heads.student == "softmax"), C + (heads.teacher == "softmax")
    student = make_output(0, 3, 12, group=9, channels=channels[0], bins=5, mask_size=(4, 5), requires_grad=True)
    return student, make_output(1, 6, 9, channels=channels[1], bins=7, mask_size=(5, 4)), make_targets()


def result(criterion):
    """All losses, and the gradient of all student tensors, as the first of two replicas sees them."""

    def replica(rank):
        student, teacher, targets = make_step(criterion.heads)
        if rank == 1:
            targets = targets._replace(mask=torch.zeros_like(targets.mask))
            cells = [torch.ones(level[:, 0].shape, dtype=torch.bool) for level in teacher.features]
            for mask in cells:
                mask[..., 1:] = False
            teacher = teacher._replace(padding_mask=cells, logits=teacher.logits / 2)
        losses = criterion(student, teacher, targets)
        sum(losses.values()).backward()
        gradients = over_tensors(lambda tensor: tensor.grad, student._replace(padding_mask=None, queries=None))
        return {name: loss.detach() for name, loss in losses.items()}, tuple(gradients)

    return run_replicas([partial(replica, rank) for rank in range(2)])[0]


def differ(one, other):
    try:
        assert_close(one, other, rtol=1e-6, atol=1e-9)
    except AssertionError:
        return True
    return False


@pytest.mark.parametrize(("owner", "name"), CASES, ids=lambda case: getattr(case, "__name__", case))
def test_an_option_set_later_equals_one_given_at_the_start(owner, name, counting):
    """And it has an effect: an option that is taken and then ignored fails here."""
    where = "its loss's `other_options` in tests/support/registry.py"
    assert name in ANOTHER[owner], f"give {owner.__name__}.{name} another value in {where}"
    value = ANOTHER[owner][name]
    value, others = value if isinstance(value, tuple) else (value, {})
    before = result(make_criterion(owner, **others))
    given = make_criterion(owner, **others, **{name: value})
    changed = make_criterion(owner, **others)
    expected = result(given)
    asked = counting.calls
    setattr(part_of(changed, owner), name, value)
    assert repr(changed) == repr(given)
    assert_close(result(changed), expected, rtol=0, atol=0)
    if value == "counting":
        assert counting.calls == 2 * asked > 0
    elif (owner, name) not in SAME_RESULT:
        assert differ(before, expected), f"{owner.__name__}.{name} has no effect"


OPTIONS = [
    (function, name, option)
    for function in HOMES
    for name, option in inspect.signature(function).parameters.items()
    if option.kind is option.KEYWORD_ONLY and name not in DATA
]


@pytest.mark.parametrize(("function", "name", "option"), OPTIONS, ids=lambda case: getattr(case, "__name__", str(case)))
def test_every_option_of_a_function_is_reached_through_a_term(function, name, option):
    there = RENAMED.get((function, name), name)
    home = dkl.DETRDistillationLoss if there in dkl.DETRDistillationLoss.rules else HOMES[function]
    assert there in home.rules, f"{function.__name__}({name}=...) cannot be reached"
    if there not in OTHER_DEFAULTS:
        assert inspect.signature(home).parameters[there].default == option.default


@pytest.mark.parametrize(
    ("owner", "name", "value", "message"),
    [
        (dkl.LogitsTerm, "temperature", 0, "`temperature` must be greater than 0, got 0"),
        (dkl.LogitsTerm, "weight", -1.0, "`weight` must be finite and at least 0, got -1.0"),
        (dkl.LogitsTerm, "weight", float("nan"), "`weight` must be finite and at least 0, got nan"),
        (dkl.LogitsTerm, "weight_bbox", "5", "`weight_bbox` must be a number, got '5' of type str"),
        (dkl.LogitsTerm, "weight_giou", True, "`weight_giou` must be a number, got True of type bool"),
        (dkl.LogitsTerm, "matching", "last", "`matching` must be one of 'positives_first', 'joint'"),
        (dkl.LogitsTerm, "class_loss", "mse", "`class_loss` must be one of 'kl', 'bce', got 'mse'"),
        (dkl.LogitsTerm, "stage_map", "first", "`stage_map` must be one of 'even', 'last', got 'first'"),
        (dkl.LogitsTerm, "stage_map", [0, 1.5], "`stage_map` must be 'even', 'last' or a sequence of teacher stages"),
        (dkl.LogitsTerm, "backend", "cuda", "`backend` must be 'auto' or one of"),
        (dkl.LogitsTerm, "sync_normalizer", 1, "`sync_normalizer` must be True or False, got 1 of type int"),
        (dkl.LogitsTerm, "prefix", None, "`prefix` must be a string, got None"),
        (dkl.FeatureTerm, "gamma", 2.0, r"`gamma` must be in \[0, 1\], got 2.0"),
        (dkl.FeatureTerm, "topk", 0, "`topk` must be greater than 0, got 0"),
        (dkl.FeatureTerm, "variant", "best", "`variant` must be one of 'paper', 'official', got 'best'"),
        (dkl.FeatureTerm, "normalize", "min", "`normalize` must be one of None, 'queries', 'max', 'mean', got 'min'"),
        (dkl.QueryGroupTerm, "class_loss", "kl", "`class_loss` must be one of None, 'focal', 'cross_entropy'"),
        (dkl.QueryGroupTerm, "alpha", 1.5, r"`alpha` must be in \[0, 1\], got 1.5"),
        (dkl.TargetMatching, "class_cost", "l1", "`class_cost` must be one of None, 'focal', 'softmax', got 'l1'"),
        (
            dkl.DETRDistillationLoss,
            "student_activation",
            "relu",
            "`student_activation` must be one of 'sigmoid', 'softm",
        ),
        (dkl.DETRDistillationLoss, "class_map", [0, -2], "`class_map` must be a sequence of class numbers"),
        (dkl.DETRDistillationLoss, "class_map", torch.ones(2), "`class_map` must have dtype torch.int64"),
        (dkl.HungarianDistillationLoss, "temperature", -1, "`temperature` must be greater than 0, got -1"),
        (dkl.TargetAwareFeatureLoss, "variant", "best", "`variant` must be one of 'paper', 'official', got 'best'"),
    ],
)
def test_a_wrong_value_is_refused_when_it_is_set(owner, name, value, message):
    with pytest.raises((ValueError, TypeError), match=message):
        owner(**{name: value})
    made = owner()
    before = getattr(made, name)
    with pytest.raises((ValueError, TypeError), match=message):
        setattr(made, name, value)
    assert getattr(made, name) is before


def test_an_option_that_is_none_is_refused():
    criterion = dkl.DETRDistillationLoss()
    with pytest.raises(
        AttributeError, match=r"`DETRDistillationLoss` has no option `temperature`: set that of terms.logits"
    ):
        criterion.temperature = 4.0
    with pytest.raises(AttributeError, match=r"has no option `variant`: set that of terms\.feature$"):
        criterion.variant = "official"
    with pytest.raises(AttributeError, match=r"set that of terms\.logits or terms\.feature or terms\.query_group$"):
        criterion.weight = 2.0
    with pytest.raises(AttributeError, match="`LogitsTerm` has no option `wieght`: it has weight, prefix, matching"):
        criterion.terms["logits"].wieght = 2.0
    with pytest.raises(AttributeError, match="`FeatureTerm` has no option `student_channels`"):
        criterion.terms["feature"].student_channels = 3
    with pytest.raises(TypeError, match="temperature"):
        dkl.DETRDistillationLoss(temperature=4.0)


def test_heads_fit_all_terms():
    bce = dkl.LogitsTerm(class_loss="bce")
    with pytest.raises(ValueError, match="`class_loss` must be 'kl' for a softmax student, got 'bce'"):
        dkl.DETRDistillationLoss([bce], student_activation="softmax")
    criterion = dkl.DETRDistillationLoss([bce, dkl.QueryGroupTerm(class_loss="focal")])
    with pytest.raises(ValueError, match="`class_loss` must be 'kl' for a softmax student, got 'bce'"):
        criterion.student_activation = "softmax"
    assert criterion.student_activation == "sigmoid"
    bce.class_loss = "kl"
    with pytest.raises(
        ValueError, match="`class_loss` must be 'cross_entropy' or None for a softmax student, got 'focal'"
    ):
        criterion.student_activation = "softmax"
