"""A world of a few images, with teachers of one step: what the experiments need to run in a test."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments import rows, training, worlds

SMALL = {"num_queries": 6, "backbone_width": 4, "residual_blocks": 0, "encoder_layers": 1, "decoder_layers": 2}
RUN = rows.Run("demo", "alone", 3, 0)


def make_small_world(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Put 20 images in the place of the world of the demo, train its teachers, and keep them in a folder."""
    kinds = {"teacher": SMALL | {"num_queries": 10}, "barely better": SMALL, "a student": SMALL}
    teachers = {name: worlds.Recipe(kind, steps=1) for name, kind in kinds.items()}
    patch.setitem(worlds.WORLDS, "demo", worlds.World(20, teachers, student=SMALL))
    for name, value in {"VALIDATION": (10, 1), "TEST": (10, 2), "STUDENT": SMALL}.items():
        patch.setattr(training, name, value)
    forget()
    for teacher in teachers:
        training.train_teacher(training.TeacherOf("demo", teacher), folder, on_step=lambda: None)


def forget() -> None:
    """Forget images and teachers of another world."""
    worlds.all_images.cache_clear()
    training.ready_teacher.cache_clear()
