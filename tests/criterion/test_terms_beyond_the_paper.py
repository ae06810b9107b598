"""What each term makes of a step: the parts that it calls, with what it calls them."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import detr_kd_losses as dkl

from support import oracles
from support.steps import make_output, make_targets


def distil(term, student, teacher, targets, **options):
    return dkl.DETRDistillationLoss([term], **options)(student, teacher, targets)


def pairs_of(student, teacher, targets, stage_map="even"):
    """Of each student layer the assignment through the targets, and what its teacher layer predicts and is assigned."""
    select = partial(dkl.select_stages, num_student_stages=len(student.logits), stage_map=stage_map)
    own = dkl.match_targets(student.logits, student.boxes, *targets)
    assigned = select(dkl.match_targets(teacher.logits, teacher.boxes, *targets))
    number = targets.mask.shape[-1]
    through = torch.tensor(oracles.match_through_targets(own.numpy(), assigned.numpy(), number))
    return through, assigned, select(teacher.logits), select(teacher.boxes)


@pytest.mark.parametrize("stage_map", ["even", "last"])
@pytest.mark.parametrize("negatives", [None, "none", "by_box"])
def test_logits_are_paired_through_the_targets(negatives, stage_map):
    student, teacher, targets = make_output(0, 3, 7), make_output(1, 6, 9), make_targets((4, 2))
    assignment, assigned, logits, boxes = pairs_of(student, teacher, targets, stage_map)
    assert (assignment >= 0).sum() == 3 * (4 + 2)
    if negatives == "by_box":
        cost = dkl.distillation_cost(student.logits, student.boxes, logits, boxes, weight_class=0.0)
        left = {"row_mask": assignment < 0, "column_mask": assigned < 0}
        assignment = torch.where(assignment < 0, dkl.linear_sum_assignment(cost, **left), assignment)
        assert (assignment >= 0).all()
    expected = dkl.hungarian_distillation_loss(
        student.logits, student.boxes, logits, boxes, assignment, teacher_positive=assigned >= 0
    )
    term = dkl.LogitsTerm(matching="targets", negatives=negatives, stage_map=stage_map)
    losses = distil(term, student, teacher, targets)
    assert_close(losses, {name.replace("loss_", "loss_kd_"): value for name, value in expected.items()})


def test_a_target_that_the_teacher_does_not_know_pairs_nothing():
    student, teacher, targets = make_output(0, 3, 7), make_output(1, 3, 9, channels=4), make_targets((3, 2))
    targets.labels.remainder_(4)[0, 0] = 4
    term = dkl.LogitsTerm(matching="targets")
    step = dkl.Step(student, teacher, targets, heads=dkl.Heads(class_map=[0, 1, 2, 3]))
    number = targets.mask.shape[-1]
    pairs = oracles.match_through_targets(step.student_assignment.numpy(), step.teacher_assignment.numpy(), number)
    assert ((step.student_assignment[:, 0] == 0) & (torch.tensor(pairs)[:, 0] >= 0)).sum() == 0
    assert np.count_nonzero(pairs >= 0) == 3 * (2 + 2)
    assert all(loss.isfinite() for loss in distil(term, student, teacher, targets, class_map=[0, 1, 2, 3]).values())


@pytest.mark.parametrize("counts", [(0, 0), (3, 0)])
def test_without_targets_nothing_is_paired(counts):
    student, teacher = make_output(0, 3, 7, requires_grad=True), make_output(1, 6, 9)
    losses = distil(dkl.LogitsTerm(matching="targets"), student, teacher, make_targets(counts))
    sum(losses.values()).backward()
    assert student.logits.grad.isfinite().all()
    assert (sum(losses.values()) == 0) == (counts == (0, 0))


def test_positives_alone():
    """The same as a weight of 0 for the negatives."""
    inputs = make_output(0, 3, 7), make_output(1, 6, 9), make_targets()
    alone = distil(dkl.LogitsTerm(negatives="none"), *inputs)
    assert_close(alone, distil(dkl.LogitsTerm(weight_negative=0.0), *inputs))


def test_a_joint_matching_has_no_negatives():
    inputs = make_output(0, 3, 7), make_output(1, 6, 9), make_targets()
    term = dkl.LogitsTerm(matching="joint", negatives="none")
    with pytest.raises(ValueError, match="`negatives` must be None for a joint matching, which knows none, got 'none'"):
        distil(term, *inputs)
    with pytest.raises(ValueError, match="`matching` must be one of 'positives_first', 'joint', 'targets', got 'gt'"):
        term.matching = "gt"


@pytest.mark.parametrize("matching", ["joint", "targets"])
@pytest.mark.parametrize("weighting", ["confidence", "overlap", "localization"])
def test_teacher_queries_are_weighted(weighting, matching):
    """By what the teacher says in the classes of the student: it is as sure as it is of those."""
    student, teacher, targets = make_output(0, 3, 7), make_output(1, 6, 9, channels=7), make_targets()
    mapped = [0, 1, 2, 3, 4, -1, -1]
    step = dkl.Step(student, teacher, targets, heads=dkl.Heads(class_map=mapped))
    weight = {
        "confidence": lambda: dkl.confidence_weight(teacher.logits[..., :5]),
        "overlap": lambda: dkl.overlap_weight(teacher.boxes, targets.boxes, targets.mask),
        "localization": lambda: dkl.localization_weight(
            teacher.logits[..., :5], teacher.boxes, targets.boxes, step.teacher_assignment
        ),
    }[weighting]()
    logits, boxes, assigned, weight = (
        dkl.select_stages(tensor, 3) for tensor in (teacher.logits, teacher.boxes, step.teacher_assignment, weight)
    )
    predictions = (student.logits, student.boxes, logits, boxes)
    if matching == "joint":
        pairs, positive = dkl.match_teacher(*predictions, class_map=mapped), None
    else:
        number = targets.mask.shape[-1]
        pairs, positive = dkl.match_through_targets(step.student_assignment, assigned, number), assigned >= 0
    expected = dkl.hungarian_distillation_loss(
        *predictions, pairs, teacher_positive=positive, teacher_weight=weight, class_map=mapped
    )
    losses = distil(dkl.LogitsTerm(matching=matching, weighting=weighting), student, teacher, targets, class_map=mapped)
    assert_close(losses, {name.replace("loss_", "loss_kd_"): value for name, value in expected.items()})


def shared_losses(losses):
    return {name.replace("loss_", "loss_kd_shared_"): value for name, value in losses.items()}


@pytest.mark.parametrize("stage_map", ["last", "even"])
@pytest.mark.parametrize("weighting", ["confidence", "uniform"])
def test_the_group_learns_the_teachers_own_answers(weighting, stage_map):
    student, teacher, targets = make_output(0, 3, 7, group=9), make_output(1, 6, 9), make_targets()
    taught = (dkl.select_stages(tensor, 3, stage_map=stage_map) for tensor in (teacher.logits, teacher.boxes))
    expected = dkl.shared_query_distillation_loss(*student.group, *taught, weighting=weighting)
    term = dkl.SharedQueryTerm(weighting=weighting, stage_map=stage_map)
    assert_close(distil(term, student, teacher, targets), shared_losses(expected))
    assert (dkl.SharedQueryTerm().stage_map, dkl.SharedQueryTerm().weighting) == ("last", "confidence")


def test_the_best_queries_are_enough():
    """The same as the rows of the teacher's own predictions, or of its assignment, for these queries."""
    student, teacher, targets = make_output(0, 3, 7, group=4), make_output(1, 6, 9), make_targets()
    index = dkl.best_queries(teacher.logits[-1], 4 / 9)
    best = [torch.stack([tensor[:, image, index[image]] for image in range(2)], 1) for tensor in teacher[:2]]
    group = student._replace(group_index=index)
    taught = (dkl.select_stages(tensor, 3, stage_map="last") for tensor in best)
    expected = dkl.shared_query_distillation_loss(*student.group, *taught)
    assert_close(distil(dkl.SharedQueryTerm(), group, teacher, targets), shared_losses(expected))
    assigned = dkl.match_targets(teacher.logits, teacher.boxes, *targets)
    assigned = torch.stack([assigned[:, image, index[image]] for image in range(2)], 1)
    expected = dkl.teacher_assigned_query_loss(*student.group, *targets, dkl.select_stages(assigned, 3))
    losses = distil(dkl.QueryGroupTerm(), group, teacher, targets)
    assert_close(losses, {name.replace("loss_", "loss_kd_group_"): value for name, value in expected.items()})


