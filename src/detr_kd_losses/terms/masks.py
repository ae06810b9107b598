"""The term of masks."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from detr_kd_losses._options import Rules, one_of
from detr_kd_losses.losses.masks import RULES, mask_distillation_loss
from detr_kd_losses.paired_term import Matching, Negatives, PairedTerm, Weighting
from detr_kd_losses.stages import StageMap
from detr_kd_losses.step import Step

__all__ = ["MaskTerm"]

Cells = Literal["boxes", "all"]

_RULES: Rules = {**PairedTerm.rules, "cells": one_of("boxes", "all"), **RULES}


class MaskTerm(PairedTerm):
    """Masks of matched queries: a matching, then :func:`mask_distillation_loss`.

    It needs ``masks`` of both, which may have other sizes, and does not apply without. ``loss_kd_mask``.

    Args:
        weight: Weight of the term.
        prefix: Where its name begins.
        matching: ``"targets"``: a student query learns from the teacher query of its own target, the same object;
            or as in :class:`LogitsTerm`.
        negatives: What becomes of the teacher queries without a target, as in :class:`LogitsTerm`.
        weighting: How much a teacher query counts, as in :class:`LogitsTerm`.
        cost_class: Weight of the class in the matching cost.
        cost_bbox: Weight of the L1 distance in the matching cost.
        cost_giou: Weight of the negative GIoU in the matching cost.
        backend: Solver of the matching, by name (:func:`linear_sum_assignment`).
        stage_map: Which teacher layer teaches which student layer (:func:`select_stages`).
        cells: Those that the teacher's ``"boxes"`` touch, or ``"all"``.
        temperature: Divisor of both masks.
        sync_normalizer: Whether the sums of weights are averaged over replicas.

    Examples:
        >>> MaskTerm(cells="all").names
        ('loss_kd_mask',)

    References:
        See :func:`mask_distillation_loss`.
    """

    parts = ("mask",)
    needs = ("masks",)
    shares_counts = True
    rules = _RULES

    def __init__(
        self,
        *,
        weight: float = 1.0,
        prefix: str = "loss_kd_",
        matching: Matching = "targets",
        negatives: Negatives | None = None,
        weighting: Weighting = "uniform",
        cost_class: float = 1.0,
        cost_bbox: float = 5.0,
        cost_giou: float = 2.0,
        backend: str = "auto",
        stage_map: StageMap = "even",
        cells: Cells = "boxes",
        temperature: float = 1.0,
        sync_normalizer: bool = True,
    ) -> None:
        super().__init__(
            weight=weight,
            prefix=prefix,
            matching=matching,
            negatives=negatives,
            weighting=weighting,
            cost_class=cost_class,
            cost_bbox=cost_bbox,
            cost_giou=cost_giou,
            backend=backend,
            stage_map=stage_map,
            cells=cells,
            temperature=temperature,
            sync_normalizer=sync_normalizer,
        )

    def compute(self, step: Step) -> dict[str, Tensor]:
        """Match student to teacher queries and distil."""
        student, teacher = step.given_by_both("masks")
        pairing = self.pair(step)
        assignment, student = self.leave_out_the_single(step, pairing.assignment, student)
        boxes = self.in_students_depth(step, step.teacher.boxes) if self.cells == "boxes" else None
        loss = mask_distillation_loss(
            student,
            self.in_students_depth(step, teacher),
            assignment,
            boxes=boxes,
            teacher_weight=pairing.weight,
            **{name: self.call_options[name] for name in RULES},
        )
        return {"mask": loss}
