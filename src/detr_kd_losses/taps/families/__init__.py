"""The families of decoders that are known, as data."""

from __future__ import annotations

from detr_kd_losses.taps.families.hugging_face import FAMILIES
from detr_kd_losses.taps.families.lineage import D_FINE, RT_DETR
from detr_kd_losses.taps.families.repositories import CONDITIONAL, DAB, DEFORMABLE, DETR, DINO, RF_DETR
from detr_kd_losses.taps.record import Description

__all__ = ["BY_ARGUMENTS", "BY_MODEL_TYPE"]

BY_ARGUMENTS: tuple[Description, ...] = (D_FINE, RT_DETR, RF_DETR, DINO, DAB, DEFORMABLE, CONDITIONAL, DETR)
"""Told by the names of the decoder's arguments; the more special come first."""

BY_MODEL_TYPE: dict[str, Description] = FAMILIES
"""Those of transformers, told by ``config.model_type``."""
