"""The logits loss with a part of it exchanged: to find out which of its targets does what."""

from __future__ import annotations

import torch
from torch import Tensor

import detr_kd_losses as dkl

SURE = 6.0  # the logit of a score of 0.998


class ChangedLogitsTerm(dkl.LogitsTerm):
    """A logits loss to which student or teacher are shown otherwise than they are."""

    def shown(self, step: dkl.Step) -> tuple[dkl.DetectorOutput, dkl.DetectorOutput]:
        """Return the outputs of student and teacher that the loss is to see."""
        raise NotImplementedError

    def compute(self, step: dkl.Step) -> dict[str, Tensor]:
        """Match and distil what is shown."""
        return super().compute(dkl.Step(*self.shown(step), step.targets, heads=step.heads))


class TrueBoxesTerm(ChangedLogitsTerm):
    """Teacher queries that found an object have its box, so that the box targets are never wrong."""

    def shown(self, step: dkl.Step) -> tuple[dkl.DetectorOutput, dkl.DetectorOutput]:
        """Return the teacher with the boxes of its targets."""
        assignment = step.teacher_assignment
        boxes = of_targets(step.targets.boxes, assignment)
        return step.student, step.teacher._replace(boxes=boxes.where(assignment[..., None] >= 0, step.teacher.boxes))


class TrueClassesTerm(ChangedLogitsTerm):
    """Teacher queries that found an object are sure of its class and of no other."""

    def shown(self, step: dkl.Step) -> tuple[dkl.DetectorOutput, dkl.DetectorOutput]:
        """Return the teacher with the classes of its targets."""
        assignment, logits = step.teacher_assignment, step.teacher.logits
        labels = of_targets(step.targets.labels[..., None], assignment)
        sure = torch.full_like(logits, -SURE).scatter(-1, labels, SURE)
        return step.student, step.teacher._replace(logits=sure.where(assignment[..., None] >= 0, logits))


class LastLayerTerm(ChangedLogitsTerm):
    """The student's last layer alone learns, from the teacher's last."""

    def shown(self, step: dkl.Step) -> tuple[dkl.DetectorOutput, dkl.DetectorOutput]:
        """Return the last layer of both."""
        return last_layer(step.student), last_layer(step.teacher)


def of_targets(values: Tensor, assignment: Tensor) -> Tensor:
    """Return values (B, T, K) of the target of each query, (L, B, M, K); any where it has none."""
    index = assignment.clamp(min=0)[..., None].expand(-1, -1, -1, values.shape[-1])
    return values.expand(len(assignment), -1, -1, -1).gather(2, index)


def last_layer(output: dkl.DetectorOutput) -> dkl.DetectorOutput:
    """Return what the last decoder layer says."""
    queries = None if output.queries is None else output.queries[-1:]
    return output._replace(logits=output.logits[-1:], boxes=output.boxes[-1:], queries=queries)
