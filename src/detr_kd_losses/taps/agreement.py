"""Whether student, teacher and losses mean the same: classes, heads, feature levels."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from detr_kd_losses.criterion import DETRDistillationLoss
from detr_kd_losses.taps.find import find_decoder, unwrap

__all__ = ["match_classes", "validate_apart", "validate_classes", "validate_heads", "validate_levels"]


def match_classes(student: nn.Module, teacher: nn.Module) -> list[int]:
    """Return a `class_map` of two models by the names of their classes.

    Names are those in ``model.config.id2label``, as of transformers, or in ``model.names``, as of Ultralytics, without
    regard to case. Those that a model has twice, such as "N/A", have no partner.

    Args:
        student: The student.
        teacher: The teacher.

    Returns:
        The student's class of each teacher class, -1 = none, for :class:`DETRDistillationLoss`.

    Raises:
        ValueError: If a model does not know the names of its classes.

    Examples:
        >>> student, teacher = nn.Module(), nn.Module()
        >>> student.names, teacher.names = ["dog", "person"], {0: "person", 1: "car", 2: "dog"}
        >>> match_classes(student, teacher)
        [1, -1, 0]
    """
    student_names, teacher_names = class_names(student), class_names(teacher)
    if student_names is None or teacher_names is None:
        msg = (
            "the classes of student and teacher must have names, in `config.id2label` or `names`, to be matched by "
            f"them, got {_shown(student_names)} and {_shown(teacher_names)}"
        )
        raise ValueError(msg)
    once = [{name for name, count in Counter(names).items() if count == 1} for names in (student_names, teacher_names)]
    return [student_names.index(name) if name in once[0] & once[1] else -1 for name in teacher_names]


def class_names(model: nn.Module) -> list[str] | None:
    """Return the name of each class, for comparison; None where there are only placeholders."""
    model = unwrap(model)
    config = getattr(model, "config", None)
    names: Any = getattr(config, "id2label", None) or getattr(model, "names", None)
    if isinstance(names, Mapping):
        names = [names.get(label, "") for label in range(getattr(config, "num_labels", len(names)))]
    if not isinstance(names, list | tuple):
        return None
    names = [str(name).strip().casefold() for name in names]
    held = all(re.fullmatch(f"((label|class)_?)?{label}", name) for label, name in enumerate(names))
    return None if held else names


def validate_classes(student: nn.Module, teacher: nn.Module) -> None:
    """Raise, with the remedy, unless student and teacher have the same classes in the same order, as far as is known.

    For a distillation without `class_map`, which teaches class by class.
    """
    names = class_names(student), class_names(teacher)
    numbers = _num_classes(student, names[0]), _num_classes(teacher, names[1])
    if None in names and (None in numbers or numbers[0] == numbers[1]):
        return
    if names[0] == names[1] and numbers[0] == numbers[1]:
        return
    remedy = "give `class_map`, the student's class of each class of the teacher, -1 = none"
    if None not in names:
        class_map = match_classes(student, teacher)
        known = len(class_map) - class_map.count(-1)
        remedy = (
            f"distillation_loss(student, teacher, class_map=match_classes(student, teacher)) teaches the {known} that "
            f"have the same name, by the map {_shown(class_map)}; list(range({numbers[1]})) says that all are the same "
            "under other names"
        )
    msg = (
        "student and teacher must have the same classes in the same order, got "
        f"{numbers[0]} {_shown(names[0])} and {numbers[1]} {_shown(names[1])}; otherwise {remedy}"
    )
    raise ValueError(msg)


def _num_classes(model: nn.Module, names: list[str] | None) -> int | None:
    return getattr(getattr(unwrap(model), "config", None), "num_labels", None if names is None else len(names))


def validate_heads(distillation: DETRDistillationLoss, student: nn.Module, teacher: nn.Module) -> None:
    """Raise unless a loss reads the logits of both models by the heads that they have."""
    for side, model in (("student_activation", student), ("teacher_activation", teacher)):
        given, needed = getattr(distillation, side), find_decoder(unwrap(model)).description.activation
        if given != needed:
            msg = (
                f"`distillation` must have {side}={needed!r} for a {type(unwrap(model)).__name__}, got {given!r}; "
                "distillation_loss(student, teacher, ...) sets it; if the head is another than its family has, set "
                f"`distillation.{side}` afterwards"
            )
            raise ValueError(msg)


def validate_apart(student: nn.Module, teacher: nn.Module) -> None:
    """Raise if the models share parameters: those of the teacher are frozen."""
    if not set(student.parameters()).isdisjoint(teacher.parameters()):
        msg = (
            "`teacher` must be another model than the student, with parameters of its own, since it is frozen; "
            "copy.deepcopy makes one"
        )
        raise ValueError(msg)


def validate_levels(levels: tuple[Sequence[int], Sequence[int]] | None) -> None:
    """Raise unless `levels` are as many of the student as of the teacher."""
    if levels is None:
        return
    pair = list(levels) if isinstance(levels, Sequence) else []
    numbers = [len(side) for side in pair if isinstance(side, Sequence) and all(isinstance(x, int) for x in side)]
    if len(pair) != 2 or len(numbers) != 2 or numbers[0] != numbers[1] or not numbers[0]:
        msg = f"`levels` must be those of the student and those of the teacher, as many, ([0, 1], [1, 2]), got {levels}"
        raise ValueError(msg)


def _shown(values: list[Any] | None, *, limit: int = 6) -> str:
    if values is None:
        return "(without names)"
    return f"[{', '.join(map(repr, values[:limit]))}{', ...' if len(values) > limit else ''}]"
