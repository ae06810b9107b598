"""Read what distillation needs from the detectors that people train: hooks around a forward pass, no change to code.

::

    with torch.no_grad(), Tap(teacher) as teacher_tap:
        teacher(images)
    with Tap(student) as student_tap:
        outputs = student(images, targets)
    group = teacher_tap.query_group()
    losses = criterion(student_tap.output(group=group), teacher_tap.output(), pad_targets(targets))
"""

from detr_kd_losses.taps.agreement import match_classes
from detr_kd_losses.taps.answered import ModelDistillation
from detr_kd_losses.taps.coco import COCO_CATEGORY_IDS, coco_class_map
from detr_kd_losses.taps.find import query_channels
from detr_kd_losses.taps.loss import distillation_loss, feature_channels
from detr_kd_losses.taps.projections import learn_projections
from detr_kd_losses.taps.queries import QueryProjection, random_queries
from detr_kd_losses.taps.record import Call, Description, Layers, QueryGroup
from detr_kd_losses.taps.setup import check_setup
from detr_kd_losses.taps.tap import Tap
from detr_kd_losses.taps.wrapper import DistillationCriterion

__all__ = [
    "COCO_CATEGORY_IDS",
    "Call",
    "Description",
    "DistillationCriterion",
    "Layers",
    "ModelDistillation",
    "QueryGroup",
    "QueryProjection",
    "Tap",
    "check_setup",
    "coco_class_map",
    "distillation_loss",
    "feature_channels",
    "learn_projections",
    "match_classes",
    "query_channels",
    "random_queries",
]
