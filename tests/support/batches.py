"""Small batches with all that the criterion can use, and what it makes of them."""

from __future__ import annotations

import torch

import detr_kd_losses as dkl
from detr_kd_losses.testing import strategies


def make_output(seed, *, images=2, stages=2, queries=5, classes=3, group=None, dtype=torch.float32, **kinds):
    """A detector's outputs: all that the criterion can use."""
    size = {"stages": stages, "images": images, "classes": classes, **kinds}
    logits, boxes = strategies.make_predictions(queries=queries, seed=seed, **size)
    (features,), (mask,) = strategies.make_feature_pyramid(
        images=images, channels=4, height=3, width=4, padded=True, seed=seed
    )
    queries = strategies.make_logits((*boxes.shape[:-1], 4), seed=seed)
    fields = [logits, boxes, queries, features]
    if group is not None:
        fields += strategies.make_predictions(queries=group, seed=seed + 1, **size)
    logits, boxes, queries, features, *groups = (tensor.to(dtype) for tensor in fields)
    return dkl.DetectorOutput(logits, boxes, queries, features, mask, *groups)


def make_batch(images=2, teachers=6, targets=3, **options):
    student = make_output(0, images=images, group=teachers, **options)
    teacher = make_output(10, images=images, queries=teachers, **options)
    truth = strategies.make_targets(images=images, targets=targets, classes=3, seed=20)
    return student, teacher, truth._replace(boxes=truth.boxes.to(student.boxes.dtype))


def over_tensors(function, output):
    return type(output)(*(function(value) if isinstance(value, torch.Tensor) else value for value in output))


def floating(function):
    return lambda tensor: function(tensor) if tensor.is_floating_point() else tensor


def loss_and_gradients(student, teacher, targets, preset="official", **options):
    """All terms of the criterion, and the gradient of each of the student's tensors."""
    criterion = dkl.DETRDistillationLoss(preset, **options)
    leaves = over_tensors(floating(lambda tensor: tensor.detach().clone().requires_grad_()), student)
    losses = criterion(leaves, teacher, targets)
    sum(losses.values()).backward()
    assert set(losses) >= {"loss_kd_class", "loss_kd_feature", "loss_kd_group_class"}
    grads = {
        name: getattr(leaves, name).grad for name in ("logits", "boxes", "features", "group_logits", "group_boxes")
    }
    return {name: loss.detach() for name, loss in losses.items()}, grads