def test_queries_of_ones_own_run_through_both_decoders():
    """Where the teacher has a group, too, it is what teaches, of as many queries as there are."""
    student, teacher, targets = make_output(0, 3, 7, group=5), make_output(1, 6, 9, group=5), make_targets()
    taught = (tensor[-1:].expand(3, -1, -1, -1) for tensor in teacher.group)
    expected = dkl.shared_query_distillation_loss(*student.group, *taught)
    assert_close(distil(dkl.SharedQueryTerm(), student, teacher, targets), shared_losses(expected))
    with pytest.raises(ValueError, match=r"`teacher.group` must be None for the query group term"):
        distil(dkl.QueryGroupTerm(), student, teacher, targets)


def test_shared_queries_apply_where_there_is_a_group():
    student, teacher, targets = make_output(0, 3, 7), make_output(1, 6, 9), make_targets()
    assert distil(dkl.SharedQueryTerm(), student, teacher, targets) == {}
    with pytest.raises(ValueError, match=r"`student.group` must be given where `teacher.group` is, got None"):
        distil(dkl.SharedQueryTerm(), student, make_output(1, 6, 9, group=5), targets)
    few = make_output(0, 3, 7, group=8)
    message = r"`student.group` and `the teacher's queries` must have the same dimensions \(B, K\), got \(2, 8\) and"
    with pytest.raises(ValueError, match=message):
        distil(dkl.SharedQueryTerm(), few, teacher, targets)
    index = torch.zeros(2, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"`student.group_index` and `student.group.logits` must have the same"):
        distil(dkl.SharedQueryTerm(), few._replace(group_index=index), teacher, targets)
    with pytest.raises(ValueError, match=r"`student.group` must be given where `student.group_index` is, got None"):
        distil(dkl.SharedQueryTerm(), student._replace(group_index=index), teacher, targets)
    with pytest.raises(ValueError, match="`class_loss` must be 'kl' for a softmax student, got 'bce'"):
        dkl.DETRDistillationLoss([dkl.SharedQueryTerm(class_loss="bce")], student_activation="softmax")


