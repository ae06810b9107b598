"""A teacher whose images have different numbers of queries: padding teaches nothing, whatever it holds."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

import detr_kd_losses as dkl

from support.steps import C, leaves, make_output, make_targets

LOGITS_AND_BOXES = torch.randn(2, 7, C), torch.rand(2, 7, 4)
NOBODY = torch.full((2, 7), -1)

TERMS = {
    "logits": dkl.LogitsTerm,
    "logits, joint": lambda: dkl.LogitsTerm(matching="joint", weighting="confidence"),
    "logits, targets": lambda: dkl.LogitsTerm(matching="targets", negatives="by_box", weighting="overlap"),
    "logits, localization": lambda: dkl.LogitsTerm(negatives="none", weighting="localization"),
    "features": dkl.FeatureTerm,
    "features, queries": lambda: dkl.FeatureTerm(normalize="queries"),
    "features, official": lambda: dkl.FeatureTerm(variant="official", topk=30),
    "features, mean": lambda: dkl.FeatureTerm(normalize="mean"),
    "group": dkl.QueryGroupTerm,
    "shared": dkl.SharedQueryTerm,
    "shared, uniform": lambda: dkl.SharedQueryTerm(weighting="uniform"),
    "features, official, queries": lambda: dkl.FeatureTerm(variant="official", normalize="queries", topk=30),
    "box distributions": dkl.BoxDistributionTerm,
    "box distributions, by box": lambda: dkl.BoxDistributionTerm(negatives="by_box", weighting="confidence"),
    "masks": dkl.MaskTerm,
    "masks, joint": lambda: dkl.MaskTerm(matching="joint", cells="all"),
}
terms = pytest.mark.parametrize("term", TERMS.values(), ids=TERMS)
# Fewer queries than the student has, and fewer than targets, too.
numbers = pytest.mark.parametrize("number", [9, 4, 2])


def padded(output, number, *, dim=2, value=torch.nan):
    """Tensors (L, B, M, .) with so many queries more."""
    shape = list(output.shape)
    shape[dim] = number
    return torch.cat((output, output.new_full(shape, value)), dim=dim)


def step(number, more=0, *, images=2, channels=C):
    """Student, teacher and targets, the teacher with so much padding, and a group with it."""
    student = make_output(0, 3, 7, group=number, bins=5, mask_size=(4, 5), channels=channels, requires_grad=True)
    teacher = make_output(1, 3, number, bins=7, mask_size=(5, 4), channels=channels)
    if more:
        group = dkl.Predictions(*(padded(part.detach(), more, value=0.3).requires_grad_() for part in student.group))
        logits, references, *grid = teacher.distributions
        teacher = teacher._replace(
            **{name: padded(getattr(teacher, name), more) for name in ("logits", "boxes", "queries", "masks")},
            distributions=dkl.BoxDistributions(padded(logits, more), padded(references, more), *grid),
            query_mask=(torch.arange(number + more) < number).expand(images, -1),
        )
        student = student._replace(group=group)
    return student, teacher, make_targets((3, 1))


def values_and_gradients(criterion, student, teacher, targets, number):
    losses = criterion(student, teacher, targets)
    wrt = leaves(student)
    gradients = torch.autograd.grad(sum(losses.values()), wrt, allow_unused=True, materialize_grads=True)
    gradients = [
        gradient[:, :, :number] if any(leaf is part for part in student.group) else gradient
        for leaf, gradient in zip(wrt, gradients, strict=True)
    ]
    return losses, gradients


@terms
@numbers
@pytest.mark.parametrize("more", [1, 5])
def test_changes_nothing(term, number, more):
    criterion = dkl.DETRDistillationLoss([term()])
    expected = values_and_gradients(criterion, *step(number), number)
    actual = values_and_gradients(criterion, *step(number, more), number)
    assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    assert any(gradient.any() for gradient in actual[1])


@numbers
@pytest.mark.parametrize("more", [1, 5])
def test_the_group_of_a_softmax_student(number, more):
    criterion = dkl.DETRDistillationLoss(
        [dkl.QueryGroupTerm()], student_activation="softmax", teacher_activation="softmax"
    )
    expected = values_and_gradients(criterion, *step(number, channels=C + 1), number)
    actual = values_and_gradients(criterion, *step(number, more, channels=C + 1), number)
    assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    assert actual[0]["loss_kd_group_class"] > 0


@terms
def test_of_one_image_alone(term):
    """One image of two with fewer queries: as if each were alone, or padded further."""
    criterion = dkl.DETRDistillationLoss([term()])
    results = []
    for more in (0, 3):
        student, teacher, targets = step(9, more)
        mask = torch.arange(9 + more) < torch.tensor([[9], [5]])
        teacher = teacher._replace(query_mask=mask)
        results.append(values_and_gradients(criterion, student, teacher, targets, 9))
        group = dict(zip(map(id, leaves(student)), results[-1][1], strict=True))
        for part in student.group:
            assert not group[id(part)][:, 1, 5:].any()
    assert_close(*results, rtol=1e-5, atol=1e-6)


def test_the_padded_have_no_target_and_are_no_partners():
    _, teacher, targets = step(2, 5)
    blank = teacher._replace(
        logits=torch.full_like(teacher.logits, 9.0), boxes=targets.boxes.mean() + 0 * teacher.boxes
    )
    blank = blank._replace(boxes=torch.full_like(teacher.boxes, 0.5))
    assignment = dkl.match_targets(blank.logits, blank.boxes, *targets, query_mask=teacher.query_mask)
    assert (assignment[..., 2:] == -1).all()
    assert (assignment[..., :2] >= 0).sum() == 3 * (2 + 1)
    for positive in (None, teacher.query_mask.expand(3, -1, -1)):
        partners = dkl.match_teacher(
            *(blank.logits, blank.boxes) * 2, teacher_positive=positive, teacher_mask=teacher.query_mask
        )
        assert partners.max() == 1


def test_group_of_the_best():
    student, teacher, targets = step(9, 3)
    index = torch.tensor([[0, 8, 10], [11, 3, 2]])
    group = dkl.Predictions(*(part.detach()[:, :, :3].clone().requires_grad_() for part in student.group))
    student = student._replace(group=group, group_index=index)
    criterion = dkl.DETRDistillationLoss([dkl.QueryGroupTerm(), dkl.SharedQueryTerm()])
    sum(criterion(student, teacher, targets).values()).backward()
    learns = group.logits.grad.flatten(3).abs().sum((0, 3)) > 0
    assert learns.tolist() == [[True, True, False], [False, True, True]]


@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*instantiated:DeprecationWarning")
def test_compiles():
    criterion = dkl.DETRDistillationLoss([TERMS[name]() for name in ("logits", "features", "group", "shared")])
    torch.compiler.reset()
    compiled = torch.compile(criterion, fullgraph=True, backend="eager")
    assert_close(compiled(*step(9, 3)), criterion(*step(9, 3)))
    torch.compiler.reset()


def test_one_layer_alone():
    student, teacher, targets = step(9, 3)
    last = [dkl.DetectorOutput(part.logits[-1], part.boxes[-1]) for part in (student, teacher)]
    staged = [dkl.DetectorOutput(part.logits[-1:], part.boxes[-1:]) for part in (student, teacher)]
    criterion, mask = dkl.DETRDistillationLoss([dkl.LogitsTerm()]), teacher.query_mask
    losses = [criterion(one, other._replace(query_mask=mask), targets) for one, other in (last, staged)]
    assert_close(*losses)


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (torch.ones(2, 8).bool(), ValueError, r"`teacher.query_mask` and `teacher.logits` .* \(B, M\), got \(2, 8\)"),
        (torch.ones(2, 9), TypeError, "`teacher.query_mask` must have dtype torch.bool"),
    ],
)
def test_errors(mask, error, message):
    student, teacher, targets = step(9)
    criterion = dkl.DETRDistillationLoss([dkl.LogitsTerm()])
    with pytest.raises(error, match=message):
        criterion(student, teacher._replace(query_mask=mask), targets)


def test_a_student_has_no_padding():
    student, teacher, targets = step(9, 3)
    with pytest.raises(ValueError, match=r"`student.query_mask` must be None"):
        dkl.DETRDistillationLoss()(student._replace(query_mask=teacher.query_mask), teacher, targets)


@pytest.mark.parametrize(
    "loss",
    [
        lambda mask: dkl.shared_query_distillation_loss(*LOGITS_AND_BOXES, *LOGITS_AND_BOXES, query_mask=mask),
        lambda mask: dkl.detection_loss(*LOGITS_AND_BOXES, *make_targets(), NOBODY, query_mask=mask),
        lambda mask: dkl.teacher_assigned_query_loss(*LOGITS_AND_BOXES, *make_targets(), NOBODY, query_mask=mask),
        lambda mask: dkl.target_aware_feature_loss(
            *[torch.rand(2, 4, 3, 3)] * 2, torch.rand(2, 7, 4), torch.rand(2, 7), query_mask=mask
        ),
        lambda mask: dkl.target_aware_mask(
            torch.rand(2, 4, 3, 3), torch.rand(2, 7, 4), torch.rand(2, 7), query_mask=mask
        ),
    ],
    ids=["shared queries", "detection", "query group", "features", "mask of features"],
)
def test_masks_of_functions(loss):
    loss(torch.ones(2, 7, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"`query_mask` must have dtype torch\.bool, got torch\.float32"):
        loss(torch.ones(2, 7))
    with pytest.raises(ValueError, match=r"`query_mask` and `\w+` must have the same dimensions \(N,\), got \(6,\)"):
        loss(torch.ones(2, 6, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"`query_mask` must have the batch dimensions of `\w+` \(2,\), got \(3,\)"):
        loss(torch.ones(3, 7, dtype=torch.bool))
