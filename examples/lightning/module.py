"""Distil a detector of transformers in a LightningModule.

Run from the folder `examples`:

    PYTHONPATH=. python lightning/module.py
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import detr_kd_losses as dkl
from detr_kd_losses.taps import QueryProjection, Tap, distillation_loss
from detr_kd_losses.training.schedules import linear_warmup
from detr_kd_losses.training.teacher import FrozenTeacher
from hf_transformers.coco_shapes import CocoDetection, collate, make_shapes
from hf_transformers.train import rt_detr


class DistillationModule(pl.LightningModule):
    """A student that learns from its targets and from a teacher.

    The projections are submodules: Lightning optimises, synchronises and saves them with the student. The teacher is
    held by a `FrozenTeacher` and is none of that.
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module, *, warmup: float = 0.05, learning_rate: float = 5e-4
    ) -> None:
        super().__init__()
        self.student = student.train()  # from_pretrained leaves it in evaluation mode, and so does Lightning
        self.teacher = FrozenTeacher(teacher)
        self.distillation = distillation_loss(student, teacher)
        self.query_projection = QueryProjection(student, teacher)
        self.warmup, self.learning_rate = warmup, learning_rate

    def on_train_start(self) -> None:
        """Let the student train, wherever an evaluation between two runs has left it."""
        self.student.train()

    def training_step(self, batch: dict[str, Any], _: int) -> Tensor:
        """Return the student's loss plus the distillation terms."""
        with Tap(self.teacher.module) as teacher_tap:
            self.teacher(pixel_values=batch["pixel_values"])
        with Tap(self.student) as student_tap:
            loss = self.student(**batch).loss
        student_output = student_tap.output(group=self.query_projection(teacher_tap.query_group()))
        terms = self.distillation(student_output, teacher_tap.output(), dkl.pad_targets(batch["labels"]))
        factor = linear_warmup(min(self.global_step / self.trainer.estimated_stepping_batches, 1.0), end=self.warmup)
        self.log_dict({"loss_task": loss.detach(), **{name: term.detach() for name, term in terms.items()}})
        return loss + factor * torch.stack(list(terms.values())).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Learn the student and the projections."""
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)


def main() -> None:
    """Distil a teacher with random weights, to see the module run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("lightning_output"))
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    make_shapes(arguments.output / "shapes", count=64)
    data = DataLoader(CocoDetection(arguments.output / "shapes"), batch_size=4, shuffle=True, collate_fn=collate)
    student, teacher = (
        rt_detr(width=32, decoder_layers=2, num_queries=20),
        rt_detr(width=64, decoder_layers=4, num_queries=40),
    )
    trainer = pl.Trainer(
        default_root_dir=arguments.output, max_steps=arguments.steps, gradient_clip_val=0.1, log_every_n_steps=5
    )
    trainer.fit(DistillationModule(student, teacher), data)
    student.save_pretrained(arguments.output / "student")
    print({name: round(value.item(), 3) for name, value in trainer.callback_metrics.items()})


if __name__ == "__main__":
    main()
