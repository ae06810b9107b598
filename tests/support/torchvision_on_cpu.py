"""torchvision beside a PyTorch for the CPU: the wheel on PyPI is for CUDA, and its operators do not load.

Declared beforehand, with an implementation of the one that detectors use, the part that is Python can be imported.
"""

from __future__ import annotations

import torch
from torch import Tensor

LIBRARY = torch.library.Library("torchvision", "FRAGMENT")


def import_torchvision() -> None:
    """Import torchvision, whatever PyTorch it was built for."""
    if not hasattr(torch.ops.torchvision, "nms"):
        for name in ("nms", "qnms"):
            LIBRARY.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            LIBRARY.impl(name, suppress, "CPU")
    import torchvision

    if not torchvision.extension._has_ops():
        torchvision.extension._has_ops = lambda: True


def suppress(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Indices of boxes that overlap no surer one, the surest first."""
    import detr_kd_losses as dkl

    kept: list[int] = []
    for index in scores.argsort(descending=True, stable=True).tolist():
        others = boxes[kept]
        if not kept or dkl.box_iou(boxes[index : index + 1], others).max() <= threshold:
            kept.append(index)
    return torch.tensor(kept, dtype=torch.int64)
