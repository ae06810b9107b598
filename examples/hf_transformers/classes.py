"""Whether student and teacher mean the same by a class: transformers' configurations know the names."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import nn

import detr_kd_losses as dkl
from detr_kd_losses import taps


def distillation_loss(student: nn.Module, teacher: nn.Module, **options: Any) -> dkl.DETRDistillationLoss:
    """Return a `DETRDistillationLoss` for two models: heads and widths as configured, the other options as given.

    Without `class_map`, the classes of both must be the same, by number and, where the configurations have them, by
    name; `match_classes` makes a map by names.
    """
    check_apart(student, teacher)
    if options.get("class_map") is None:
        check_classes(student, teacher)
    return taps.distillation_loss(student, teacher, **options)


def class_names(model: nn.Module) -> list[str] | None:
    """Return the name of each class, for comparison; None where the configuration has only placeholders."""
    config = model.config
    names = [str(config.id2label.get(label, "")).strip().casefold() for label in range(config.num_labels)]
    return None if all(name == f"label_{label}" for label, name in enumerate(names)) else names


def match_classes(student: nn.Module, teacher: nn.Module) -> list[int]:
    """Return a `class_map`: the student's class of the same name for each class of the teacher, -1 = none.

    Names that a model has twice, such as "N/A", have no partner.
    """
    student_names, teacher_names = class_names(student), class_names(teacher)
    if student_names is None or teacher_names is None:
        msg = "the classes of student and teacher must have names in `config.id2label`, to be matched by them"
        raise ValueError(msg)
    once = [{name for name, count in Counter(names).items() if count == 1} for names in (student_names, teacher_names)]
    return [student_names.index(name) if name in once[0] & once[1] else -1 for name in teacher_names]


def check_classes(student: nn.Module, teacher: nn.Module) -> None:
    """Raise, with the remedy, unless student and teacher have the same classes in the same order, as far as is known.

    For a distillation without `class_map`, which teaches class by class.
    """
    numbers = student.config.num_labels, teacher.config.num_labels
    names = class_names(student), class_names(teacher)
    if numbers[0] == numbers[1] and (None in names or names[0] == names[1]):
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


def check_heads(distillation: dkl.DETRDistillationLoss, student: nn.Module, teacher: nn.Module) -> None:
    """Raise unless a loss reads the logits of both models by the heads that they have."""
    for side, model in (("student_activation", student), ("teacher_activation", teacher)):
        given, needed = getattr(distillation, side), taps.Tap(model).activation
        if given != needed:
            msg = (
                f"`distillation` must have {side}={needed!r} for a {type(model).__name__}, got {given!r}; "
                "distillation_loss(student, teacher, ...) sets it"
            )
            raise ValueError(msg)


def check_apart(student: nn.Module, teacher: nn.Module) -> None:
    """Raise if the models share parameters: those of the teacher are frozen."""
    if not set(student.parameters()).isdisjoint(teacher.parameters()):
        msg = (
            "`teacher` must be another model than the student, with parameters of its own, since it is frozen; "
            "copy.deepcopy makes one"
        )
        raise ValueError(msg)


def _shown(values: list | None, *, limit: int = 6) -> str:
    if values is None:
        return "(without names)"
    return f"[{', '.join(map(repr, values[:limit]))}{', ...' if len(values) > limit else ''}]"
