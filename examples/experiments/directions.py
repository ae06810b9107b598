"""Where the parts of the distillation pull a student that is trained alone: `python -m experiments.directions`.

From the folder `examples`. At three moments of a training without teacher, the gradient of each part is compared with
that of the detection loss, of its classes and of its boxes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from model import TinyDETR
from runs import STUDENT
from shapes import ShapeImages
from torch import Tensor
from train import Teacher, train

import detr_kd_losses as dkl
from experiments.probes import TrueBoxesTerm, TrueClassesTerm
from experiments.rows import RESULTS
from experiments.run import CACHE
from experiments.settings import NO_BOXES, Parts, features, logits, positives, probe
from experiments.training import detector, gradient, ready_teacher, rounded
from experiments.worlds import training_images

WORLD, MOMENTS, BATCHES, BATCH = "demo", (0, 150, 600), 8, 32
NO_CLASSES = {"weight_class": 0.0}
ASKED: dict[str, Parts] = {
    "classes": positives(**NO_BOXES),
    "classes, through targets": logits(matching="targets", **NO_BOXES),
    "true classes": probe(TrueClassesTerm, **NO_BOXES),
    "boxes": positives(**NO_CLASSES),
    "boxes, through targets": logits(matching="targets", **NO_CLASSES),
    "true boxes": probe(TrueBoxesTerm, **NO_CLASSES),
    "boxes of negatives": logits(weight=1e-6, weight_negative=1e6),
    "features": features(),
}


def main() -> None:
    """Train to each moment, measure, and write what came out."""
    torch.set_num_threads(1)
    images, teacher = training_images(WORLD), ready_teacher(WORLD, "teacher", CACHE)
    result = {}
    for steps in MOMENTS:
        torch.manual_seed(0)
        student = detector(WORLD, STUDENT)
        if steps:
            train(student, images, images.select(torch.arange(10)), steps=steps, seed=0, evaluations=1)
        result[str(steps)] = directions(student, teacher, images)
    write(result, RESULTS)


def directions(student: TinyDETR, teacher: Teacher, images: ShapeImages) -> dict[str, list[float]]:
    """Return of each part the length of its gradient beside that of the detection loss, and three cosines.

    The cosines are to the detection loss, to its classes and to its boxes; all are means over some batches.
    """
    criteria = {
        name: dkl.DETRDistillationLoss({key: part.make() for key, part in parts.items()})
        for name, parts in ASKED.items()
    }
    measured: dict[str, list[Tensor]] = {}
    before = detection_gradients(student, images.select(torch.arange(BATCH) + len(images) - BATCH))[0]
    for indices in torch.arange(BATCHES * BATCH).split(BATCH):
        batch = images.select(indices)
        output = student(batch.normalised())
        own = detection_gradients(student, batch)
        pulls = {
            "detection loss, classes": own[1],
            "detection loss, boxes": own[2],
            "detection loss, other images": before,
        }
        for name, criterion in criteria.items():
            loss = sum(criterion(output, teacher.batch(indices), batch.targets).values())
            pulls[name] = gradient(loss, student)
        for name, pulled in pulls.items():
            cosines = [torch.cosine_similarity(pulled, other, dim=0) for other in own]
            measured.setdefault(name, []).append(torch.stack([pulled.norm() / own[0].norm(), *cosines]))
        before = own[0]
    return {name: [rounded(x) for x in torch.stack(each).mean(0).tolist()] for name, each in measured.items()}


def detection_gradients(student: TinyDETR, batch: ShapeImages) -> list[Tensor]:
    """Return the gradients of the detection loss, of its classes and of its boxes."""
    classes, boxes = detection_parts(student(batch.normalised()), batch.targets)
    return [gradient(loss, student) for loss in (classes + boxes, classes, boxes)]


def detection_parts(output: dkl.DetectorOutput, targets: dkl.Targets) -> tuple[Tensor, Tensor]:
    """Return the detection loss of classes and that of boxes."""
    assignment = dkl.match_targets(output.logits, output.boxes, *targets)
    losses: dict[str, Any] = dkl.detection_loss(output.logits, output.boxes, *targets, assignment)
    return losses.pop("loss_class"), sum(losses.values())


def write(result: dict[str, dict[str, list[float]]], results: Path) -> None:
    """Write what came out beside the rows."""
    (results / "directions.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
