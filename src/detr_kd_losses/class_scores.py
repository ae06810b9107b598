"""Class scores of a teacher in the class space of a student.

A sigmoid head has C independent channels; a softmax head has C + 1, the last one "no object". Teacher and
student may have different heads and, with a class map, different classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from detr_kd_losses._checks import check_choice, check_dtype, check_floating, full_precision

__all__ = ["Activation", "ClassMap", "map_class_logits"]

Activation = Literal["sigmoid", "softmax"]
ClassMap = Sequence[int] | Tensor

ACTIVATIONS = ("sigmoid", "softmax")
# Logit of a class that a teacher does not know: no score in any dtype, yet finite and without overflow.
_UNKNOWN = -1e4


def map_class_logits(
    logits: Tensor, class_map: ClassMap, num_classes: int, *, activation: Activation = "sigmoid"
) -> Tensor:
    """Logits of a detector, expressed in the classes of another one.

    Teacher classes that go to the same student class are merged: a sigmoid head keeps the highest score, a
    softmax head adds its probabilities. A dropped class adds its probability to "no object" of a softmax head.
    A student class that no teacher class goes to gets no score.

    Args:
        logits: (..., C) of a sigmoid head, or (..., C + 1) of a softmax head ("no object" last).
        class_map: One entry for each of the C classes: the index of the class in the other detector, or -1 to
            drop it. An int64 tensor on the device of `logits` spares a copy from the host on every call; its entries
            are checked on the CPU only.
        num_classes: Number of classes of the other detector, without "no object".
        activation: Head of this detector, ``"sigmoid"`` or ``"softmax"``.

    Returns:
        (..., num_classes), or (..., num_classes + 1) of a softmax head. In float32 for half precision.

    Raises:
        ValueError: If `class_map` has another length than C or an entry outside [-1, num_classes).

    Examples:
        A teacher of (car, dog, truck) for a student of (dog, vehicle, person):

        >>> logits = torch.tensor([2.0, -1.0, 3.0])
        >>> map_class_logits(logits, [1, 0, 1], 3).sigmoid().round(decimals=2)
        tensor([0.2700, 0.9500, 0.0000])
    """
    check_choice("activation", activation, ACTIVATIONS)
    check_floating("logits", logits)
    logits = full_precision(logits)
    softmax = activation == "softmax"
    index = class_index(class_map, logits.shape[-1] - softmax, num_classes, device=logits.device)
    if softmax:
        # Dropped classes and "no object" share the last slot.
        index = torch.cat((index, index.new_full((1,), num_classes)))
        merged = logits.new_zeros((*logits.shape[:-1], num_classes + 1))
        merged = merged.index_add(-1, index, logits.softmax(-1))
        return merged.clamp(min=torch.finfo(merged.dtype).tiny).log()
    merged = logits.new_full((*logits.shape[:-1], num_classes + 1), _UNKNOWN)
    return merged.scatter_reduce(-1, index.expand(logits.shape), logits, "amax")[..., :-1]


def class_index(class_map: ClassMap, teacher_classes: int, num_classes: int, *, device: torch.device) -> Tensor:
    """`class_map` as an int64 tensor (C,) whose dropped classes point to the slot after the last class."""
    if isinstance(class_map, Tensor):
        check_dtype("class_map", class_map, torch.int64)
        if class_map.device != device:
            msg = f"`class_map` must be on the device of `logits` {device}, got {class_map.device}"
            raise ValueError(msg)
        index = class_map
    else:
        index = torch.tensor(class_map, dtype=torch.int64)
    # On the host the values are at hand; on a GPU they would have to be waited for.
    if index.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = index[(index < -1) | (index >= num_classes)]
        if len(wrong):
            msg = f"`class_map` must have entries in [-1, {num_classes}), got {int(wrong[0])}"
            raise ValueError(msg)
    index = index.to(device)
    if index.shape != (teacher_classes,):
        msg = (
            f"`class_map` must have one entry for each of the {teacher_classes} teacher classes, "
            f"got shape {tuple(index.shape)}"
        )
        raise ValueError(msg)
    return torch.where(index < 0, num_classes, index)


def known_classes(class_map: ClassMap, teacher_classes: int, num_classes: int, *, device: torch.device) -> Tensor:
    """Bool (num_classes,): whether some teacher class goes to the student class."""
    index = class_index(class_map, teacher_classes, num_classes, device=device)
    known = torch.zeros(num_classes + 1, dtype=torch.bool, device=device)
    return known.scatter(0, index, value=True)[:-1]


class LogScores(NamedTuple):
    """Log-probabilities of the channels of a head, and of their complements for a sigmoid head."""

    log_p: Tensor
    log_not_p: Tensor | None


def log_scores(logits: Tensor, activation: Activation) -> LogScores:
    """Log-probabilities of a head's own logits (..., C)."""
    if activation == "softmax":
        return LogScores(logits.log_softmax(-1), None)
    return LogScores(F.logsigmoid(logits), F.logsigmoid(-logits))


