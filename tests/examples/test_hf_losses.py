"""`detection_loss` equals the losses of DETR and Deformable DETR in transformers, in value and gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

pytest.importorskip("transformers", reason="the reference losses are those of transformers")

from transformers.loss.loss_deformable_detr import (
    DeformableDetrHungarianMatcher,
    DeformableDetrImageLoss,
)
from transformers.loss.loss_for_object_detection import HungarianMatcher, ImageLoss

import detr_kd_losses as dkl

LAYERS, BATCH, QUERIES, CLASSES = 3, 3, 15, 6
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
WEIGHTS = {"loss_ce": 1.0, "loss_bbox": 5.0, "loss_giou": 2.0}


def draw(seed: int, channels: int) -> tuple[Tensor, Tensor, list[dict[str, Tensor]]]:
    """Logits, boxes and targets; the second image has no target, and for some seeds no image has."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(LAYERS, BATCH, QUERIES, channels, generator=generator)
    boxes = 0.05 + 0.9 * torch.rand(LAYERS, BATCH, QUERIES, 4, generator=generator)
    counts = [0] * BATCH if seed % 10 == 9 else [1 + seed % 5, 0, 7]
    targets = [
        {
            "class_labels": torch.randint(CLASSES, (count,), generator=generator),
            "boxes": 0.1 + 0.8 * torch.rand(count, 4, generator=generator),
        }
        for count in counts
    ]
    return logits.requires_grad_(), boxes.requires_grad_(), targets


def reference(criterion: torch.nn.Module, logits: Tensor, boxes: Tensor, targets: list[dict[str, Tensor]]) -> Tensor:
    layers = [{"logits": logits[layer], "pred_boxes": boxes[layer]} for layer in range(LAYERS)]
    terms = criterion({**layers[-1], "auxiliary_outputs": layers[:-1]}, targets)
    weights = {f"{name}{suffix}": weight for name, weight in WEIGHTS.items() for suffix in ("", "_0", "_1")}
    return torch.stack([weights[name] * term for name, term in terms.items() if name in weights]).sum()


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("head", ["softmax", "sigmoid"])
def test_detection_loss_equals_transformers(head: str, seed: int) -> None:
    options = {"class_cost": 1.0, "bbox_cost": 5.0, "giou_cost": 2.0}
    if head == "softmax":
        criterion = ImageLoss(HungarianMatcher(**options), CLASSES, eos_coef=0.1, losses=["labels", "boxes"])
    else:
        matcher = DeformableDetrHungarianMatcher(**options)
        criterion = DeformableDetrImageLoss(matcher, CLASSES, focal_alpha=0.25, losses=["labels", "boxes"])
    logits, boxes, images = draw(seed, CLASSES + (head == "softmax"))
    expected = reference(criterion, logits, boxes, images)
    expected_gradients = torch.autograd.grad(expected, (logits, boxes))

    targets = dkl.pad_targets(images)
    cost = "softmax" if head == "softmax" else "focal"
    assignment = dkl.match_targets(logits, boxes, *targets, class_cost=cost, weight_class=1.0)
    loss = "cross_entropy" if head == "softmax" else "focal"
    actual = sum(dkl.detection_loss(logits, boxes, *targets, assignment, class_loss=loss).values())
    assert_close(actual, expected, **CLOSE)
    assert_close(torch.autograd.grad(actual, (logits, boxes)), expected_gradients, **CLOSE)
    assert max(gradient.abs().max() for gradient in expected_gradients) > 1e-3, "there must be something to compare"
