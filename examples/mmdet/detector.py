"""Detectors of MMDetection whose `loss` has the terms of a distillation beside their own.

Example configuration:
    custom_imports = dict(imports=["detector"])
    model = dict(
        type="DistilledDETR",  # instead of "DETR"; all its other options stay
        teacher="configs/detr/detr_r101.py",
        teacher_checkpoint="detr_r101.pth",
        distillation=dict(student_activation="softmax", teacher_activation="softmax"),
    )
"""

from __future__ import annotations

from typing import Any

import torch
from mmdet.models import DABDETR, DETR, DINO, ConditionalDETR, DeformableDETR
from mmdet.registry import MODELS
from mmdet.structures import SampleList
from mmengine.config import Config
from mmengine.runner import load_checkpoint
from torch import Tensor

import detr_kd_losses as dkl
from detr_kd_losses.training.teacher import FrozenTeacher


class Distilled:
    """Mixin: a detector that learns from the logits and boxes of a teacher, in every decoder layer.

    Args:
        teacher: The configuration file of the teacher, or its `model` part.
        teacher_checkpoint: Its weights; None leaves them random, for tests.
        distillation: Options of `DETRDistillationLoss`, whose heads must be the detector's.
        **options: Those of the detector.
    """

    def __init__(
        self,
        *,
        teacher: str | dict[str, Any],
        teacher_checkpoint: str | None = None,
        distillation: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        model = MODELS.build(Config.fromfile(teacher).model if isinstance(teacher, str) else teacher)
        if teacher_checkpoint is not None:
            load_checkpoint(model, teacher_checkpoint, map_location="cpu", strict=True)
        self.teacher = FrozenTeacher(model)
        self.distillation = dkl.DETRDistillationLoss([dkl.LogitsTerm()], **(distillation or {}))

    def loss(self, batch_inputs: Tensor, batch_data_samples: SampleList) -> dict[str, Tensor]:
        """Return the terms of the detector and of the distillation."""
        # What the head answers: logits (L, B, N, C) and boxes (L, B, N, 4). The hook goes and nothing is kept, so that
        # averages of weights can copy the detector at any time.
        answers: list[tuple[Tensor, ...]] = []
        hook = self.bbox_head.register_forward_hook(lambda _, __, output: answers.append(output[:2]))
        try:
            losses = super().loss(batch_inputs, batch_data_samples)
        finally:
            hook.remove()
        logits, boxes = (tensor[:, :, -self.num_queries :] for tensor in answers[0])  # after denoising queries
        teacher_logits, teacher_boxes = self.teacher(batch_inputs, batch_data_samples, mode="tensor")[:2]
        terms = self.distillation(
            dkl.DetectorOutput(logits, boxes),
            dkl.DetectorOutput(teacher_logits, teacher_boxes),
            dkl.pad_targets(normalised_targets(batch_data_samples)),
        )
        return {**losses, **terms}


def normalised_targets(batch_data_samples: SampleList) -> list[dict[str, Tensor]]:
    """Labels and boxes of each image, cxcywh in fractions of the image without its padding, as the heads predict."""
    targets = []
    for sample in batch_data_samples:
        height, width = sample.img_shape
        boxes = torch.as_tensor(sample.gt_instances.bboxes)  # xyxy in pixels
        size = boxes.new_tensor([width, height, width, height])
        targets.append({"labels": sample.gt_instances.labels, "boxes": dkl.box_xyxy_to_cxcywh(boxes / size)})
    return targets


@MODELS.register_module()
class DistilledDETR(Distilled, DETR):
    """DETR with a teacher."""


@MODELS.register_module()
class DistilledConditionalDETR(Distilled, ConditionalDETR):
    """Conditional DETR with a teacher."""


@MODELS.register_module()
class DistilledDABDETR(Distilled, DABDETR):
    """DAB-DETR with a teacher."""


@MODELS.register_module()
class DistilledDeformableDETR(Distilled, DeformableDETR):
    """Deformable DETR with a teacher."""


@MODELS.register_module()
class DistilledDINO(Distilled, DINO):
    """DINO with a teacher."""
