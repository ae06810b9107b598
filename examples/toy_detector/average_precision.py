"""Average precision as COCO defines it, in a few batched tensor operations."""

from __future__ import annotations

import torch
from torch import Tensor

import detr_kd_losses as dkl

IOU_THRESHOLDS = torch.linspace(0.5, 0.95, 10)
RECALLS = torch.arange(101, dtype=torch.float64) / 100


def average_precision(
    logits: Tensor, boxes: Tensor, targets: dkl.Targets, detections_per_image: int = 20
) -> tuple[float, float]:
    """Return AP (mean over the IoU thresholds 0.5, 0.55, ... 0.95) and AP50, in percent, mean over classes.

    logits (I, N, C) and boxes (I, N, 4) are those of the last decoder layer, for all I images of the data set. Every
    (query, class) pair is a detection; the best ones of each image count.
    """
    num_classes = logits.shape[-1]
    scores, pairs = logits.sigmoid().flatten(1).topk(min(detections_per_image, logits[0].numel()))
    labels = pairs % num_classes
    boxes = boxes.take_along_dim((pairs // num_classes)[..., None], 1)
    hits = match_detections(labels, boxes, targets)
    values = [
        interpolated_precision(scores[labels == c], hits[labels == c], int((targets.labels[targets.mask] == c).sum()))
        for c in targets.labels[targets.mask].unique()
    ]
    per_threshold = 100 * torch.stack(values).mean(0)
    return float(per_threshold.mean()), float(per_threshold[0])


def match_detections(labels: Tensor, boxes: Tensor, targets: dkl.Targets) -> Tensor:
    """Return hits (I, K, thresholds): whether a detection finds a target that no better detection found before.

    labels (I, K) and boxes (I, K, 4) are sorted by score. A detection takes the free target of its class with the
    largest IoU, where that IoU reaches the threshold.
    """
    iou = dkl.box_iou(dkl.box_cxcywh_to_xyxy(boxes), dkl.box_cxcywh_to_xyxy(targets.boxes))  # (I, K, T)
    candidates = (labels[:, :, None] == targets.labels[:, None]) & targets.mask[:, None]
    iou = iou.masked_fill(~candidates, -1)
    free = torch.ones(len(labels), len(IOU_THRESHOLDS), targets.labels.shape[1], dtype=torch.bool)
    hits = torch.zeros(*labels.shape, len(IOU_THRESHOLDS), dtype=torch.bool)
    for rank in range(labels.shape[1]):
        best, partner = iou[:, rank, None].masked_fill(~free, -1).max(-1)  # (I, thresholds)
        hits[:, rank] = best >= IOU_THRESHOLDS
        free.scatter_(2, partner[..., None], free.gather(2, partner[..., None]) & ~hits[:, rank, :, None])
    return hits


def interpolated_precision(scores: Tensor, hits: Tensor, num_targets: int) -> Tensor:
    """Return the mean over 101 recalls of the best precision at that recall or above, for each threshold.

    scores (K,) and hits (K, thresholds) are all detections of one class.
    """
    found = hits[scores.argsort(descending=True, stable=True)].double().cumsum(0)
    ranks = torch.arange(1, len(found) + 1)[:, None]
    precision = (found / ranks).flip(0).cummax(0).values.flip(0)
    precision = torch.cat([precision, torch.zeros(1, hits.shape[1])])  # beyond the largest recall
    recall = (found / num_targets).T.contiguous()
    first = torch.searchsorted(recall, RECALLS.expand(hits.shape[1], -1).contiguous())
    return precision.T.gather(1, first).mean(1)
