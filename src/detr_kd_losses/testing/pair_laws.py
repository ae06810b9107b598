"""The laws of losses of what matched queries say beside classes and boxes.

>>> from functools import partial
>>> import detr_kd_losses as dkl
>>> from detr_kd_losses.testing.pair_makers import BINS, SCALE
>>> loss = partial(dkl.box_distribution_loss, student_bins=BINS, student_scale=SCALE)
>>> BOX_DISTRIBUTION_LAWS["zero_at_teacher"](loss, max_examples=5)
"""

from __future__ import annotations

from detr_kd_losses.testing import loss_laws as laws
from detr_kd_losses.testing.law import Law, laws_by_name
from detr_kd_losses.testing.pair_makers import box_distribution_arguments, mask_arguments
from detr_kd_losses.testing.query_laws import equal_weights, weightless
from detr_kd_losses.testing.signatures import BOX_DISTRIBUTIONS, MASKS

__all__ = ["BOX_DISTRIBUTION_LAWS", "MASK_LAWS"]

_OF_PAIRS: tuple[Law, ...] = (
    laws.no_pairs,
    laws.non_negative,
    laws.finite,
    laws.student_permutation,
    laws.teacher_permutation,
    laws.unmatched_students,
    laws.unmatched_teachers,
    laws.images_join,
    laws.stages_add,
    laws.replicas,
    equal_weights,
    weightless,
    laws.teacher_detached,
    laws.half_precision,
)

BOX_DISTRIBUTION_LAWS = laws_by_name(
    BOX_DISTRIBUTIONS,
    box_distribution_arguments(),
    *_OF_PAIRS,
    laws.zero_at_teacher.on(box_distribution_arguments(box_kinds=laws.WITH_AREA)),
    laws.zero_at_empty_boxes.on(box_distribution_arguments(box_kinds=("degenerate",))),
    laws.gradients.on(box_distribution_arguments(**laws.GENERIC)),
)

MASK_LAWS = laws_by_name(
    MASKS,
    mask_arguments(),
    *_OF_PAIRS,
    laws.zero_at_teacher,
    laws.gradients.on(mask_arguments(logit_kinds=("generic",))),
)
