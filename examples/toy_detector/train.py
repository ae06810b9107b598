"""Train one detector, alone or under a teacher."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from average_precision import average_precision
from model import Group, TinyDETR
from shapes import ShapeImages
from torch import Tensor

import detr_kd_losses as dkl


@dataclass
class History:
    """What a training leaves behind: AP and AP50 of the validation images after some of its steps, and its cost."""

    steps: list[int] = field(default_factory=list)
    ap: list[float] = field(default_factory=list)
    ap50: list[float] = field(default_factory=list)
    seconds: float = 0.0  # of processor time, without those of the evaluation


Histories = dict[str, dict[int, History]]  # by setting, then by seed


@dataclass
class Teacher:
    """A trained detector, and what it says about every training image."""

    model: TinyDETR
    outputs: dkl.DetectorOutput

    @classmethod
    def from_model(cls, model: TinyDETR, data: ShapeImages) -> Teacher:
        """Run the teacher over the training images: once, as the images are never augmented."""
        return cls(model, predict(model, data))

    def group(self) -> Group:
        """Return the queries that the teacher sends along with the student's own."""
        return self.model.own_group()

    def batch(self, indices: Tensor) -> dkl.DetectorOutput:
        """Return the cached outputs of some images."""
        outputs = self.outputs
        return dkl.DetectorOutput(
            logits=outputs.logits[:, indices],
            boxes=outputs.boxes[:, indices],
            queries=outputs.queries[:, indices],
            features=outputs.features[indices],
        )


class Losses(NamedTuple):
    """The losses of a step: a scalar, and scalars by name."""

    detection: Tensor
    distillation: dict[str, Tensor]


def train(
    model: TinyDETR,
    data: ShapeImages,
    validation: ShapeImages,
    *,
    steps: int,
    seed: int,
    teacher: Teacher | None = None,
    distillation: dkl.DETRDistillationLoss | None = None,
    batch_size: int = 32,
    learning_rate: float = 2e-3,
    evaluations: int = 5,
    on_step: Callable[[], None] = lambda: None,
    schedule: dkl.WeightSchedule | None = None,
    watch: Callable[[int, Losses], None] | None = None,
) -> History:
    """Train `model` in place: detection loss, plus the distillation terms where there is a teacher.

    `schedule` moves the weights of the terms, `watch` is called with the step and its losses, before they are
    differentiated; its time does not count.
    """
    modules = [model] if distillation is None else [model, distillation]  # the latter may own a projection
    parameters = [parameter for module in modules for parameter in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=1e-4, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, steps))
    evaluate_at = {round(steps * (k + 1) / evaluations) for k in range(evaluations)}
    history = History()
    for step, indices in zip(range(1, steps + 1), endless_batches(len(data), batch_size, seed), strict=False):
        start = time.process_time()
        if schedule is not None:
            schedule.update((step - 1) / steps)
        losses = step_losses(model, data.select(indices), indices, teacher, distillation)
        if watch is not None:
            paused = time.process_time()
            watch(step, losses)
            start += time.process_time() - paused
        optimizer.zero_grad()
        (losses.detection + sum(losses.distillation.values())).backward()
        torch.nn.utils.clip_grad_norm_(parameters, max_norm=5.0)
        optimizer.step()
        scheduler.step()
        history.seconds += time.process_time() - start
        if step in evaluate_at:
            ap, ap50 = evaluate(model, validation)
            history.steps.append(step)
            history.ap.append(ap)
            history.ap50.append(ap50)
        on_step()
    return history


def step_losses(
    model: TinyDETR,
    batch: ShapeImages,
    indices: Tensor,
    teacher: Teacher | None,
    distillation: dkl.DETRDistillationLoss | None,
) -> Losses:
    """Return the losses of one batch, whose images have the given indices in the training data."""
    if teacher is None or distillation is None:
        return Losses(detection_loss(model(batch.normalised()), batch.targets), {})
    teacher_output = teacher.batch(indices)
    student_output = model(batch.normalised(), teacher.group() if "group" in distillation.needs else None)
    return Losses(
        detection_loss(student_output, batch.targets), distillation(student_output, teacher_output, batch.targets)
    )


def detection_loss(output: dkl.DetectorOutput, targets: dkl.Targets) -> Tensor:
    """Return the usual loss of Deformable DETR: a fresh matching, then focal, L1 and GIoU terms, for every layer."""
    assignment = dkl.match_targets(output.logits, output.boxes, *targets)
    return sum(dkl.detection_loss(output.logits, output.boxes, *targets, assignment).values())


def learning_rate_factor(step: int, steps: int) -> float:
    """Rise over the first 5 %, stay until one half, then fall to zero along a cosine."""
    progress = (step + 1) / steps
    return min(progress / 0.05, 1.0, (1 + math.cos(math.pi * max(0.0, 2 * progress - 1))) / 2)


def endless_batches(count: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Yield the indices of one batch after another, every image once an epoch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).split(batch_size)


def predict(model: TinyDETR, data: ShapeImages) -> dkl.DetectorOutput:
    """Run a detector over a whole data set, without gradients and in evaluation mode."""
    was_training = model.training
    model.eval()
    with torch.no_grad():
        outputs = [model(data.select(indices).normalised()) for indices in torch.arange(len(data)).split(100)]
    model.train(was_training)
    return dkl.DetectorOutput(
        logits=torch.cat([output.logits for output in outputs], 1),
        boxes=torch.cat([output.boxes for output in outputs], 1),
        queries=torch.cat([output.queries for output in outputs], 1),
        features=torch.cat([output.features for output in outputs]),
    )


def evaluate(model: TinyDETR, validation: ShapeImages) -> tuple[float, float]:
    """Return AP and AP50 of the last decoder layer on the validation images."""
    output = predict(model, validation)
    return average_precision(output.logits[-1], output.boxes[-1], validation.targets)