def in_student_classes(
    teacher_logits: Tensor, num_classes: int, teacher_activation: Activation, class_map: ClassMap | None
) -> Tensor:
    """The teacher's logits in the `num_classes` classes of the student, in the teacher's own head."""
    if class_map is not None:
        return map_class_logits(teacher_logits, class_map, num_classes, activation=teacher_activation)
    teacher_classes = teacher_logits.shape[-1] - (teacher_activation == "softmax")
    if teacher_classes != num_classes:
        msg = (
            f"`teacher_logits` must have the student's {num_classes} classes (pass `class_map` if they differ), "
            f"got {teacher_classes} and a {teacher_activation} head"
        )
        raise ValueError(msg)
    return teacher_logits


def teacher_log_scores(
    logits: Tensor,
    student_channels: int,
    student_activation: Activation,
    teacher_activation: Activation,
    class_map: ClassMap | None,
) -> LogScores:
    """What the teacher's logits (..., C') say in the head of the student: (..., student_channels).

    Softmax to sigmoid: each class keeps its probability. Sigmoid to softmax: the scores, divided by their sum where it
    exceeds 1, and what they leave of 1 as "no object".
    """
    check_choice("student_activation", student_activation, ACTIVATIONS)
    check_choice("teacher_activation", teacher_activation, ACTIVATIONS)
    num_classes = student_channels - (student_activation == "softmax")
    logits = in_student_classes(logits, num_classes, teacher_activation, class_map)
    own = log_scores(logits, teacher_activation)
    if student_activation == teacher_activation:
        return own
    tiny, almost_one = torch.finfo(logits.dtype).tiny, 1 - torch.finfo(logits.dtype).eps
    if student_activation == "sigmoid":
        log_p = own.log_p[..., :-1]
        return LogScores(log_p, torch.log1p(-log_p.exp().clamp(max=almost_one)))
    scores = own.log_p.exp()
    scores = scores / scores.sum(-1, keepdim=True).clamp(min=1)
    nothing = 1 - scores.sum(-1, keepdim=True)
    return LogScores(torch.cat((scores, nothing), dim=-1).clamp(min=tiny).log(), None)


def forget_unknown_classes(
    student_logits: Tensor,
    teacher_channels: int,
    student_activation: Activation,
    teacher_activation: Activation,
    class_map: ClassMap | None,
) -> Tensor:
    """Take the classes that no teacher class goes to out of the student's logits.

    Their logit becomes that of a certain absence: no cross-entropy against the teacher's score 0, no share of a
    softmax, no gradient.
    """
    if class_map is None:
        return student_logits
    num_classes = student_logits.shape[-1] - (student_activation == "softmax")
    teacher_classes = teacher_channels - (teacher_activation == "softmax")
    known = known_classes(class_map, teacher_classes, num_classes, device=student_logits.device)
    if student_activation == "softmax":
        known = torch.cat((known, known.new_ones(1)))
    return torch.where(known, student_logits, _UNKNOWN)
