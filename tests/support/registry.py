"""Every public loss with all that it owes: what the tests try, compare and hold to laws is read from here.

A new loss is one entry in `LOSSES`. Its oracle is found by its name in `support.oracles`; its mutants are in
`support.mutants`; its row is in the README. `tests/project/test_completeness.py` says what is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn

import detr_kd_losses as dkl
from detr_kd_losses import testing
from detr_kd_losses.testing.pair_makers import BINS, SCALE

from support import cases, oracles


class Trial(NamedTuple):
    """A case and the options to try on it."""

    case: cases.Case
    options: dict[str, Any]


class HeldTo(NamedTuple):
    """The loss with these options obeys all laws but those that the options give up by their meaning.

    `adapted` is the loss itself, or the loss with what the options need done to its arguments first.
    """

    adapted: Callable
    options: dict[str, Any]
    given_up: Sequence[str] = ()


@dataclass(frozen=True)
class Loss:
    """A public loss function with what the tests need of it.

    `wrt` are the arguments that get a gradient, `oracle_names` the arguments that its oracle calls by another name.
    `term` is the term that has it in the criterion, or says why there is none; `other_options` have for each option of
    the term another value than its default and, in a tuple, what else must be set for it to matter.
    """

    function: Callable
    module: type[nn.Module] | None = None
    term: type[dkl.Term] | str | None = None
    other_options: Mapping[str, Any] = field(default_factory=dict)
    wrt: tuple[str, ...] = ()
    trials: Mapping[str, Trial] = field(default_factory=dict)
    laws: Mapping[str, testing.Law] = field(default_factory=dict)
    held_to: Sequence[HeldTo] = ()
    oracle_names: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.function.__name__

    def oracle(self, **arguments: Any) -> Any:
        """The oracle of the same name, called by the arguments of the loss."""
        renamed = {self.oracle_names.get(name, name): value for name, value in arguments.items()}
        return getattr(oracles, self.name)(**renamed)


OF_EVERY_TERM = {"weight": 0.5, "prefix": "loss_other_"}
# Their default matching is by targets, which has no cost but that of negatives by box.
_BY_COST = {"matching": "positives_first", "negatives": "by_box", "weighting": "uniform"}
OF_EVERY_PAIRED_TERM = {
    "matching": "joint",
    "negatives": "by_box",
    "weighting": "confidence",
    "cost_class": (30.0, _BY_COST),
    "cost_bbox": (0.0, _BY_COST),
    "cost_giou": (30.0, _BY_COST),
    "backend": ("counting", _BY_COST),
    "stage_map": "last",
}
SOFTMAX = {"student_activation": "softmax", "teacher_activation": "softmax"}
# What a cross-entropy gives up, which has the teacher's entropy as its least value, and so does a student whose head
# cannot say what the teacher's does.
NOT_ZERO = ("zero_at_teacher", "zero_at_empty_boxes")


def distillation_trial(**options: Any) -> Trial:
    heads = {name: value for name, value in options.items() if name.endswith("activation") or name == "class_map"}
    case = cases.distillation(students=4, teachers=4, **heads)
    return Trial(case, {"weight_negative_class": 0.5, **options})


WEIGHTED = distillation_trial(weight_negative=0.7)


def between_other_heads(**options: Any) -> HeldTo:
    """The distillation loss between heads of which the sigmoid one has a channel less."""

    def loss(student_logits, student_boxes, teacher_logits, *others, **more):
        if more["student_activation"] == "softmax":
            teacher_logits = teacher_logits[..., :-1]
        else:
            student_logits = student_logits[..., :-1]
        return dkl.hungarian_distillation_loss(student_logits, student_boxes, teacher_logits, *others, **more)

    loss.__name__ = dkl.hungarian_distillation_loss.__name__
    return HeldTo(loss, options, NOT_ZERO)


HUNGARIAN_DISTILLATION = Loss(
    dkl.hungarian_distillation_loss,
    dkl.HungarianDistillationLoss,
    dkl.LogitsTerm,
    OF_EVERY_TERM
    | {
        "matching": "joint",
        "negatives": ("by_box", {"matching": "targets"}),
        "weighting": "confidence",
        "cost_class": 30.0,
        "cost_bbox": 0.0,
        "cost_giou": 30.0,
        "backend": "counting",
        "stage_map": "last",
        "class_loss": "bce",
        "temperature": 2.0,
        "weight_class": 2.0,
        "weight_bbox": 1.0,
        "weight_giou": 1.0,
        "weight_negative": 0.5,
        "weight_negative_class": 0.5,
        "sync_normalizer": False,
    },
    wrt=("student_logits", "student_boxes"),
    trials={
        "distillation, kl": distillation_trial(temperature=2.0, weight_negative=0.3),
        "distillation, bce": distillation_trial(class_loss="bce", weight_bbox=1.0, weight_giou=0.5),
        "distillation, softmax": distillation_trial(**SOFTMAX, temperature=0.5),
        "distillation, crossed": distillation_trial(student_activation="softmax", weight_class=0.3),
        "distillation, class map": distillation_trial(teacher_activation="softmax", class_map=[3, 0, -1]),
        "distillation, weighted": WEIGHTED._replace(case=cases.weighted(WEIGHTED.case)),
        "distillation, class map, temperature": distillation_trial(class_map=[1, 0, -1], temperature=2.0),
    },
    laws=testing.WEIGHTED_DISTILLATION_LAWS,
    held_to=(
        HeldTo(dkl.hungarian_distillation_loss, {}),
        HeldTo(dkl.hungarian_distillation_loss, {"class_loss": "bce"}, NOT_ZERO),
        HeldTo(dkl.hungarian_distillation_loss, {**SOFTMAX, "temperature": 2.0}),
        between_other_heads(student_activation="softmax", teacher_activation="sigmoid"),
        between_other_heads(student_activation="sigmoid", teacher_activation="softmax"),
        HeldTo(
            dkl.hungarian_distillation_loss,
            {"weight_negative": 0.5, "weight_negative_class": 0.3},
            given_up=("negatives_by_box",),
        ),
    ),
)

SHARED_QUERIES = Loss(
    dkl.shared_query_distillation_loss,
    dkl.SharedQueryDistillationLoss,
    dkl.SharedQueryTerm,
    OF_EVERY_TERM
    | {
        "stage_map": "even",
        "weighting": "uniform",
        "class_loss": "bce",
        "temperature": 2.0,
        "weight_class": 2.0,
        "weight_bbox": 1.0,
        "weight_giou": 1.0,
        "sync_normalizer": False,
    },
    wrt=("student_logits", "student_boxes"),
    trials={
        "shared queries": Trial(cases.shared(), {"temperature": 2.0}),
        "shared queries, uniform": Trial(cases.shared(), {"weighting": "uniform", "class_loss": "bce"}),
        "shared queries, softmax": Trial(cases.shared(**SOFTMAX), {**SOFTMAX, "weight_bbox": 1.0}),
        "shared queries, class map": Trial(cases.shared(class_map=[1, 0, -1]), {"class_map": [1, 0, -1]}),
    },
    laws=testing.SHARED_QUERY_LAWS,
    held_to=(
        HeldTo(dkl.shared_query_distillation_loss, {}),
        HeldTo(dkl.shared_query_distillation_loss, {"weighting": "uniform", "class_loss": "bce"}, NOT_ZERO),
        HeldTo(dkl.shared_query_distillation_loss, {**SOFTMAX, "temperature": 2.0}),
    ),
)

DETECTION = Loss(
    dkl.detection_loss,
    dkl.DetectionLoss,
    "it is what a student learns without a teacher",
    wrt=("logits", "boxes"),
    trials={
        "detection, focal": Trial(cases.detection(), {"alpha": 0.4, "gamma": 1.5, "weight_class": 2.0}),
        "detection, cross-entropy": Trial(
            cases.detection(activation="softmax"), {"class_loss": "cross_entropy", "no_object_weight": 0.3}
        ),
    },
    laws=testing.DETECTION_LAWS,
    held_to=(HeldTo(dkl.detection_loss, {}), HeldTo(dkl.detection_loss, {"class_loss": "cross_entropy"})),
)

QUERY_GROUP = Loss(
    dkl.teacher_assigned_query_loss,
    dkl.TeacherAssignedQueryLoss,
    dkl.QueryGroupTerm,
    OF_EVERY_TERM
    | {
        "stage_map": "last",
        "class_loss": ("cross_entropy", {"student_activation": "softmax"}),
        "alpha": 0.4,
        "gamma": 1.0,
        "no_object_weight": (0.5, {"student_activation": "softmax"}),
        "weight_class": 2.0,
        "weight_bbox": 1.0,
        "weight_giou": 1.0,
        "sync_normalizer": False,
    },
    wrt=("group_logits", "group_boxes"),
    trials={
        "query group": Trial(cases.of_teacher(cases.detection(), "group"), {"gamma": 1.0, "weight_giou": 1.0}),
    },
    laws=testing.DETECTION_LAWS,
    held_to=(HeldTo(dkl.teacher_assigned_query_loss, {}),),
    oracle_names={"group_logits": "logits", "group_boxes": "boxes", "teacher_assignment": "assignment"},
)

FEATURES = Loss(
    dkl.target_aware_feature_loss,
    dkl.TargetAwareFeatureLoss,
    dkl.FeatureTerm,
    OF_EVERY_TERM
    | {
        "variant": "official",
        "normalize": "mean",
        "relative": False,
        "gamma": 0.25,
        "topk": (5, {"variant": "official"}),
        "sync_normalizer": (False, {"relative": False}),
    },
    wrt=("student_features",),
    trials={
        "features, paper": Trial(cases.features(), {}),
        "features, mean": Trial(cases.features(), {"normalize": "mean"}),
        "features, official": Trial(cases.features(), {"variant": "official", "normalize": "queries"}),
        "features, relative": Trial(cases.features(), {"normalize": "max", "relative": True}),
    },
    laws=testing.FEATURE_LAWS,
    held_to=(
        HeldTo(dkl.target_aware_feature_loss, {}),
        HeldTo(dkl.target_aware_feature_loss, {"variant": "official"}),
        HeldTo(dkl.target_aware_feature_loss, {"normalize": "max"}),
        HeldTo(dkl.target_aware_feature_loss, {"normalize": "mean"}),
        HeldTo(dkl.target_aware_feature_loss, {"variant": "official", "normalize": "mean"}),
    ),
)


def channel_distance(student_features, teacher_features, *, padding_mask=None, temperature=1.0):
    """The plain distance that takes no weight of cells."""
    options = {"padding_mask": padding_mask, "temperature": temperature}
    return dkl.feature_distillation_loss(student_features, teacher_features, distance="channel", **options)


PLAIN_FEATURES = Loss(
    dkl.feature_distillation_loss,
    dkl.FeatureDistillationLoss,
    dkl.PlainFeatureTerm,
    OF_EVERY_TERM
    | {
        "cells": "boxes",
        "distance": "pearson",
        "temperature": (2.0, {"distance": "channel"}),
        "sync_normalizer": False,
    },
    wrt=("student_features",),
    trials={
        "plain features": Trial(cases.plain_features(), {}),
        "plain features, cosine": Trial(cases.plain_features(), {"distance": "cosine"}),
        "plain features, pearson": Trial(cases.plain_features(), {"distance": "pearson"}),
        "plain features, channel": Trial(
            cases.plain_features(weighted=False), {"distance": "channel", "temperature": 2.0}
        ),
    },
    laws=testing.PLAIN_FEATURE_LAWS,
    held_to=(
        *(HeldTo(dkl.feature_distillation_loss, {"distance": name}) for name in ("mse", "cosine", "pearson")),
        HeldTo(channel_distance, {"temperature": 2.0}, ("equal_weights",)),
    ),
)

BOX_DISTRIBUTIONS = Loss(
    dkl.box_distribution_loss,
    dkl.BoxDistributionLoss,
    dkl.BoxDistributionTerm,
    OF_EVERY_TERM | OF_EVERY_PAIRED_TERM | {"temperature": 2.0, "sync_normalizer": False},
    wrt=("student_distributions",),
    trials={
        "box distributions": Trial(cases.box_distributions(), {"temperature": 2.0}),
        "box distributions, same bins": Trial(cases.box_distributions(own_bins=False), {}),
        "box distributions, weighted": Trial(cases.weighted(cases.box_distributions(seed=1)), {"temperature": 0.5}),
    },
    laws=testing.BOX_DISTRIBUTION_LAWS,
    held_to=(
        HeldTo(dkl.box_distribution_loss, {"student_bins": BINS, "student_scale": SCALE}),
        HeldTo(dkl.box_distribution_loss, {"student_bins": BINS, "student_scale": SCALE, "temperature": 3.0}),
    ),
)

MASKS = Loss(
    dkl.mask_distillation_loss,
    dkl.MaskDistillationLoss,
    dkl.MaskTerm,
    OF_EVERY_TERM | OF_EVERY_PAIRED_TERM | {"cells": "all", "temperature": 2.0, "sync_normalizer": False},
    wrt=("student_masks",),
    trials={
        "masks": Trial(cases.masks(), {"temperature": 2.0}),
        "masks, all cells": Trial(cases.masks(boxed=False, teacher_size=(2, 2)), {}),
        "masks, weighted": Trial(cases.weighted(cases.masks(teacher_size=(3, 4))), {"temperature": 0.5}),
    },
    laws=testing.MASK_LAWS,
    held_to=(HeldTo(dkl.mask_distillation_loss, {}), HeldTo(dkl.mask_distillation_loss, {"temperature": 3.0})),
)

LOSSES = {
    loss.name: loss
    for loss in (
        HUNGARIAN_DISTILLATION,
        SHARED_QUERIES,
        DETECTION,
        QUERY_GROUP,
        FEATURES,
        PLAIN_FEATURES,
        BOX_DISTRIBUTIONS,
        MASKS,
    )
}
# Every trial of every loss, by the name of the trial.
TRIALS = {name: (loss, trial) for loss in LOSSES.values() for name, trial in loss.trials.items()}
