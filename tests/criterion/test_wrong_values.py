"""Values that mean nothing: an error by name where they can be read, else NaN, and never a number that looks right."""

from __future__ import annotations

import math
import re

import pytest
import torch

import detr_kd_losses as dkl
from detr_kd_losses import _labels
from detr_kd_losses.testing.steps import make_step

CLASSES, STAGES = 3, 2


def step(activation="sigmoid", label=None, at=(1, 0)):
    """Two targets in each image, of which one may have a wrong label; a third is padding, and has one, too."""
    student, teacher, targets = make_step(activation=activation, counts=[2, 2], classes=CLASSES)
    targets.labels[:, 2] = 400
    if label is not None:
        targets.labels[at] = label
    return student, teacher, targets


def assigned(predictions):
    """The targets in the order of the queries."""
    queries = torch.arange(predictions.logits.shape[-2])
    return torch.where(queries < 2, queries, -1).expand(predictions.logits.shape[:-1])


def criterion(activation, *terms, **options):
    return dkl.DETRDistillationLoss(
        terms or "paper", student_activation=activation, teacher_activation=activation, **options
    )


CALLS = {
    "criterion": lambda a, s, t, g: criterion(a)(s, t, g),
    "criterion, official": lambda a, s, t, g: dkl.DETRDistillationLoss(
        "official", student_activation=a, teacher_activation=a
    )(s, t, g),
    "criterion, logits": lambda a, s, t, g: criterion(a, dkl.LogitsTerm())(s, t, g),
    "criterion, class map": lambda a, s, t, g: criterion(a, class_map=[0, 1, 2])(s, t, g),
    "match_targets": lambda a, s, t, g: dkl.match_targets(
        s.logits, s.boxes, *g, class_cost="softmax" if a == "softmax" else "focal"
    ),
    "detection_loss": lambda a, s, t, g: dkl.detection_loss(
        s.logits, s.boxes, *g, assigned(s), class_loss="cross_entropy" if a == "softmax" else "focal"
    ),
    "teacher_assigned_query_loss": lambda a, s, t, g: dkl.teacher_assigned_query_loss(
        *s.group, *g, assigned(s.group), class_loss="cross_entropy" if a == "softmax" else "focal"
    ),
    "query_quality": lambda a, s, t, g: dkl.query_quality(t.logits, t.boxes, *g, assigned(t), activation=a),
    "query_quality, official": lambda a, s, t, g: dkl.query_quality(
        t.logits, t.boxes, *g, assigned(t), activation=a, variant="official"
    ),
}


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("label", [-1, CLASSES, 91])
def test_a_label_out_of_range_is_named(label, call, activation):
    """The label C of a softmax head would be "no object": background with a box."""
    call(activation, *step(activation))  # padding may have any label
    message = f"`target_labels` must be in [0, {CLASSES}), got {label} at image 1, target 0"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        call(activation, *step(activation, label))


def test_the_costs_take_padding_by_its_negative_label_alone():
    student, _, targets = step()
    arguments = student.logits, student.boxes, targets.labels.clamp(max=CLASSES - 1), targets.boxes
    expected = dkl.detection_cost(*arguments)
    arguments[2][0, 1] = -1
    torch.testing.assert_close(dkl.detection_cost(*arguments)[:, 1], expected[:, 1])
    arguments[2][0, 1] = CLASSES
    with pytest.raises(ValueError, match=r"got 3 at image 0, target 1: classes count from 0$"):
        dkl.detection_cost(*arguments)


@pytest.fixture
def values_out_of_reach(monkeypatch):
    """As on a GPU, whose values nobody waits for."""
    monkeypatch.setattr(_labels, "at_hand", lambda *tensors: False)


