"""A criterion whose heads and widths are those of two models."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from detr_kd_losses.criterion import DETRDistillationLoss
from detr_kd_losses.presets import Preset, preset_terms
from detr_kd_losses.taps.agreement import validate_apart, validate_classes
from detr_kd_losses.taps.find import attribute_around, find_decoder, query_channels, unwrap
from detr_kd_losses.term import Term

__all__ = ["distillation_loss", "feature_channels", "num_levels"]


def distillation_loss(
    student: nn.Module,
    teacher: nn.Module,
    *,
    levels: int | None = None,
    terms: Preset | Iterable[Term] | Mapping[str, Term] = "paper",
    **options: Any,
) -> DETRDistillationLoss:
    """Return a :class:`DETRDistillationLoss` for two models: heads and widths as they have them.

    Without `class_map`, the classes of both must be the same, by name and number as far as the models know them;
    :func:`match_classes` makes a map by names.

    Args:
        student: The student.
        teacher: The teacher.
        levels: Number of feature levels that are distilled. None: all of the student's.
        terms: The name of a preset, which gets a projection of features between models of different widths; or
            terms, as :class:`DETRDistillationLoss` takes them.
        **options: Those of :class:`DETRDistillationLoss`.

    Returns:
        The criterion; what it learns, if anything, are its parameters.

    Raises:
        ValueError: If a decoder is not found, both share parameters, terms do not fit the heads, or
            the classes are known to differ.
    """
    validate_apart(student, teacher)
    if options.get("class_map") is None:
        validate_classes(student, teacher)
    models = {"student": student, "teacher": teacher}
    heads = {f"{role}_activation": find_decoder(unwrap(model)).description.activation for role, model in models.items()}
    if isinstance(terms, str):
        terms = preset_terms(terms, *feature_channels(student, teacher, levels))
    return DETRDistillationLoss(terms, **(heads | options))


def feature_channels(student: nn.Module, teacher: nn.Module, levels: int | None = None) -> list[list[int] | None]:
    """Return the channels of each level of student and teacher, as a :class:`FeatureTerm` takes them.

    Args:
        student: The student.
        teacher: The teacher.
        levels: Number of feature levels. None: all of the student's.

    Returns:
        Two lists; twice None where the widths agree and nothing is to be projected.

    Raises:
        ValueError: If a decoder is not found.
    """
    widths = [query_channels(model) for model in (student, teacher)]
    if widths[0] == widths[1]:
        return [None, None]
    return [[width] * (levels or num_levels(student)) for width in widths]


def num_levels(model: nn.Module) -> int:
    """Return how many feature levels a model says that it has around its decoder, or 1."""
    return attribute_around(model, ("num_levels", "num_feature_levels", "nl")) or 1
