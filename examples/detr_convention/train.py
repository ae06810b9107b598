"""Distil a stand-in with 900 queries into one with 300, in an engine that knows nothing of it.

Run from the folder `examples`:

    python -m detr_convention.train
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from torch import Tensor

import detr_kd_losses as dkl
from detr_convention.adapter import DetrReader, DistillationCriterion, attach_teacher, learn_projections
from detr_convention.standin import SetCriterion, StandIn, train_one_epoch

NUM_CLASSES = 3


def batches(count: int, *, seed: int, batch_size: int = 4) -> Iterator[tuple[Tensor, list[dict[str, Tensor]]]]:
    """Draw images of one to three squares; a square's class is its colour."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        images = 0.1 * torch.randn(batch_size, 3, 64, 64, generator=generator)
        targets = []
        for image in images:
            number = int(torch.randint(1, 4, (), generator=generator))
            labels = torch.randint(NUM_CLASSES, (number,), generator=generator)
            sides = torch.randint(10, 25, (number,), generator=generator)
            corners = (torch.rand(number, 2, generator=generator) * (64 - sides[:, None])).long()
            for label, side, (x, y) in zip(labels, sides, corners, strict=True):
                image[:, y : y + side, x : x + side] = 0
                image[label, y : y + side, x : x + side] = 1
            boxes = torch.cat([corners + sides[:, None] / 2, sides[:, None].expand(-1, 2)], 1) / 64
            targets.append({"labels": labels, "boxes": boxes})
        yield images, targets


def main() -> None:
    """Train a teacher, then a student under it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--teacher-queries", type=int, default=900)
    parser.add_argument("--student-queries", type=int, default=300)
    arguments = parser.parse_args()
    torch.manual_seed(0)

    teacher = StandIn(num_classes=NUM_CLASSES, num_queries=arguments.teacher_queries, layers=4)
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=1e-3)
    train_one_epoch(teacher, SetCriterion(layers=4), batches(arguments.steps, seed=0), optimizer)

    student = StandIn(num_classes=NUM_CLASSES, num_queries=arguments.student_queries, layers=3)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    attach_teacher(student, teacher, reader=DetrReader)
    criterion = DistillationCriterion(SetCriterion(layers=3), dkl.DETRDistillationLoss())
    learn_projections(optimizer, criterion.distillation)
    history = train_one_epoch(student, criterion, batches(arguments.steps, seed=1), optimizer)

    tenth = max(len(history) // 10, 1)
    for name in history[0]:
        first, last = (sum(step[name] for step in part) / tenth for part in (history[:tenth], history[-tenth:]))
        print(f"{name:20} {first:8.3f} -> {last:8.3f}")


if __name__ == "__main__":
    main()