@pytest.mark.usefixtures("values_out_of_reach")
@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
@pytest.mark.parametrize("label", [-1, CLASSES, 91])
@pytest.mark.parametrize("name", [name for name in CALLS if name != "match_targets"])
def test_a_label_out_of_range_is_no_number(name, label, activation):
    """Where an error would have to wait for the device. A targets' label in range changes nothing."""
    good = CALLS[name](activation, *step(activation))
    bad = CALLS[name](activation, *step(activation, label))
    if isinstance(good, torch.Tensor):
        assert good.isfinite().all()
        assert bad.isnan().all()
        return
    assert all(math.isfinite(value) for value in good.values())
    wrong = {key for key, value in bad.items() if value.isnan()}
    assert wrong == (set(bad) if "criterion" in name else {"loss_class"})


@pytest.mark.usefixtures("values_out_of_reach")
@pytest.mark.parametrize("label", [-1, CLASSES])
def test_matching_takes_a_label_out_of_range_last(label):
    """One query is left for two targets: it goes to the one whose label is a class."""
    student, _, targets = step(label=label)
    assignment = dkl.match_targets(student.logits[:, :, :1], student.boxes[:, :, :1], *targets)
    assert (assignment[:, 1] == 1).all()


@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*instantiated:DeprecationWarning")
def test_a_compiled_criterion_does_not_read_labels():
    loss = dkl.DETRDistillationLoss([dkl.LogitsTerm(), dkl.QueryGroupTerm()])
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*step()), loss(*step()))
    assert all(value.isnan() for value in compiled(*step(label=CLASSES)).values())
    torch.compiler.reset()


# Assignments


@pytest.mark.parametrize("partner", [-2, 9])
@pytest.mark.parametrize(
    ("name", "count", "call"),
    [
        ("assignment", 3, lambda s, t, g, a: dkl.detection_loss(s.logits, s.boxes, *g, a)),
        ("assignment", 6, lambda s, t, g, a: dkl.hungarian_distillation_loss(s.logits, s.boxes, *t[:2], a)),
        ("assignment", 6, lambda s, t, g, a: dkl.matched_iou(s.boxes, t.boxes, a)),
        ("teacher_assignment", 3, lambda s, t, g, a: dkl.query_quality(s.logits, s.boxes, *g, a)),
        ("assignment", 4, lambda s, t, g, a: dkl.invert_assignment(a, 4)),
    ],
)
def test_a_partner_out_of_range_is_named(name, count, call, partner):
    student, teacher, targets = step()
    assignment = assigned(student).clone()
    assignment[1, 0, 2] = partner
    message = f"`{name}` must be in [-1, {count}), got {partner} at stage 1, image 0, query 2"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call(student, teacher, targets, assignment)


def test_a_partner_without_targets_is_no_zero():
    """It was a box at 0 with no size before."""
    student, _, targets = step()
    none = dkl.Targets(*(field[:, :0] for field in targets))
    with pytest.raises(ValueError, match=r"`assignment` must be in \[-1, 0\), got 0 at stage 0, image 0, query 0"):
        dkl.detection_loss(student.logits, student.boxes, *none, assigned(student))


@pytest.mark.parametrize("class_loss", ["focal", "cross_entropy"])
def test_what_the_mask_excludes_is_no_target(class_loss):
    """Whatever the assignment says, in the loss as in the quality: as of a target that the teacher does not know."""
    student, _, targets = step("softmax")
    excluded = targets._replace(mask=targets.mask & (torch.arange(3) != 1))
    pairs = assigned(student)
    without = pairs.where(pairs != 1, -1)
    for name in ("detection_loss", "teacher_assigned_query_loss"):
        loss = getattr(dkl, name)
        actual = loss(student.logits, student.boxes, *excluded, pairs, class_loss=class_loss)
        expected = loss(student.logits, student.boxes, *excluded, without, class_loss=class_loss)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    quality = (dkl.query_quality(student.logits, student.boxes, *excluded, chosen) for chosen in (pairs, without))
    torch.testing.assert_close(*quality, rtol=0, atol=0)


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_no_term_teaches_a_class_that_the_teacher_does_not_know(activation):
    """Neither the logits nor the query group learn that an object of it is background."""
    student, teacher, targets = make_step(
        activation=activation, counts=[2, 2], requires_grad=True, teacher_options={"classes": 2}
    )
    loss = criterion(activation, dkl.LogitsTerm(), dkl.QueryGroupTerm(), class_map=[0, 2])
    sum(loss(student, teacher, targets).values()).backward()
    for logits in (student.logits, student.group.logits):
        assert not logits.grad[..., 1].any()
        assert logits.grad[..., 0].any()


