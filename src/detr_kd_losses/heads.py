"""Heads: what the class logits of student and teacher mean, and what a teacher says in the classes of a student.

A sigmoid head has C independent channels; a softmax head has C + 1, the last one "no object". Teacher and
student may have different heads and, with a class map, different classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from detr_kd_losses._precision import full_precision
from detr_kd_losses._validation import validate_choice, validate_dtype, validate_floating, validate_type

__all__ = ["Activation", "ClassMap", "Heads", "map_class_logits"]

Activation = Literal["sigmoid", "softmax"]
ClassMap = Sequence[int] | Tensor
ClassCost = Literal["focal", "softmax"]
DetectionClassLoss = Literal["focal", "cross_entropy"]

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
    validate_choice("activation", activation, ACTIVATIONS)
    validate_floating("logits", logits)
    logits = full_precision(logits)
    softmax = activation == "softmax"
    index = class_index(class_map, num_classes_of(logits, activation), num_classes, device=logits.device)
    if softmax:
        # Dropped classes and "no object" share the last slot.
        index = torch.cat((index, index.new_full((1,), num_classes)))
        merged = logits.new_zeros((*logits.shape[:-1], num_classes + 1))
        merged = merged.index_add(-1, index, logits.softmax(-1))
        return merged.clamp(min=torch.finfo(merged.dtype).tiny).log()
    merged = logits.new_full((*logits.shape[:-1], num_classes + 1), _UNKNOWN)
    return merged.scatter_reduce(-1, index.expand(logits.shape), logits, "amax", include_self=False)[..., :-1]


def class_index(class_map: ClassMap, teacher_classes: int, num_classes: int, *, device: torch.device) -> Tensor:
    """`class_map` as an int64 tensor (C,) whose dropped classes point to the slot after the last class."""
    if isinstance(class_map, Tensor):
        validate_dtype("class_map", class_map, torch.int64)
        if class_map.device != device:
            msg = f"`class_map` must be on the device of `logits` {device}, got {class_map.device}"
            raise ValueError(msg)
        index = class_map
    else:
        validate_type("class_map", class_map, (Sequence, np.ndarray), "a sequence of classes, or a tensor of them")
        for entry in class_map:
            validate_type("class_map", entry, (int, np.integer), "whole numbers")
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


class LogScores(NamedTuple):
    """Log-probabilities of the channels of a head, and of their complements for a sigmoid head."""

    log_p: Tensor
    log_not_p: Tensor | None


def num_classes_of(logits: Tensor, activation: Activation) -> int:
    """Number of classes of a head with these logits (..., channels), without "no object"."""
    return logits.shape[-1] - (activation == "softmax")


def log_scores(logits: Tensor, activation: Activation) -> LogScores:
    """Log-probabilities of a head's own logits (..., C)."""
    if activation == "softmax":
        return LogScores(logits.log_softmax(-1), None)
    return LogScores(F.logsigmoid(logits), F.logsigmoid(-logits))


def nothing(logits: Tensor, activation: Activation) -> Tensor:
    """Logits (channels,) of a query that is certain to see nothing, like those `logits` (..., channels)."""
    absent = logits.new_full(logits.shape[-1:], _UNKNOWN)
    if activation == "sigmoid":
        return absent
    return absent.where(torch.arange(len(absent), device=logits.device) < len(absent) - 1, 0.0)


def class_cost_of(activation: Activation) -> ClassCost:
    """The class cost of :func:`detection_cost` that belongs to a head."""
    return "softmax" if activation == "softmax" else "focal"


def class_loss_of(activation: Activation) -> DetectionClassLoss:
    """The class loss of :func:`detection_loss` that belongs to a head."""
    return "cross_entropy" if activation == "softmax" else "focal"


