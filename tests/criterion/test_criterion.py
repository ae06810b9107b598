"""DETRDistillationLoss: composed of the parts, and of nothing else."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.testing import assert_close

import detr_kd_losses as dkl

from support.steps import LEVELS, B, C, D, leaves, make_output, make_targets


@pytest.mark.parametrize("normalize", [None, "max", "mean"])
@pytest.mark.parametrize("preset", ["official", "paper"])
def test_is_the_sum_of_its_parts(preset, normalize):
    student, teacher, targets = make_output(0, 3, 7, group=9), make_output(1, 6, 9), make_targets()
    criterion = dkl.DETRDistillationLoss(preset)
    for name, weight in {"logits": 0.5, "feature": 7.0, "query_group": 3.0}.items():
        criterion.terms[name].weight = weight
    criterion.terms["feature"].normalize = normalize
    losses = criterion(student, teacher, targets)
    assigned = dkl.match_targets(teacher.logits, teacher.boxes, *targets)
    t_logits, t_boxes, t_assigned = (dkl.select_stages(t, 3) for t in (teacher.logits, teacher.boxes, assigned))
    positive = t_assigned >= 0 if preset == "paper" else None
    matched = dkl.match_teacher(student.logits, student.boxes, t_logits, t_boxes, teacher_positive=positive)
    logits = dkl.hungarian_distillation_loss(
        student.logits, student.boxes, t_logits, t_boxes, matched, teacher_positive=positive
    )
    quality = dkl.query_quality(teacher.logits, teacher.boxes, *targets, assigned, variant=preset)
    features = student.features, teacher.features, teacher.queries, quality
    options = {"variant": preset, "normalize": normalize, "relative": preset == "paper"}
    feature = dkl.target_aware_feature_loss(*features, **options)
    group = dkl.teacher_assigned_query_loss(*student.group, *targets, t_assigned)
    expected = {"loss_kd_feature": 7.0 * feature}
    expected |= {f"loss_kd_{key[5:]}": 0.5 * value for key, value in logits.items()}
    expected |= {f"loss_kd_group_{key[5:]}": 3.0 * value for key, value in group.items()}
    assert_close(losses, expected)


@pytest.mark.parametrize("preset", ["official", "paper"])
@pytest.mark.parametrize(
    ("student_size", "teacher_size"), [((3, 20), (6, 60)), ((6, 60), (3, 20)), ((2, 20), (2, 20)), ((1, 1), (4, 2))]
)
@pytest.mark.parametrize("counts", [(3, 0), (0, 0), (4, 4)])
def test_any_depth_number_of_queries_and_targets(preset, student_size, teacher_size, counts):
    student = make_output(0, *student_size, group=teacher_size[1], requires_grad=True)
    teacher = make_output(1, *teacher_size, requires_grad=True)
    losses = dkl.DETRDistillationLoss(preset)(student, teacher, make_targets(counts))
    sum(losses.values()).backward()
    for tensor in leaves(student):
        assert tensor.grad.isfinite().all()
    for tensor in (*leaves(teacher), teacher.queries):
        assert tensor.grad is None
    if counts == (0, 0):
        assert losses["loss_kd_group_bbox"] == 0
        assert losses["loss_kd_group_giou"] == 0
        if preset == "paper":
            assert losses["loss_kd_class"] == 0
            assert losses["loss_kd_feature"] == 0


@pytest.mark.parametrize("padded", [0, 1, 100])
def test_padding_targets_changes_nothing(padded):
    student, teacher, targets = make_output(0, 3, 7, group=9), make_output(1, 3, 9), make_targets()
    if padded == 0:
        targets = dkl.Targets(torch.zeros(B, 0, dtype=torch.int64), torch.zeros(B, 0, 4), torch.zeros(B, 0).bool())
    wider = dkl.Targets(
        torch.nn.functional.pad(targets.labels, (0, padded), value=-1),
        torch.nn.functional.pad(targets.boxes, (0, 0, 0, padded), value=float("nan")),
        torch.nn.functional.pad(targets.mask, (0, padded)),
    )
    criterion = dkl.DETRDistillationLoss("paper")
    assert_close(criterion(student, teacher, targets), criterion(student, teacher, wider))


@pytest.mark.parametrize("preset", ["official", "paper"])
def test_equal_student_and_teacher_have_no_loss(preset):
    student = make_output(0, 3, 9, requires_grad=True)
    teacher = student._replace(features=[level.detach().clone() for level in student.features])
    losses = dkl.DETRDistillationLoss(preset)(student, teacher, make_targets())
    for loss in losses.values():
        assert abs(loss.item()) < 1e-6
    sum(losses.values()).backward()
    for tensor in leaves(student):
        assert tensor.grad.abs().max() < 1e-6


def test_a_term_is_computed_where_its_tensors_are():
    targets = make_targets()
    teacher = make_output(1, 3, 9)
    bare = make_output(0, 3, 7)._replace(features=None)
    criterion = dkl.DETRDistillationLoss()
    assert set(criterion(bare, teacher._replace(features=None), targets)) == {
        "loss_kd_class",
        "loss_kd_bbox",
        "loss_kd_giou",
    }
    full = make_output(0, 3, 7, group=9)
    assert set(dkl.DETRDistillationLoss([dkl.FeatureTerm()])(full, teacher, targets)) == {"loss_kd_feature"}
    assert set(dkl.DETRDistillationLoss([dkl.QueryGroupTerm()])(full, teacher, targets)) == {
        f"loss_kd_group_{term}" for term in ("class", "bbox", "giou")
    }
    assert criterion.names == tuple(criterion(full, teacher, targets))


def test_a_single_layer_may_come_without_its_dimension():
    student, teacher, targets = make_output(0, 1, 7, group=9), make_output(1, 1, 9), make_targets()

    def squeezed(output):
        group = None if output.group is None else dkl.Predictions(*(tensor[0] for tensor in output.group))
        return output._replace(logits=output.logits[0], boxes=output.boxes[0], queries=output.queries[0], group=group)

    criterion = dkl.DETRDistillationLoss()
    assert_close(criterion(student, teacher, targets), criterion(squeezed(student), squeezed(teacher), targets))


@pytest.mark.parametrize("teacher_head", ["sigmoid", "softmax"])
@pytest.mark.parametrize("student_head", ["sigmoid", "softmax"])
@pytest.mark.parametrize("preset", ["official", "paper"])
def test_heads_may_be_crossed(preset, student_head, teacher_head):
    channels = {"sigmoid": C, "softmax": C + 1}
    student = make_output(0, 3, 7, group=9, channels=channels[student_head], requires_grad=True)
    teacher = make_output(1, 3, 9, channels=channels[teacher_head])
    criterion = dkl.DETRDistillationLoss(preset, student_activation=student_head, teacher_activation=teacher_head)
    losses = criterion(student, teacher, make_targets())
    sum(losses.values()).backward()
    for tensor in leaves(student):
        assert tensor.grad.isfinite().all()
        assert tensor.grad.abs().max() > 0


@pytest.mark.parametrize("head", ["sigmoid", "softmax"])
def test_renaming_the_teacher_classes_changes_nothing(head):
    """A class map undoes a permutation of the teacher's classes, with further classes dropped."""
    extra, no_object = 2, head == "softmax"
    student = make_output(0, 3, 7, group=9, channels=C + no_object)
    wide = make_output(1, 3, 9, channels=C + no_object)
    order = [3, 0, 4, 1, 2]
    dropped = torch.full((*wide.logits.shape[:-1], extra), -1e4)
    renamed = torch.cat((wide.logits[..., order], dropped, wide.logits[..., C:]), dim=-1)
    options = {"student_activation": head, "teacher_activation": head}
    expected = dkl.DETRDistillationLoss("paper", **options)(student, wide, make_targets())
    mapped = dkl.DETRDistillationLoss("paper", class_map=[*order, -1, -1], **options)
    assert_close(mapped(student, wide._replace(logits=renamed), make_targets()), expected)


