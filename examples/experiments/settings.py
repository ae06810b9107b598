"""The settings that are compared, each a row of terms with their schedules: data, and no branches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

from model import TinyDETR
from train import Teacher

import detr_kd_losses as dkl
from experiments.controls import (
    FreshGroupTerm,
    OwnGroupTerm,
    add_teacher_boxes,
    begin_with_decoder,
    begin_with_decoder_and_queries,
    begin_with_queries,
    begin_with_transformer,
    keep_labels,
    replace_by_teacher_boxes,
    send_best_queries,
    send_own_group,
    send_random_queries,
    show_other_images,
)
from experiments.probes import LastLayerTerm, TrueBoxesTerm, TrueClassesTerm

Schedule = Callable[[float], float]


def constant(progress: float) -> float:  # noqa: ARG001
    """Stay at 1."""
    return 1.0


class Part(NamedTuple):
    """A term, and what its weight is multiplied with while training goes on."""

    make: Callable[[], dkl.Term]
    schedule: Schedule = constant


Parts = dict[str, Part]


class Setting(NamedTuple):
    """What joins the detection loss, who teaches, what is done to the teacher, and who says where the objects are."""

    parts: Parts
    teacher: str = "teacher"
    change: Callable[[Teacher, Mapping[str, dkl.Term]], Teacher] | None = None
    labels: Callable[..., Any] = keep_labels
    begin: Callable[[TinyDETR, Teacher], None] | None = None  # what it does to the student before its training
    shares: Mapping[str, float] = MappingProxyType({})  # of the whole gradient, which the terms' weights follow

    @property
    def needs_teacher(self) -> bool:
        """Whether a teacher has any part in it."""
        return bool(self.parts) or self.labels is not keep_labels or self.begin is not None


def _part(name: str, term: Callable[..., dkl.Term], **options: Any) -> Parts:
    return {name: Part(partial(term, **options))}


# The weights stand here, so that another default of a term does not change what a row is about.
logits = partial(_part, "logits", dkl.LogitsTerm, weight=1.0)
features = partial(_part, "feature", dkl.FeatureTerm, weight=20.0, normalize="max", relative=True)
plain_features = partial(_part, "plain", dkl.PlainFeatureTerm, weight=20.0)
assigned_group = partial(_part, "query_group", dkl.QueryGroupTerm, weight=1.0)
shared_queries = partial(_part, "shared", dkl.SharedQueryTerm, weight=1.0)
distributions = partial(_part, "distributions", dkl.BoxDistributionTerm, weight=1.0)
fresh_group = partial(_part, "fresh_group", FreshGroupTerm, weight=1.0)
own_group = partial(_part, "own_group", OwnGroupTerm, weight=1.0)


def along(schedule: Schedule, parts: Parts) -> Parts:
    """Let the weights of some terms follow a schedule."""
    return {name: part._replace(schedule=schedule) for name, part in parts.items()}


decayed = partial(along, dkl.cosine_decay)
first_half = partial(along, partial(dkl.stop_after, end=0.5))
first_quarter = partial(along, partial(dkl.stop_after, end=0.25))
second_half = partial(along, lambda progress: 1.0 - dkl.stop_after(progress, end=0.5))
decayed_from_half = partial(along, lambda progress: dkl.cosine_decay(max(0.0, 2 * progress - 1)))
positives = partial(logits, negatives="none")
NO_BOXES = {"weight_bbox": 0.0, "weight_giou": 0.0}


def probe(term: Callable[..., dkl.Term], **options: Any) -> Parts:
    """A logits loss with a part exchanged, in place of the logits."""
    return _part("logits", term, negatives="none", **options)


RECOMMENDED = "features x3, decayed"  # the preset, as a row has it
WITH_DECODER = "teacher's decoder at the beginning; features x3, decayed"  # what is advised for a short training
SETTINGS = {
    "alone": Setting({}),
    # One loss.
    "features": Setting(features()),
    "features, decayed": Setting(decayed(features())),
    "features / 2, decayed": Setting(decayed(features(weight=10.0))),
    "features x3, decayed": Setting(decayed(features(weight=60.0))),
    "features x6, decayed": Setting(decayed(features(weight=120.0))),
    "features x12, decayed": Setting(decayed(features(weight=240.0))),
    "features x24, decayed": Setting(decayed(features(weight=480.0))),
    "features x6": Setting(features(weight=120.0)),
    "features x3, decayed from the half on": Setting(decayed_from_half(features(weight=60.0))),
    "logits": Setting(logits()),
    "logits, decayed": Setting(decayed(logits())),
    "logits / 4, decayed": Setting(decayed(logits(weight=0.25))),
    "logits, joint, decayed": Setting(decayed(logits(matching="joint"))),
    "logits, through targets, decayed": Setting(decayed(logits(matching="targets"))),
    "logits of positives, decayed": Setting(decayed(positives())),
    "logits, classes of negatives too, decayed": Setting(decayed(logits(weight_negative_class=1.0))),
    "logits by confidence, decayed": Setting(decayed(logits(weighting="confidence"))),
    "assigned group, decayed": Setting(decayed(assigned_group())),
    "shared queries, decayed": Setting(decayed(shared_queries())),
    "shared queries, uniform, decayed": Setting(decayed(shared_queries(weighting="uniform"))),
    "random queries, decayed": Setting(decayed(shared_queries(weighting="uniform")), change=send_random_queries),
    "plain features, decayed": Setting(decayed(plain_features())),
    "plain features, pearson, decayed": Setting(decayed(plain_features(distance="pearson"))),
    "plain features, cosine, decayed": Setting(decayed(plain_features(distance="cosine"))),
    "plain features, channel, decayed": Setting(decayed(plain_features(distance="channel"))),
    "plain features x3, decayed": Setting(decayed(plain_features(weight=60.0))),
    "plain features, pearson, x3, decayed": Setting(decayed(plain_features(distance="pearson", weight=60.0))),
    "features, not relative, decayed": Setting(decayed(features(relative=False))),
    "features, official, decayed": Setting(decayed(features(variant="official", relative=False))),
    "features, normaliser of the paper, decayed": Setting(decayed(features(normalize=None, relative=False))),
    # Pairs and all.
    "features x3 + plain features x3, decayed": Setting(decayed(features(weight=60.0) | plain_features(weight=60.0))),
    "features x3 + logits, joint, decayed": Setting(decayed(features(weight=60.0) | logits(matching="joint"))),
    "logits + features": Setting(logits() | features()),
    "logits + features, decayed": Setting(decayed(logits() | features())),
    "logits / 4 + features, decayed": Setting(decayed(logits(weight=0.25) | features())),
    "logits through targets / 4 + features, decayed": Setting(
        decayed(logits(matching="targets", weight=0.25) | features())
    ),
    "shared queries + features, decayed": Setting(decayed(shared_queries() | features())),
    "best queries + features, decayed": Setting(decayed(shared_queries() | features()), change=send_best_queries),
    "best queries, assigned + features, decayed": Setting(
        decayed(assigned_group() | features()), change=send_best_queries
    ),
    "shared queries in the first half + features, decayed": Setting(first_half(shared_queries()) | decayed(features())),
    "best queries in the first half + features, decayed": Setting(
        first_half(shared_queries()) | decayed(features()), change=send_best_queries
    ),
    "best queries in the first half + features x3, decayed": Setting(
        first_half(shared_queries()) | decayed(features(weight=60.0)), change=send_best_queries
    ),
    "best queries in the first quarter + features x3, decayed": Setting(
        first_quarter(shared_queries()) | decayed(features(weight=60.0)), change=send_best_queries
    ),
    "best queries x2 in the first half + features x3, decayed": Setting(
        first_half(shared_queries(weight=2.0)) | decayed(features(weight=60.0)), change=send_best_queries
    ),
    "best queries in the first quarter + features x6, decayed": Setting(
        first_quarter(shared_queries()) | decayed(features(weight=120.0)), change=send_best_queries
    ),
    "best queries + features x6, decayed": Setting(
        decayed(shared_queries() | features(weight=120.0)), change=send_best_queries
    ),
    "best queries in the first half + features x6, decayed": Setting(
        first_half(shared_queries()) | decayed(features(weight=120.0)), change=send_best_queries
    ),
    "best queries, assigned, in the first half + features x6, decayed": Setting(
        first_half(assigned_group()) | decayed(features(weight=120.0)), change=send_best_queries
    ),
    "best queries + features x3, decayed": Setting(
        decayed(shared_queries() | features(weight=60.0)), change=send_best_queries
    ),
    "best queries x2 + features, decayed": Setting(
        decayed(shared_queries(weight=2.0) | features()), change=send_best_queries
    ),
    "best queries + logits / 4 + features, decayed": Setting(
        decayed(shared_queries() | logits(weight=0.25) | features()), change=send_best_queries
    ),
    "assigned group + features, decayed": Setting(decayed(assigned_group() | features())),
    "paper": Setting(logits() | features(weight=10.0) | assigned_group()),
    "paper, decayed": Setting(decayed(logits() | features(weight=10.0) | assigned_group())),
    "official": Setting(logits(matching="joint") | features(variant="official", relative=False) | assigned_group()),
    # All three kinds at once, the group as shared queries.
    "all, decayed": Setting(decayed(shared_queries() | features() | logits()), change=send_best_queries),
    "all, queries in the first half": Setting(
        first_half(shared_queries()) | decayed(features() | logits()), change=send_best_queries
    ),
    "all, at held shares": Setting(
        shared_queries() | features() | logits(),
        change=send_best_queries,
        shares={"shared": 0.2, "feature": 0.2, "logits": 0.2},
    ),
    # Of students whose head predicts distributions.
    "box distributions, decayed": Setting(decayed(distributions())),
    "features + box distributions, decayed": Setting(decayed(features() | distributions())),
    # Parts of the logits loss, of constant weight beside decayed features.
    "features, decayed; logits": Setting(decayed(features()) | logits()),
    "features, decayed; logits of positives": Setting(decayed(features()) | positives()),
    "features, decayed; logits, joint": Setting(decayed(features()) | logits(matching="joint")),
    "features, decayed; logits, classes of negatives too": Setting(
        decayed(features()) | logits(weight_negative_class=1.0)
    ),
    "features, decayed; classes": Setting(decayed(features()) | positives(**NO_BOXES)),
    "features, decayed; boxes": Setting(decayed(features()) | positives(weight_class=0.0)),
    "features, decayed; boxes of negatives": Setting(decayed(features()) | logits(weight=1e-6, weight_negative=1e6)),
    "features, decayed; true classes": Setting(decayed(features()) | probe(TrueClassesTerm, **NO_BOXES)),
    "features, decayed; true boxes": Setting(decayed(features()) | probe(TrueBoxesTerm, weight_class=0.0)),
    "features, decayed; classes at temperature 2": Setting(
        decayed(features()) | positives(temperature=2.0, **NO_BOXES)
    ),
    "features, decayed; logits through targets": Setting(decayed(features()) | logits(matching="targets")),
    "features, decayed; logits of the last layer": Setting(decayed(features()) | probe(LastLayerTerm)),
    "features, decayed; logits / 4": Setting(decayed(features()) | logits(weight=0.25)),
    "features, decayed; logits in the first half": Setting(decayed(features()) | first_half(logits())),
    "features, decayed; logits from the half on": Setting(decayed(features()) | second_half(logits())),
    # Controls.
    "own group": Setting(own_group(), change=send_own_group),
    "own group, decayed": Setting(decayed(own_group()), change=send_own_group),
    "teacher's queries at the beginning": Setting({}, begin=begin_with_queries),
    "teacher's decoder at the beginning": Setting({}, begin=begin_with_decoder),
    "teacher's decoder at the beginning; features, decayed": Setting(decayed(features()), begin=begin_with_decoder),
    "teacher's decoder at the beginning; features x3, decayed": Setting(
        decayed(features(weight=60.0)), begin=begin_with_decoder
    ),
    "teacher's decoder at the beginning; features x6, decayed": Setting(
        decayed(features(weight=120.0)), begin=begin_with_decoder
    ),
    "teacher's decoder at the beginning; features x3, decayed from the half on": Setting(
        decayed_from_half(features(weight=60.0)), begin=begin_with_decoder
    ),
    "teacher's decoder at the beginning; features x3 + plain features, pearson, decayed": Setting(
        decayed(features(weight=60.0) | plain_features(distance="pearson")), begin=begin_with_decoder
    ),
    "teacher's decoder at the beginning; features x3 + logits, joint, decayed": Setting(
        decayed(features(weight=60.0) | logits(matching="joint")), begin=begin_with_decoder
    ),
    "teacher's decoder and encoder at the beginning; features x3, decayed": Setting(
        decayed(features(weight=60.0)), begin=begin_with_transformer
    ),
    "teacher's decoder and best queries at the beginning": Setting({}, begin=begin_with_decoder_and_queries),
    "teacher's decoder and best queries at the beginning; features x3, decayed": Setting(
        decayed(features(weight=60.0)), begin=begin_with_decoder_and_queries
    ),
    "teacher's queries, matched afresh": Setting(fresh_group()),
    "assigned group": Setting(assigned_group()),
    "teacher's boxes too": Setting({}, labels=add_teacher_boxes),
    "teacher's boxes too; features, decayed": Setting(decayed(features()), labels=add_teacher_boxes),
    "teacher's boxes too; logits + features, decayed": Setting(
        decayed(logits() | features()), labels=add_teacher_boxes
    ),
    "teacher's boxes as labels": Setting({}, labels=replace_by_teacher_boxes),
    "features of other images, decayed": Setting(
        decayed(features()), change=partial(show_other_images, fields=("features",))
    ),
    "logits of other images, decayed": Setting(
        decayed(logits()), change=partial(show_other_images, fields=("logits", "boxes"))
    ),
    "a barely better teacher: features, decayed": Setting(decayed(features()), teacher="barely better"),
    "a barely better teacher: logits + features, decayed": Setting(
        decayed(logits() | features()), teacher="barely better"
    ),
    "a student as teacher: features, decayed": Setting(decayed(features()), teacher="a student"),
    "a student as teacher: logits + features, decayed": Setting(decayed(logits() | features()), teacher="a student"),
}
