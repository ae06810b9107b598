"""What a teacher tells a student in each of its forward passes, whoever asks for the losses."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from detr_kd_losses._options import TypedCall
from detr_kd_losses._validation import validate_in_unit_interval, validate_positive, validate_record
from detr_kd_losses.criterion import DETRDistillationLoss
from detr_kd_losses.outputs import DetectorOutput, Targets
from detr_kd_losses.taps.agreement import validate_apart, validate_classes, validate_heads, validate_levels
from detr_kd_losses.taps.attachment import attach, images_and_masks
from detr_kd_losses.taps.find import unwrap
from detr_kd_losses.taps.loss import distillation_loss
from detr_kd_losses.taps.projections import learn_projections
from detr_kd_losses.taps.queries import QueryProjection
from detr_kd_losses.taps.setup import CORNERS, are_corners, check_setup
from detr_kd_losses.taps.tap import Tap, set_attribute
from detr_kd_losses.training.teacher import FrozenTeacher
from detr_kd_losses.training.value_checks import check_targets

__all__ = ["AttachedTeacher"]

Levels = tuple[Sequence[int], Sequence[int]]
TeacherCall = Callable[..., Any]


class AttachedTeacher(TypedCall, nn.Module):
    """A teacher that runs before each forward pass of a student in training, and what both say of the batch.

    For those who ask for the losses: a trainer's criterion, or the model itself. The class of the model, its
    parameters, its checkpoints and its evaluation do not change: copies and pickles of the student know of nothing.

    Args:
        student: The student. One in DistributedDataParallel is unwrapped.
        teacher: The teacher. It is frozen, and no part of the student.
        distillation: The losses. None: :func:`distillation_loss` of both models.
        levels: Feature levels of student and of teacher that correspond, where they have different ones.
        group_share: How many of the teacher's queries run through the student's decoder, the surest first.
        teacher_call: Called with the teacher and the arguments of the student's forward pass, where it needs others
            than the images and their masks.

    Raises:
        ValueError: If student and teacher share parameters, a decoder is not found, or classes, heads or levels of both
            do not fit each other.
        TypeError: If an argument is not the Module that it should be.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        distillation: DETRDistillationLoss | None = None,
        levels: Levels | None = None,
        group_share: float = 1.0,
        teacher_call: TeacherCall | None = None,
    ) -> None:
        super().__init__()
        for name, model in (("student", student), ("teacher", teacher)):
            validate_record(name, model, nn.Module, "the model itself")
        student, teacher = unwrap(student), unwrap(teacher)
        validate_apart(student, teacher)
        validate_levels(levels)
        for rule in (validate_positive, validate_in_unit_interval):
            rule("group_share", group_share)
        number = None if levels is None else len(levels[0])
        if distillation is None:
            distillation = distillation_loss(student, teacher, levels=number)
        validate_record("distillation", distillation, DETRDistillationLoss, "DETRDistillationLoss(terms)")
        validate_heads(distillation, student, teacher)
        if distillation.class_map is None:
            validate_classes(student, teacher)
        self.distillation = distillation
        self.query_projection = QueryProjection(student, teacher)
        self.to(next(student.parameters()).device)
        self.levels: tuple[Sequence[int] | None, Sequence[int] | None] = levels or (None, None)
        self.group_share, self.teacher_call = group_share, teacher_call
        self.teacher = FrozenTeacher(teacher)
        self._student: tuple[nn.Module, ...] = (student,)  # in a tuple, so that it is no part of this
        self._reading: tuple[Tap, DetectorOutput, Any] | None = None  # of the forward pass that is under way
        self._said: tuple[DetectorOutput, DetectorOutput] | None = None
        self._targets_were_seen = False
        self._detach = attach(student, self._before, self._after)

    def detach(self) -> None:
        """Take the teacher off the student: from now on it trains without."""
        self._detach()
        self._forget()
        self._student = ()

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles are attached to no student, and hold nothing of a batch."""
        return {**vars(self), "_student": (), "_detach": _nothing, "_said": None, "_reading": None}

    def _forget(self) -> None:
        """Drop what is left of a pass that was interrupted, or whose loss nobody has asked for."""
        if self._reading is not None:
            tap, _, _ = self._reading
            decoder = tap.found.decoder(tap.model)
            with set_attribute("training", decoder.training, [decoder]):  # it may have been set since
                tap.__exit__()
        self._reading = self._said = None

    def _before(self, student: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Run the teacher, and begin to read the student."""
        self._forget()
        if not student.training:
            return
        with torch.no_grad(), Tap(self.teacher.module) as tap:
            if self.teacher_call is not None:
                self.teacher_call(self.teacher, *args, **kwargs)
            else:
                images, masks = images_and_masks(student, args, kwargs)
                self.teacher(images, **masks)
        group = None
        if "group" in self.distillation.needs:
            group = tap.query_group(share=self.group_share)
        self._reading = Tap(student).__enter__(), tap.output(levels=self.levels[1]), group

    def _after(self, *call: Any) -> Any:
        """Read the student, and keep what both say for whoever asks for the losses; its answer stays what it is."""
        outputs = call[-1]
        if self._reading is None:
            return
        (tap, teacher_output, group), self._reading = self._reading, None
        tap.__exit__()
        if outputs is None:  # the forward pass has raised
            return
        if group is not None:
            # Projected after the student's own pass, so that the backward pass comes here before any part of the
            # student: processes whose terms differ would otherwise average projections and student in another order.
            group = self.query_projection(group)
        self._said = tap.output(group, levels=self.levels[0]), teacher_output

    def _terms(self, said: tuple[DetectorOutput, DetectorOutput], targets: Targets) -> dict[str, Tensor]:
        """The terms of what both have said; the first targets are looked at."""
        student_output, teacher_output = said
        padded = targets.to(student_output.logits.device)
        if not self._targets_were_seen and padded.labels.numel():
            _warn_of_targets(padded, student_output.logits.shape[-1])
            self._targets_were_seen = True
        terms: dict[str, Tensor] = self.distillation(student_output, teacher_output, padded)
        return terms

    def learn(self, optimizer: torch.optim.Optimizer, *, max_norm: float | None = 0.1) -> None:
        """Let the optimizer of the student learn the projections of features and queries, if there are any.

        Args:
            optimizer: The optimizer, before its scheduler is made.
            max_norm: To which the gradients of the projections are clipped (:func:`learn_projections`).
        """
        learn_projections(optimizer, self.distillation, self.query_projection, max_norm=max_norm)

    def _check(self, call: Callable[[nn.Module], Any], targets: Targets | None) -> bool:
        if not self._student:
            msg = f"a {type(self).__name__} that was copied or detached has no student to check: make a new one"
            raise RuntimeError(msg)
        return check_setup(
            self._student[0],
            self.teacher.module,
            call,
            targets,
            distillation=self.distillation,
            query_projection=self.query_projection,
            levels=self.levels,
        )


def _nothing() -> None:
    """What a copy has to detach."""


def _warn_of_targets(targets: Targets, num_classes: int) -> None:
    try:
        check_targets(*targets, num_classes=num_classes)
        if are_corners(targets):
            raise ValueError(CORNERS)
    except ValueError as error:
        warnings.warn(f"the targets of the first batch that has any: {error}", stacklevel=4)
