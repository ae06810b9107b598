"""Lists of terms with names: those of the paper, of its public code, and those that did best in our experiments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

from detr_kd_losses._validation import validate_choice
from detr_kd_losses.term import Term
from detr_kd_losses.terms.features import FeatureTerm
from detr_kd_losses.terms.logits import LogitsTerm
from detr_kd_losses.terms.query_group import QueryGroupTerm

__all__: list[str] = []

Preset = Literal["paper", "official", "recommended"]


def preset_terms(
    name: Preset,
    student_channels: Sequence[int] | None = None,
    teacher_channels: Sequence[int] | None = None,
) -> list[Term]:
    """Return the terms of a preset, with a projection of features between models of different widths."""
    features = partial(FeatureTerm, student_channels, teacher_channels)
    presets: dict[Preset, Callable[[], list[Term]]] = {
        "paper": lambda: [LogitsTerm(), features(), QueryGroupTerm()],
        "official": lambda: [
            LogitsTerm(matching="joint"),
            features(weight=20.0, variant="official", relative=False),
            QueryGroupTerm(),
        ],
        # Of the trainings in docs/explanation/evidence.md.
        "recommended": lambda: [features(weight=60.0)],
    }
    validate_choice("preset", name, tuple(presets))
    return presets[name]()
