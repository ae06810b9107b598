"""Bad numbers, empty batches and odd tensors."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import detr_kd_losses as dkl
from detr_kd_losses.testing.steps import make_step

from support.backends import RUNNABLE
from support.steps import floating, loss_and_gradients, over_tensors

PRESETS = ("official", "paper", "recommended")
NAN, INF = float("nan"), float("inf")


def assert_finite(*dicts):
    for values in dicts:
        dkl.check_finite(**values)


# Bad numbers


@pytest.mark.parametrize("backend", RUNNABLE)
@pytest.mark.parametrize("preset", ["official", "paper"])  # of the mask of features, too
@pytest.mark.parametrize("poison", [NAN, INF, -INF, "negative width"])
def test_one_bad_image_of_sixteen(poison, preset, backend, lapx_takes_small_problems):
    student, teacher, targets = make_step(images=16)
    bad = 5
    good = [image for image in range(16) if image != bad]
    if poison == "negative width":
        student.boxes[:, bad, :, 2] = -0.3
    else:
        for tensor in (student.logits, student.boxes):
            tensor[:, bad] = poison
        student.features[bad] = poison
    loss_and_gradients(student, teacher, targets, preset, backend=backend)  # the step finishes

    def select(output, images):
        return over_tensors(lambda tensor: tensor[:, images] if tensor.shape[0] == 2 else tensor[images], output)

    healthy_student, healthy_teacher = select(student, good), select(teacher, good)
    healthy_targets = dkl.Targets(*(tensor[good] for tensor in targets))
    to_targets = dkl.match_targets(student.logits, student.boxes, *targets, backend=backend)
    positive = dkl.match_targets(teacher.logits, teacher.boxes, *targets, backend=backend) >= 0

    def distil(student, teacher, positive, excluded=None):
        predictions = (student.logits, student.boxes, teacher.logits, teacher.boxes)
        assignment = dkl.match_teacher(*predictions, teacher_positive=positive, backend=backend)
        if excluded is not None:
            assignment[:, excluded] = -1
        return dkl.hungarian_distillation_loss(*predictions, assignment, teacher_positive=positive), assignment

    losses, assignment = distil(student, teacher, positive, excluded=bad)
    healthy_losses, healthy_assignment = distil(healthy_student, healthy_teacher, positive[:, good])
    # The optimum of generic costs is the only one, so that indices may be compared.
    assert torch.equal(assignment[:, good], healthy_assignment)
    healthy = dkl.match_targets(healthy_student.logits, healthy_student.boxes, *healthy_targets, backend=backend)
    assert torch.equal(to_targets[:, good], healthy)
    assert_close(losses, healthy_losses)

    def distil_features(student, teacher, mask):
        quality = torch.ones(teacher.queries.shape[:-1])
        return dkl.target_aware_feature_loss(
            student.features, teacher.features, teacher.queries, quality, variant=preset, padding_mask=mask
        )

    mask = teacher.padding_mask.clone()
    mask[bad] = False
    assert_close(
        distil_features(student, teacher, mask),
        distil_features(healthy_student, healthy_teacher, healthy_teacher.padding_mask),
    )


@pytest.mark.parametrize("heads", [("sigmoid", "sigmoid"), ("softmax", "softmax"), ("softmax", "sigmoid")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("preset", PRESETS)
def test_saturated_logits_in_half_precision(preset, dtype, heads):
    student, teacher, targets = make_step(dtype=dtype, logit_kind="saturated")
    if heads == ("softmax", "sigmoid"):
        teacher = teacher._replace(logits=teacher.logits[..., :-1])
    targets = targets._replace(labels=targets.labels.clamp(max=1))
    options = {"student_activation": heads[0], "teacher_activation": heads[1]}
    losses, gradients = loss_and_gradients(student, teacher, targets, preset, **options)
    assert_finite(losses, gradients)
    assert {loss.dtype for loss in losses.values()} == {torch.float32}


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(
    "change",
    [
        lambda boxes: boxes * torch.tensor([1.0, 1.0, 0.0, 0.0]),
        lambda boxes: -boxes,
        lambda boxes: boxes * torch.tensor([1.0, 1.0, -1.0, 1.0]),
        lambda boxes: 640 * boxes,
        lambda boxes: boxes + 1e6,
        torch.zeros_like,
        lambda boxes: 1e-30 * boxes,
        lambda boxes: 1e15 * boxes,
    ],
    ids=["no area", "negative", "negative width", "pixels", "far away", "zeros", "tiny", "huge"],
)
def test_boxes_of_any_numbers(change, preset):
    student, teacher, targets = make_step()
    for odd in (
        (
            student._replace(
                boxes=change(student.boxes), group=student.group._replace(boxes=change(student.group.boxes))
            ),
            teacher,
            targets,
        ),
        (student, teacher._replace(boxes=change(teacher.boxes)), targets),
        (student, teacher, targets._replace(boxes=change(targets.boxes))),
    ):
        assert_finite(*loss_and_gradients(*odd, preset))


# Nothing at all


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(
    "empty",
    [{"images": 0}, {"teachers": 0}, {"targets": 0}, {"queries": 0}],
    ids=lambda e: next(iter(e)),
)
def test_empty(empty, preset):
    student, teacher, targets = make_step(**{name: size for name, size in empty.items() if name != "queries"})
    if "queries" in empty:
        student = student._replace(logits=student.logits[:, :, :0], boxes=student.boxes[:, :, :0])
    assert_finite(*loss_and_gradients(student, teacher, targets, preset))


def test_an_empty_feature_map():
    student, teacher, targets = make_step()
    none = {"features": student.features[..., :0], "padding_mask": None}
    losses, _ = loss_and_gradients(student._replace(**none), teacher._replace(**none), targets)
    assert losses["loss_kd_feature"] == 0


# Odd tensors


@pytest.mark.parametrize(
    "call",
    [
        lambda scalar: dkl.box_iou(scalar, scalar),
        dkl.linear_sum_assignment,
        lambda scalar: dkl.match_teacher(scalar, scalar, scalar, scalar),
        lambda scalar: dkl.hungarian_distillation_loss(scalar, scalar, scalar, scalar, scalar.long()),
        lambda scalar: dkl.detection_loss(scalar, scalar, scalar.long(), scalar, scalar.bool(), scalar.long()),
        lambda scalar: dkl.target_aware_feature_loss(scalar, scalar, scalar, scalar),
        lambda scalar: dkl.select_stages(scalar, 2),
        lambda scalar: dkl.DETRDistillationLoss()(
            dkl.DetectorOutput(scalar, scalar), dkl.DetectorOutput(scalar, scalar), dkl.Targets(scalar, scalar, scalar)
        ),
    ],
)
def test_a_tensor_without_dimensions_is_refused_by_name(call):
    with pytest.raises(ValueError, match=r"^`[a-z0-9_.]+` must have shape"):
        call(torch.zeros(()))


@pytest.mark.parametrize("preset", PRESETS)
def test_strides_do_not_matter(preset):
    batch = make_step()
    expected = loss_and_gradients(*batch, preset)
    strided = [over_tensors(lambda tensor: tensor.mT.contiguous().mT, part) for part in batch]
    assert not strided[0].logits.is_contiguous()
    assert_close(loss_and_gradients(*strided, preset), expected)


@pytest.mark.parametrize("preset", PRESETS)
def test_expanded_tensors(preset):
    """The same image many times, without copies."""
    student, teacher, targets = make_step(images=1)

    def expanded(tensor):
        return (
            tensor.expand(tensor.shape[0], 3, *tensor.shape[2:])
            if tensor.shape[0] == 2
            else tensor.expand(3, *tensor.shape[1:])
        )

    batch = [over_tensors(expanded, part) for part in (student, teacher, targets)]
    copies = [over_tensors(torch.clone, part) for part in batch]
    assert 0 in batch[1].logits.stride()
    assert_close(loss_and_gradients(*batch, preset), loss_and_gradients(*copies, preset))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("kind", ["requires grad", "inference mode"])
def test_teachers_of_any_mode(kind, preset):
    student, teacher, targets = make_step()
    expected = loss_and_gradients(student, teacher, targets, preset)
    if kind == "requires grad":
        teacher = over_tensors(floating(lambda tensor: tensor.requires_grad_()), teacher)
    else:
        with torch.inference_mode():
            teacher = over_tensors(torch.clone, teacher)
        assert teacher.logits.is_inference()
    assert_close(loss_and_gradients(student, teacher, targets, preset), expected)
    assert all(tensor is None or tensor.grad is None for tensor in teacher)


class Named(torch.Tensor):
    """A subclass such as those that datasets use for boxes."""


@pytest.mark.parametrize("preset", PRESETS)
def test_subclasses_of_tensor(preset):
    batch = make_step()
    named = [over_tensors(lambda tensor: tensor.as_subclass(Named), part) for part in batch]
    expected = loss_and_gradients(*batch, preset)
    for values, plain in zip(loss_and_gradients(*named, preset), expected, strict=True):
        assert_close({name: value.as_subclass(torch.Tensor) for name, value in values.items()}, plain)


def test_parameters_are_tensors():
    student, teacher, targets = make_step()
    loss = dkl.DETRDistillationLoss()(student._replace(logits=nn.Parameter(student.logits)), teacher, targets)
    assert sum(loss.values()).requires_grad