# Boxes and options


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8, torch.bool])
@pytest.mark.parametrize(
    "function", [dkl.box_area, dkl.box_cxcywh_to_xyxy, dkl.box_xyxy_to_cxcywh, dkl.Geometry().flip().move]
)
def test_integer_boxes_are_refused(function, dtype):
    with pytest.raises(TypeError, match=f"^`boxes` must have a floating-point dtype, got {dtype}$"):
        function(torch.ones(2, 4).to(dtype))


@pytest.mark.parametrize("function", [dkl.box_area, dkl.box_cxcywh_to_xyxy, dkl.box_xyxy_to_cxcywh])
def test_boxes_have_four_numbers(function):
    with pytest.raises(ValueError, match=r"^`boxes` must have shape \(\.\.\., 4\), got \(2, 5\)$"):
        function(torch.rand(2, 5))


@pytest.mark.parametrize(
    ("option", "value", "error"),
    [
        ("weight_class", -1.0, ValueError),
        ("weight_bbox", float("nan"), ValueError),
        ("weight_giou", float("inf"), ValueError),
        ("weight_giou", "2", TypeError),
        ("alpha", -1.0, ValueError),
        ("gamma", -2.0, ValueError),
        ("no_object_weight", -0.1, ValueError),
        ("temperature", float("inf"), ValueError),
        ("weight_negative", -1.0, ValueError),
        ("weight_negative_class", True, TypeError),
        ("sync_normalizer", "no", TypeError),
    ],
)
@pytest.mark.parametrize(
    "function",
    [
        lambda s, t, g, **o: dkl.detection_loss(s.logits, s.boxes, *g, assigned(s), **o),
        lambda s, t, g, **o: dkl.teacher_assigned_query_loss(*s.group, *g, assigned(s.group), **o),
        lambda s, t, g, **o: dkl.hungarian_distillation_loss(s.logits, s.boxes, t.logits, t.boxes, assigned(s), **o),
        lambda s, t, g, **o: dkl.match_targets(s.logits, s.boxes, *g, **o),
        lambda s, t, g, **o: dkl.match_teacher(s.logits, s.boxes, t.logits, t.boxes, **o),
        lambda s, t, g, **o: dkl.detection_cost(s.logits, s.boxes, g.labels.clamp(max=1), g.boxes, **o),
        lambda s, t, g, **o: dkl.distillation_cost(s.logits, s.boxes, t.logits, t.boxes, **o),
    ],
    ids=["detection", "group", "distillation", "match_targets", "match_teacher", "detection_cost", "distillation_cost"],
)
def test_functions_check_options_as_modules_do(function, option, value, error):
    with pytest.raises((TypeError, ValueError)) as raised:
        function(*step(), **{option: value})
    if "unexpected keyword argument" in str(raised.value):
        pytest.skip("no such option")
    assert raised.type is error
    assert f"`{option}` must be" in str(raised.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dkl.query_group_attention_mask([2.7]), "`group_sizes` must be whole numbers, at least 0, got [2.7]"),
        (lambda: dkl.select_stages(torch.zeros(6), 2.5), "`num_student_stages` must be a whole number, got 2.5"),
        (lambda: dkl.FeatureTerm(topk=2.5), "`topk` must be a whole number, got 2.5"),
        (lambda: dkl.invert_assignment(torch.tensor([0]), 1.5), "`num_columns` must be a whole number, got 1.5"),
    ],
)
def test_counts_are_whole_numbers(call, message):
    with pytest.raises(TypeError, match=f"^{re.escape(message)}"):
        call()