@dataclass(frozen=True)  # no named tuple: the compiler of PyTorch 2.6 cannot trace their properties
class Heads:
    """The heads of a student and of its teacher, and how the teacher's classes go to the student's.

    Attributes:
        student: Head of the student: ``"sigmoid"``, or ``"softmax"`` with "no object" as its last channel.
        teacher: Head of the teacher.
        class_map: Student class of each teacher class, -1 = dropped (:func:`map_class_logits`). None: both have the
            same classes.

    Examples:
        >>> Heads(class_map=[1, 0]).in_student_classes(torch.tensor([5.0, -5.0]), torch.zeros(2)).tolist()
        [-5.0, 5.0]
    """

    student: Activation = "sigmoid"
    teacher: Activation = "sigmoid"
    class_map: ClassMap | None = None

    @property
    def options(self) -> dict[str, Any]:
        """The same as options of a loss or of :func:`match_teacher`."""
        return {"student_activation": self.student, "teacher_activation": self.teacher, "class_map": self.class_map}

    def validate(self) -> None:
        """Raise unless both activations are known."""
        validate_choice("student_activation", self.student, ACTIVATIONS)
        validate_choice("teacher_activation", self.teacher, ACTIVATIONS)

    def in_student_classes(self, teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
        """The teacher's logits in the classes of the student, in the teacher's own head."""
        num_classes = num_classes_of(student_logits, self.student)
        if self.class_map is not None:
            return map_class_logits(teacher_logits, self.class_map, num_classes, activation=self.teacher)
        teacher_classes = num_classes_of(teacher_logits, self.teacher)
        if teacher_classes != num_classes:
            msg = (
                f"`teacher_logits` must have the student's {num_classes} classes (pass `class_map` if they differ), "
                f"got {teacher_classes} and a {self.teacher} head"
            )
            raise ValueError(msg)
        return teacher_logits

    def known_classes(self, teacher_logits: Tensor, student_logits: Tensor) -> Tensor | None:
        """Bool (num_classes,): whether some teacher class goes to the student class; None where all are the same."""
        if self.class_map is None:
            return None
        teacher_classes = num_classes_of(teacher_logits, self.teacher)
        num_classes, device = num_classes_of(student_logits, self.student), student_logits.device
        index = class_index(self.class_map, teacher_classes, num_classes, device=device)
        known = torch.zeros(num_classes + 1, dtype=torch.bool, device=device)
        return known.scatter(0, index, value=True)[:-1]

    def teacher_log_scores(self, teacher_logits: Tensor, student_logits: Tensor) -> LogScores:
        """What the teacher's logits (..., C') say in the head of the student: (..., C).

        Softmax to sigmoid: each class keeps its probability. Sigmoid to softmax: the scores, divided by their sum
        where it exceeds 1, and what they leave of 1 as "no object".
        """
        logits = self.in_student_classes(teacher_logits, student_logits)
        own = log_scores(logits, self.teacher)
        if self.student == self.teacher:
            return own
        tiny, almost_one = torch.finfo(logits.dtype).tiny, 1 - torch.finfo(logits.dtype).eps
        if self.student == "sigmoid":
            log_p = own.log_p[..., :-1]
            return LogScores(log_p, torch.log1p(-log_p.exp().clamp(max=almost_one)))
        scores = own.log_p.exp()
        scores = scores / scores.sum(-1, keepdim=True).clamp(min=1)
        nothing = 1 - scores.sum(-1, keepdim=True)
        return LogScores(torch.cat((scores, nothing), dim=-1).clamp(min=tiny).log(), None)

    def forget_unknown_classes(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """Take the classes that no teacher class goes to out of the student's logits.

        Their logit becomes that of a certain absence: no cross-entropy against the teacher's score 0, no share of a
        softmax, no gradient.
        """
        known = self.known_classes(teacher_logits, student_logits)
        if known is None:
            return student_logits
        if self.student == "sigmoid":
            return torch.where(known, student_logits, _UNKNOWN)
        known = torch.cat((known, known.new_ones(1)))
        student_logits = full_precision(student_logits)
        # Far below all others, however low these are: in a softmax the least one may be lower than any constant.
        least = student_logits.detach().where(known, torch.inf).amin(-1, keepdim=True).clamp(max=0)
        return torch.where(known, student_logits, least + _UNKNOWN)