@pytest.mark.parametrize("cells", ["all", "boxes"])
def test_plain_features(cells):
    """Of other channels and sizes, with the padding of either side, and beside the target-aware term."""
    student, teacher, targets = make_output(0, 3, 7), make_output(1, 6, 9), make_targets()
    student = student._replace(features=[level[:, :3] for level in student.features])
    masks = [torch.ones(2, *level.shape[-2:]).bool() for level in teacher.features]
    masks[0][0, :, -1] = False
    term = dkl.PlainFeatureTerm([3, 3], [8, 8], distance="pearson", cells=cells, weight=2.0)
    weight = [dkl.box_mask(targets.boxes, targets.mask, level.shape[-2:]) for level in teacher.features]
    expected = dkl.feature_distillation_loss(
        term.projections(student.features, teacher.features),
        teacher.features,
        distance="pearson",
        weight=weight if cells == "boxes" else None,
        padding_mask=masks,
    )
    for one, other in (
        (student._replace(padding_mask=masks), teacher),
        (student, teacher._replace(padding_mask=masks)),
    ):
        losses = distil(term, one, other, targets)
        assert_close(losses, {"loss_kd_plain_feature": 2 * expected})
    sum(losses.values()).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in term.parameters())
    both = dkl.DETRDistillationLoss([term, dkl.FeatureTerm([3, 3], [8, 8])])
    assert both.names == ("loss_kd_plain_feature", "loss_kd_feature")
    without = distil(term, student._replace(features=None), teacher._replace(features=None), targets)
    assert without == {"loss_kd_plain_feature": 0}  # its projection has a gradient in every step
    with pytest.raises(ValueError, match=r"`student.features` must be given where `teacher.features` is"):
        distil(term, student._replace(features=None), teacher, targets)
