"""The term of plain feature distances."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from detr_kd_losses._options import Rules, one_of
from detr_kd_losses._reduction import shares_counts
from detr_kd_losses.losses.features.levels import box_mask
from detr_kd_losses.losses.features.plain import RULES, Distance, feature_distillation_loss
from detr_kd_losses.losses.features.projection import FeatureProjection, as_levels
from detr_kd_losses.step import Step
from detr_kd_losses.term import Term

__all__ = ["PlainFeatureTerm"]

Cells = Literal["all", "boxes"]

_RULES: Rules = {**Term.rules, "cells": one_of("all", "boxes"), **RULES}


class PlainFeatureTerm(Term):
    """Features cell by cell, wherever they are: :func:`feature_distillation_loss`.

    It needs ``features`` of both, which need not be of a detector, and does not apply without.
    ``loss_kd_plain_feature``.

    Args:
        student_channels: Channels of the student's feature map, or one number per level, where they differ from the
            teacher's: the learned projection is part of this Module (:class:`FeatureProjection`).
        teacher_channels: Channels of the teacher's feature map, or one number per level.
        weight: Weight of the term.
        prefix: Where its name begins.
        cells: ``"all"``, or those that the ``"boxes"`` of targets touch (:func:`box_mask`), but not for ``"channel"``.
        distance: ``"mse"``, ``"cosine"``, ``"pearson"`` or ``"channel"``.
        temperature: Divisor of both features in ``"channel"``.
        sync_normalizer: Whether numbers and statistics are those of all replicas. For ``"pearson"`` they add up the
            statistics of every level, in the backward pass too, so all must have features, whatever the weight.

    Examples:
        >>> PlainFeatureTerm([64, 128], [256, 256], distance="pearson").names
        ('loss_kd_plain_feature',)

    References:
        See :func:`feature_distillation_loss`.
    """

    parts = ("feature",)
    needs = ("features",)
    shares_counts = True
    rules = _RULES

    def __init__(
        self,
        student_channels: int | Sequence[int] | None = None,
        teacher_channels: int | Sequence[int] | None = None,
        *,
        weight: float = 1.0,
        prefix: str = "loss_kd_plain_",
        cells: Cells = "all",
        distance: Distance = "mse",
        temperature: float = 1.0,
        sync_normalizer: bool = True,
    ) -> None:
        super().__init__(
            weight=weight,
            prefix=prefix,
            cells=cells,
            distance=distance,
            temperature=temperature,
            sync_normalizer=sync_normalizer,
        )
        self.projections = FeatureProjection(student_channels, teacher_channels)

    def forward(self, step: Step) -> dict[str, Tensor]:
        """The scalars by name, weighted. Statistics that replicas share are computed at a weight of 0, too."""
        sync = self.call_options["sync_normalizer"]
        if self.distance != "pearson" or self.weight != 0 or not shares_counts(sync=sync):
            return super().forward(step)
        return {name: 0 * loss for name, loss in zip(self.names, self.compute(step).values(), strict=True)}

    def compute(self, step: Step) -> dict[str, Tensor]:
        """Compare the features."""
        students, teachers, own, mask = step.features()
        weight = None
        if self.cells == "boxes":
            boxes, valid = step.targets.boxes, step.targets.mask
            weight = [box_mask(boxes, valid, level.shape[-2:]) for level in as_levels("teacher.features", teachers)]
        loss = feature_distillation_loss(
            self.projections(students, teachers, own),
            teachers,
            weight=weight,
            padding_mask=mask,
            **{name: self.call_options[name] for name in RULES},
        )
        return {"feature": loss}
