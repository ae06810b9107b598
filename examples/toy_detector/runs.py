"""The trainings that the demo compares, each a function that a worker process can run."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from model import TinyDETR
from shapes import CLASSES, ShapeImages, make_shapes
from train import History, Teacher, train

import detr_kd_losses as dkl

TEACHER: dict[str, Any] = {"num_queries": 48, "backbone_width": 16, "residual_blocks": 1, "encoder_layers": 2}
STUDENT: dict[str, Any] = {"num_queries": 16, "backbone_width": 8, "residual_blocks": 0, "encoder_layers": 1}

ALONE, RECOMMENDED = "student alone", "recommended"
SETTINGS: dict[str, set[str]] = {  # which losses join the detection loss
    ALONE: set(),
    "+ logits": {"logits"},
    "+ features": {"feature"},
    "+ query group": {"query_group"},
    "+ all three": {"logits", "feature", "query_group"},
    RECOMMENDED: {"feature"},
}
DECODER = ("decoder", "class_heads", "box_heads", "box_embedding")  # what a student may inherit


class Scale(NamedTuple):
    """How much is trained."""

    images: int
    teacher_steps: int
    student_steps: int


def train_teacher(directory: Path, scale: Scale, on_step: Callable[[], None]) -> History:
    """Train the teacher and save its weights."""
    torch.manual_seed(0)
    model = TinyDETR(num_classes=len(CLASSES), **TEACHER)
    history = train(
        model, training_images(scale), validation_images(), steps=scale.teacher_steps, seed=0, on_step=on_step
    )
    torch.save(model.state_dict(), weights_file(directory, "teacher"))
    return history


def train_student(setting: str, seed: int, directory: Path, scale: Scale, on_step: Callable[[], None]) -> History:
    """Train one student, the same for each setting but for its losses, and save its weights."""
    torch.manual_seed(seed)
    model = TinyDETR(num_classes=len(CLASSES), **STUDENT)
    history = train(
        model,
        training_images(scale),
        validation_images(),
        steps=scale.student_steps,
        seed=seed,
        **prepare(setting, model, None if setting == ALONE else ready_teacher(directory, scale)),
        on_step=on_step,
    )
    torch.save(model.state_dict(), weights_file(directory, setting, seed))
    return history


def prepare(setting: str, student: TinyDETR, teacher: Teacher | None) -> dict[str, Any]:
    """Let a student begin as the setting wants it, and return the options of its training.

    The recommended student begins with the teacher's decoder, and what it learns from features fades along a cosine.
    The others begin at random, with the losses of the paper, or a part of them, at constant weights.
    """
    if teacher is None:
        return {}
    if setting == RECOMMENDED:
        dkl.inherit_weights(student, teacher.model, DECODER)
        criterion = dkl.DETRDistillationLoss("recommended")
        return {"teacher": teacher, "distillation": criterion, "schedule": dkl.WeightSchedule(criterion)}
    criterion = dkl.DETRDistillationLoss("paper")
    for name in set(criterion.terms) - SETTINGS[setting]:
        del criterion.terms[name]
    return {"teacher": teacher, "distillation": criterion}


def training_images(scale: Scale) -> ShapeImages:
    """Return the images that everyone learns from."""
    return make_shapes(scale.images, seed=0)


def validation_images() -> ShapeImages:
    """Return the images that everyone is judged by."""
    return make_shapes(500, seed=1)


@cache
def ready_teacher(directory: Path, scale: Scale) -> Teacher:
    """Load the teacher and its outputs, once in a worker process."""
    return Teacher.from_model(load_detector(TEACHER, weights_file(directory, "teacher")), training_images(scale))


def load_detector(kind: dict[str, Any], weights: Path) -> TinyDETR:
    """Return a detector with saved weights, in evaluation mode."""
    model = TinyDETR(num_classes=len(CLASSES), **kind)
    model.load_state_dict(torch.load(weights))
    return model.eval()


def weights_file(directory: Path, setting: str, seed: int = 0) -> Path:
    """Return where the weights of a run are."""
    return directory / f"{setting} {seed}.pt"