def test_a_class_that_the_teacher_does_not_know_is_left_alone():
    known = [0, 1, 2, 3]  # the student's class 4 is new
    student, teacher = make_output(0, 3, 7, requires_grad=True), make_output(1, 3, 9, channels=4)
    targets = make_targets()
    targets.labels[0, 0] = 4
    criterion = dkl.DETRDistillationLoss("paper", class_map=known)
    losses = criterion(student, teacher, targets)
    sum(losses.values()).backward()
    assert student.logits.grad[..., 4].eq(0).all()
    assert student.logits.grad[..., :4].abs().max() > 0
    masked = targets.mask.clone()
    masked[0, 0] = False
    assert_close(losses, criterion(student, teacher, targets._replace(mask=masked)))


def test_projection_is_trained_and_saved():
    student = make_output(0, 3, 7)._replace(features=[torch.randn(B, 3, 6, 8), torch.randn(B, 4, 6, 8)])
    criterion = dkl.DETRDistillationLoss([dkl.FeatureTerm([3, 4], [D, D])])
    loss = criterion(student, make_output(1, 3, 9), make_targets())["loss_kd_feature"]
    loss.backward()
    assert [tuple(p.shape) for p in criterion.parameters()] == [(D, 3, 1, 1), (D,), (D, 4, 1, 1), (D,)]
    assert all(p.grad.abs().max() > 0 for p in criterion.parameters())
    assert set(criterion.state_dict()) == {name for name, _ in criterion.named_parameters()}


