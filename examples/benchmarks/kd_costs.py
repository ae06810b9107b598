"""Assignment problems as they come up in training: near ties, duplicates, clusters. Uniform costs are far easier.

A scene is a few objects in clusters. Queries of a detector sit near objects (several near the same one) or on
background, with class scores to match; a teacher is closer and surer than a student. All matrices are (P, N, T).
"""

from __future__ import annotations

import torch
from torch import Tensor

from detr_kd_losses.costs import detection_cost, distillation_cost

CLASSES = 80
CLUSTERS = 3
STUDENT = {"noise": 0.12, "confidence": 1.0}
TEACHER = {"noise": 0.05, "confidence": 2.5}


def distillation_problems(problems: int, rows: int, columns: int, *, seed: int = 0) -> Tensor:
    """Student queries against teacher queries; about ten objects per image."""
    generator = torch.Generator().manual_seed(seed)
    labels, boxes = make_objects(problems, 10, generator)
    student = make_queries(rows, labels, boxes, generator, **STUDENT)
    teacher = make_queries(columns, labels, boxes, generator, **TEACHER)
    return distillation_cost(*student, *teacher, weight_class=2.0)


def detection_problems(problems: int, rows: int, columns: int, *, seed: int = 0) -> Tensor:
    """Student queries against ground truths."""
    generator = torch.Generator().manual_seed(seed)
    labels, boxes = make_objects(problems, columns, generator)
    return detection_cost(*make_queries(rows, labels, boxes, generator, **STUDENT), labels, boxes)


def uniform_problems(problems: int, rows: int, columns: int, *, seed: int = 0) -> Tensor:
    """Independent entries."""
    return torch.rand(problems, rows, columns, generator=torch.Generator().manual_seed(seed))


def make_objects(images: int, objects: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Labels (B, G) and boxes (B, G, 4) of objects whose centres cluster."""
    clusters = 0.15 + 0.7 * torch.rand(images, CLUSTERS, 2, generator=generator)
    member = torch.randint(0, CLUSTERS, (images, objects, 1), generator=generator)
    centre = clusters.gather(1, member.expand(-1, -1, 2))
    centre = (centre + 0.08 * torch.randn(images, objects, 2, generator=generator)).clamp(0.03, 0.97)
    size = (0.8 * torch.randn(images, objects, 2, generator=generator) - 2.0).exp().clamp(0.01, 0.8)
    labels = torch.randint(0, CLASSES, (images, objects), generator=generator)
    return labels, torch.cat((centre, size), -1)


def make_queries(
    count: int,
    object_labels: Tensor,
    object_boxes: Tensor,
    generator: torch.Generator,
    *,
    noise: float,
    confidence: float,
    near_objects: float = 0.6,
) -> tuple[Tensor, Tensor]:
    """Logits (B, N, C) and boxes (B, N, 4) of one detector's queries."""
    images, objects = object_labels.shape

    def normal(*shape: int) -> Tensor:
        return torch.randn(images, count, *shape, generator=generator)

    owner = torch.randint(0, objects, (images, count), generator=generator)
    near = torch.rand(images, count, 1, generator=generator) < near_objects
    background = torch.cat((0.05 + 0.9 * torch.rand(images, count, 2, generator=generator), normal(2)), -1)
    background[..., 2:] = (0.9 * background[..., 2:] - 1.8).exp()
    boxes = torch.where(near, object_boxes.gather(1, owner[..., None].expand(-1, -1, 4)), background)
    boxes = boxes + noise * normal(4) * boxes[..., 2:].repeat(1, 1, 2) + 0.1 * noise * normal(4)
    boxes = torch.cat((boxes[..., :2].clamp(0, 1), boxes[..., 2:].clamp(0.005, 1)), -1)
    logits = 0.6 * normal(CLASSES) - 4.5
    label = object_labels.gather(1, owner)[..., None]
    peak = confidence + 2.2 * normal(1)
    return logits.scatter(-1, label, torch.where(near, peak, logits.gather(-1, label))), boxes
