"""What a gain must survive: terms and teachers that lack what a distillation claims to pass on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from model import Group, TinyDETR, grid_anchors
from runs import DECODER
from shapes import ShapeImages
from torch import Tensor, nn
from train import Teacher

import detr_kd_losses as dkl


class FreshGroupTerm(dkl.Term):
    """An extra group that is matched to the targets afresh: the teacher's queries without what it made of them."""

    parts = ("class", "bbox", "giou")
    needs = ("group",)

    def __init__(self, *, weight: float = 1.0) -> None:
        super().__init__(weight=weight, prefix="loss_fresh_")

    def compute(self, step: dkl.Step) -> dict[str, Tensor]:
        """Supervise the group as the student's own queries are."""
        logits, boxes = step.student.group
        return dkl.detection_loss(logits, boxes, *step.targets, dkl.match_targets(logits, boxes, *step.targets))


class OwnGroupTerm(FreshGroupTerm):
    """An extra group of learnt queries: more supervision, without a teacher."""

    def __init__(self, count: int = 48, channels: int = 64, *, weight: float = 1.0) -> None:
        super().__init__(weight=weight)
        self.queries = nn.Parameter(torch.randn(count, channels) / 2)
        self.anchors = nn.Parameter(grid_anchors(count).logit())


@dataclass
class OwnGroup(Teacher):
    """A teacher that sends a term's queries in place of its own."""

    term: OwnGroupTerm

    def group(self) -> Group:
        """Return the term's queries, which learn."""
        return Group(self.term.queries, self.term.anchors)


@dataclass
class RandomQueries(Teacher):
    """A teacher that is asked new random queries in every step, as in KD-DETR, as many as it has itself."""

    drawn: Group | None = None

    def group(self) -> Group:
        """Return the queries of this step."""
        return self.drawn

    def batch(self, indices: Tensor) -> dkl.DetectorOutput:
        """Return the cached outputs, and what the teacher says to new queries."""
        output, own = super().batch(indices), self.model.queries
        extents = torch.cat([torch.rand(len(own), 2), 0.1 + 0.4 * torch.rand(len(own), 2)], -1)
        self.drawn = Group(torch.randn_like(own) * own.detach().std(), extents.logit(eps=1e-3))
        with torch.no_grad():
            boxes, logits, _ = self.model.decode(output.features, *self.drawn)
        return output._replace(group=dkl.Predictions(logits, boxes))


@dataclass
class BestQueries(Teacher):
    """A teacher that sends of its queries, for each image, only those which it is surest of."""

    share: float = 0.25
    index: Tensor | None = None

    def group(self) -> Group:
        """Return the queries of this step."""
        queries, anchors, _ = self.model.own_group()
        return Group(queries[self.index], anchors[self.index], self.index)

    def batch(self, indices: Tensor) -> dkl.DetectorOutput:
        """Return the cached outputs, and choose the queries."""
        output = super().batch(indices)
        self.index = dkl.best_queries(output.logits[-1], self.share)
        return output


def send_best_queries(teacher: Teacher, terms: Mapping[str, dkl.Term]) -> Teacher:  # noqa: ARG001
    """Let the student's decoder have a quarter of the teacher's queries."""
    return BestQueries(teacher.model, teacher.outputs)


def send_own_group(teacher: Teacher, terms: Mapping[str, dkl.Term]) -> Teacher:
    """Let the student's decoder have a group of the student's own."""
    return OwnGroup(teacher.model, teacher.outputs, terms["own_group"])


def send_random_queries(teacher: Teacher, terms: Mapping[str, dkl.Term]) -> Teacher:  # noqa: ARG001
    """Ask teacher and student random queries."""
    return RandomQueries(teacher.model, teacher.outputs)


def begin_with_queries(student: TinyDETR, teacher: Teacher) -> None:
    """Let the student begin with the teacher's queries, as many as it has itself."""
    number = len(student.queries)
    with torch.no_grad():
        student.queries.copy_(teacher.model.queries[:number])
        student.anchors.copy_(teacher.model.anchors[:number])


def begin_with_decoder(student: TinyDETR, teacher: Teacher) -> None:
    """Let the student begin with the teacher's decoder and heads, and keep its own queries."""
    dkl.inherit_weights(student, teacher.model, DECODER)


def begin_with_transformer(student: TinyDETR, teacher: Teacher) -> None:
    """The same, with the teacher's last encoder layer too."""
    dkl.inherit_weights(student, teacher.model, ["encoder", *DECODER])


def begin_with_decoder_and_queries(student: TinyDETR, teacher: Teacher) -> None:
    """Let the student begin with the decoder and heads of the teacher, and the queries that this is surest of."""
    begin_with_decoder(student, teacher)
    sure = teacher.outputs.logits[-1].sigmoid().amax(-1).mean(0).topk(len(student.queries)).indices
    with torch.no_grad():
        student.queries.copy_(teacher.model.queries[sure])
        student.anchors.copy_(teacher.model.anchors[sure])


def show_other_images(teacher: Teacher, terms: Mapping[str, dkl.Term], fields: tuple[str, ...]) -> Teacher:  # noqa: ARG001
    """Let some of the teacher's outputs be those of other images."""
    images = len(teacher.outputs.features)
    others = {name: getattr(teacher.outputs, name).roll(images // 2, 0 if name == "features" else 1) for name in fields}
    return replace(teacher, outputs=teacher.outputs._replace(**others))


# ------------------------------------------------------------------------------------------------------------ labels


def keep_labels(labelled: ShapeImages, everything: ShapeImages, teacher: Teacher | None) -> ShapeImages:  # noqa: ARG001
    """The images that have labels, with these."""
    return labelled


def add_teacher_boxes(labelled: ShapeImages, everything: ShapeImages, teacher: Teacher) -> ShapeImages:  # noqa: ARG001
    """All images; what the teacher is sure of joins the labels that no box of it overlaps."""
    return ShapeImages(everything.images, dkl.add_pseudo_targets(everything.targets, teacher_boxes(teacher)))


def replace_by_teacher_boxes(labelled: ShapeImages, everything: ShapeImages, teacher: Teacher) -> ShapeImages:  # noqa: ARG001
    """All images; what the teacher is sure of is the only label."""
    return ShapeImages(everything.images, teacher_boxes(teacher))


def teacher_boxes(teacher: Teacher) -> dkl.Targets:
    """What the teacher is sure of, in every image."""
    return dkl.pseudo_targets(teacher.outputs.logits, teacher.outputs.boxes, threshold=0.5, max_targets=8)