def test_padding_mask_of_the_features_is_used():
    student, teacher, targets = make_output(0, 3, 7), make_output(1, 3, 9), make_targets()
    masks = [torch.ones(B, *size).bool() for size in LEVELS]
    for mask in masks:
        mask[0, :, -1] = False
    criterion = dkl.DETRDistillationLoss([dkl.FeatureTerm()])
    expected = criterion(student, teacher._replace(padding_mask=masks), targets)
    assert_close(criterion(student._replace(padding_mask=masks), teacher, targets), expected)
    for level in (*student.features, *teacher.features):
        level[0, :, :, -1] = float("nan")
    assert_close(criterion(student, teacher._replace(padding_mask=masks), targets), expected)


def test_copies_and_pickles_compute_the_same():
    student, teacher, targets = make_output(0, 3, 7, group=9), make_output(1, 3, 9), make_targets()
    criterion = dkl.DETRDistillationLoss(
        [dkl.LogitsTerm(temperature=2.0, stage_map="last"), dkl.FeatureTerm()], class_map=torch.arange(C)
    )
    expected = criterion(student, teacher, targets)
    for copied in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert_close(copied(student, teacher, targets), expected)
    assert "temperature=2.0" in repr(criterion)
    assert "stage_map='last'" in repr(criterion)


def without(output, field):
    return output._replace(**{field: None})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s, t, g: (without(s, "features"), t, g),
            r"`student.features` must be given where `teacher.features` is \(or set the weight",
        ),
        (
            lambda s, t, g: (s, without(t, "features"), g),
            "`teacher.features` must be given where `student.features` is",
        ),
        (lambda s, t, g: (s, without(t, "queries"), g), "`teacher.queries` must be given for the feature loss"),
        (
            lambda s, t, g: (s, t._replace(queries=t.queries[0, :, :, :4].expand(-1, -1, 4)), g),
            r"`teacher.queries` and `teacher.logits` must have the same dimensions \(L, B, M\), "
            r"got \(2, 9\) and \(3, 2, 9\)",
        ),
        (
            lambda s, t, g: (s._replace(group=s.group._replace(boxes=s.group.boxes[:, :, 1:])), t, g),
            r"`student.group.logits` and `student.group.boxes` must have the same dimensions \(..., N\)",
        ),
        (
            lambda s, t, g: (s, t._replace(logits=t.logits[:, :1], boxes=t.boxes[:, :1]), g),
            r"`student.logits` and `teacher.logits` must have the same dimensions \(B,\), got \(2,\) and \(1,\)",
        ),
        (
            lambda s, t, g: (s, t._replace(boxes=t.boxes[:, :, :-1]), g),
            r"`teacher.logits` and `teacher.boxes` must have the same dimensions \(..., N\)",
        ),
        (
            lambda s, t, g: (s, t._replace(logits=t.logits[..., :-1]), g),
            "`teacher_logits` must have the student's 5 classes .pass `class_map` if they differ., got 4",
        ),
        (
            lambda s, t, g: (s, t._replace(logits=t.logits[0, 0], boxes=t.boxes[0, 0]), g),
            r"`teacher.logits` must have shape \(L, B, N, C\) or \(B, N, C\), got \(9, 5\)",
        ),
        (
            lambda s, t, g: (s._replace(group=dkl.Predictions(*(tensor[:, :, 1:] for tensor in s.group))), t, g),
            r"`teacher_assignment` and `group_logits` must have the same dimensions \(..., N\), "
            r"got \(3, 2, 9\) and \(3, 2, 8\)",
        ),
        (
            lambda s, t, g: (s, t, g._replace(labels=g.labels[:1], boxes=g.boxes[:1], mask=g.mask[:1])),
            r"`target_labels` must have the batch dimensions of `student.logits` \(2,\), got \(1,\)",
        ),
        (
            lambda s, t, g: (s._replace(features=s.features[:1]), t, g),
            "`teacher_features` must have as many levels as `student_features`",
        ),
    ],
)
def test_a_mistake_gets_an_error_that_names_it(change, message):
    student, teacher, targets = change(make_output(0, 3, 7, group=9), make_output(1, 3, 9), make_targets())
    with pytest.raises(ValueError, match=message):
        dkl.DETRDistillationLoss()(student, teacher, targets)


def test_unknown_options():
    with pytest.raises(ValueError, match="`preset` must be one of 'paper', 'official', 'recommended', got 'best'"):
        dkl.DETRDistillationLoss("best")
    with pytest.raises(TypeError, match="`terms` must be the name of a preset, terms, or terms by name, got None"):
        dkl.DETRDistillationLoss(None)
    with pytest.raises(TypeError, match=r"(?s)`terms` must be the name of a preset, terms, .* of type FeatureTerm"):
        dkl.DETRDistillationLoss(dkl.FeatureTerm())  # one term is not terms
    with pytest.raises(ValueError, match="`stage_map` must be one of 'even', 'last', got 'first'"):
        dkl.LogitsTerm(stage_map="first")
