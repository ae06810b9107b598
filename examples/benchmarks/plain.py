"""The public formulation, written straightforwardly: what the package is measured against.

Matching image by image and layer by layer with SciPy, one (M, H, W) similarity tensor per layer and level, one
pass over the features for each of them, losses pair by pair of (layer, image). Same numbers as
``DETRDistillationLoss("official", class_loss as here)``; see `criterion.py`, which checks that first.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

import detr_kd_losses as dkl


def corners(boxes: Tensor) -> Tensor:
    centre, size = boxes[..., :2], boxes[..., 2:]
    return torch.cat((centre - size / 2, centre + size / 2), dim=-1)


def iou_and_union(boxes1: Tensor, boxes2: Tensor) -> tuple[Tensor, Tensor]:
    """All pairs, as DETR computes it, with (N, M, 2) temporaries."""
    area1, area2 = ((b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1]) for b in (boxes1, boxes2))
    size = torch.min(boxes1[:, None, 2:], boxes2[:, 2:]) - torch.max(boxes1[:, None, :2], boxes2[:, :2])
    inter = size.clamp(min=0).prod(-1)
    union = area1[:, None] + area2 - inter
    return inter / union, union


def giou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    iou, union = iou_and_union(boxes1, boxes2)
    size = torch.max(boxes1[:, None, 2:], boxes2[:, 2:]) - torch.min(boxes1[:, None, :2], boxes2[:, :2])
    hull = size.clamp(min=0).prod(-1)
    return iou - (hull - union) / hull


@torch.no_grad()
def match_targets(logits: Tensor, boxes: Tensor, labels: Tensor, target_boxes: Tensor) -> tuple[Tensor, Tensor]:
    p = logits.sigmoid()
    positive = 0.25 * (1 - p) ** 2 * -p.clamp(min=1e-30).log()
    negative = 0.75 * p**2 * -(1 - p).clamp(min=1e-30).log()
    cost = 2 * (positive - negative)[:, labels]
    cost = cost + 5 * torch.cdist(boxes, target_boxes, p=1) - 2 * giou(corners(boxes), corners(target_boxes))
    return tuple(torch.as_tensor(index) for index in linear_sum_assignment(cost.cpu()))


@torch.no_grad()
def match_teacher(logits: Tensor, boxes: Tensor, t_logits: Tensor, t_boxes: Tensor) -> tuple[Tensor, Tensor]:
    p = t_logits.sigmoid()
    cost = F.softplus(logits).sum(-1, keepdim=True) - logits @ p.T
    cost = cost + 5 * torch.cdist(boxes, t_boxes, p=1) - 2 * giou(corners(boxes), corners(t_boxes))
    return tuple(torch.as_tensor(index) for index in linear_sum_assignment(cost.cpu()))


@torch.no_grad()
def quality(logits: Tensor, boxes: Tensor, target_boxes: Tensor, topk: int = 100) -> tuple[Tensor, Tensor]:
    """Indices of the queries of the `topk` (query, class) scores, and score times best IoU of each."""
    scores, index = logits.sigmoid().flatten().topk(min(topk, logits.numel()))
    queries = index // logits.shape[-1]
    if len(target_boxes):
        scores = scores * iou_and_union(corners(boxes[queries]), corners(target_boxes))[0].max(-1).values
    return queries, scores


def logits_loss(student: dkl.DetectorOutput, teacher: dkl.DetectorOutput) -> Tensor:
    total = student.logits.new_zeros(())
    for layer in range(len(student.logits)):
        layer_loss, pairs = student.logits.new_zeros(()), 0
        for image in range(student.logits.shape[1]):
            s_logits, s_boxes = student.logits[layer, image], student.boxes[layer, image]
            t_logits, t_boxes = teacher.logits[layer, image], teacher.boxes[layer, image]
            s, t = match_teacher(s_logits, s_boxes, t_logits, t_boxes)
            bce = F.binary_cross_entropy_with_logits(s_logits[s], t_logits[t].sigmoid(), reduction="sum")
            l1 = F.l1_loss(s_boxes[s], t_boxes[t], reduction="sum")
            overlap = giou(corners(s_boxes[s]), corners(t_boxes[t])).diagonal()
            layer_loss = layer_loss + bce + 5 * l1 + 2 * (1 - overlap).sum()
            pairs += len(s)
        total = total + layer_loss / pairs
    return total


def feature_loss(student: dkl.DetectorOutput, teacher: dkl.DetectorOutput, targets: dkl.Targets) -> Tensor:
    total = student.logits.new_zeros(())
    for layer in range(len(teacher.logits)):
        weights = torch.zeros(teacher.logits.shape[1:3])
        for image in range(len(weights)):
            boxes = targets.boxes[image][targets.mask[image]]
            queries, scores = quality(teacher.logits[layer, image], teacher.boxes[layer, image], boxes)
            weights[image].index_add_(0, queries, scores)
        for s_level, t_level in zip(student.features, teacher.features, strict=True):
            directions = F.normalize(teacher.queries[layer], dim=-1)
            similarity = torch.einsum("bmc,bchw->bmhw", directions, F.normalize(t_level, dim=1))
            mask = (weights[:, :, None, None] * similarity).sum(1, keepdim=True).clamp(min=0.01)
            mask = mask / mask.flatten(1).max(-1).values[:, None, None, None]
            total = total + F.mse_loss(s_level * mask, t_level * mask)
    return total


def query_group_loss(student: dkl.DetectorOutput, teacher: dkl.DetectorOutput, targets: dkl.Targets) -> Tensor:
    """The detection loss of the group, under the teacher's assignment."""
    total = student.logits.new_zeros(())
    num_targets = max(int(targets.mask.sum()), 1)
    for layer in range(len(teacher.logits)):
        for image in range(teacher.logits.shape[1]):
            labels = targets.labels[image][targets.mask[image]]
            boxes = targets.boxes[image][targets.mask[image]]
            q, t = match_targets(teacher.logits[layer, image], teacher.boxes[layer, image], labels, boxes)
            logits, predicted = student.group.logits[layer, image], student.group.boxes[layer, image][q]
            onehot = torch.zeros_like(logits)
            onehot[q, labels[t]] = 1
            p = logits.sigmoid()
            p_t = p * onehot + (1 - p) * (1 - onehot)
            alpha_t = 0.25 * onehot + 0.75 * (1 - onehot)
            bce = F.binary_cross_entropy_with_logits(logits, onehot, reduction="none")
            total = total + (alpha_t * (1 - p_t) ** 2 * bce).sum() / num_targets
            total = total + 5 * F.l1_loss(predicted, boxes[t], reduction="sum") / num_targets
            overlap = giou(corners(predicted), corners(boxes[t])).diagonal()
            total = total + 2 * (1 - overlap).sum() / num_targets
    return total
