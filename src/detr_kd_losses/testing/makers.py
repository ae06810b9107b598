"""Arguments of each signature from sizes, kinds and a seed, and strategies that draw them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from detr_kd_losses.testing.arguments import Arguments, remember_call
from detr_kd_losses.testing.signatures import COSTS, CRITERION, DETECTION, DISTILLATION, FEATURES, PLANTED
from detr_kd_losses.testing.strategies import (
    BOX_KINDS,
    COST_KINDS,
    LOGIT_KINDS,
    SEEDS,
    SIZES,
    generator,
    make_assignment,
    make_costs,
    make_feature_pyramid,
    make_planted_costs,
    make_predictions,
    make_targets,
)

__all__ = [
    "cost_arguments",
    "criterion_arguments",
    "detection_arguments",
    "distillation_arguments",
    "feature_arguments",
    "make_cost_arguments",
    "make_criterion_arguments",
    "make_detection_arguments",
    "make_distillation_arguments",
    "make_feature_arguments",
    "make_planted_arguments",
    "planted_arguments",
]


@remember_call
def make_distillation_arguments(
    *,
    stages: int,
    images: int,
    students: int,
    teachers: int,
    classes: int,
    split: bool,
    box_kind: str = "generic",
    logit_kind: str = "generic",
    seed: int = 0,
) -> Arguments:
    """Arguments of a distillation loss or, without the assignment, of a matcher of teacher queries."""
    predict = partial(
        make_predictions, stages=stages, images=images, classes=classes, box_kind=box_kind, logit_kind=logit_kind
    )
    student, teacher = predict(queries=students, seed=seed), predict(queries=teachers, seed=seed + 2)
    everyone = torch.ones(teachers, dtype=torch.bool)
    tensors = {
        "student_logits": student.logits,
        "student_boxes": student.boxes,
        "teacher_logits": teacher.logits,
        "teacher_boxes": teacher.boxes,
        "assignment": make_assignment((stages, images), students, everyone, seed=seed),
    }
    if split:
        tensors["teacher_positive"] = torch.rand((stages, images, teachers), generator=generator(seed)) < 0.5
    return Arguments(DISTILLATION, tensors)


@remember_call
def make_detection_arguments(
    *,
    stages: int,
    images: int,
    queries: int,
    targets: int,
    classes: int,
    at_least: int = 0,
    box_kind: str = "generic",
    logit_kind: str = "generic",
    seed: int = 0,
) -> Arguments:
    """Arguments of a detection loss; the last class is no target's, so that it can be "no object"."""
    predictions = make_predictions(
        stages=stages,
        images=images,
        queries=queries,
        classes=classes,
        box_kind=box_kind,
        logit_kind=logit_kind,
        seed=seed,
    )
    truth = make_targets(
        images=images, targets=targets, classes=classes - 1, at_least=at_least, box_kind=box_kind, seed=seed + 2
    )
    assignment = make_assignment((stages, images), queries, truth.mask, seed=seed)
    return Arguments(DETECTION, dict(zip(DETECTION.axes, (*predictions, *truth, assignment), strict=True)))


@remember_call
def make_feature_arguments(
    *,
    stages: int,
    images: int,
    queries: int,
    channels: int,
    height: int,
    width: int,
    padded: bool,
    seed: int = 0,
) -> Arguments:
    """Arguments of a feature loss, on one level."""
    pyramid = partial(make_feature_pyramid, images=images, channels=channels, height=height, width=width, padded=padded)
    (student,), _ = pyramid(seed=seed + 1)
    (teacher,), (mask,) = pyramid(seed=seed)
    numbers = generator(seed + 2)
    shape = (stages, images, queries)
    tensors = {
        "student_features": student,
        "teacher_features": teacher,
        "teacher_queries": torch.randn((*shape, channels), generator=numbers, dtype=torch.float64),
        "quality": torch.rand(shape, generator=numbers, dtype=torch.float64),
    }
    return Arguments(FEATURES, tensors | ({"padding_mask": mask} if padded else {}))


@remember_call
def make_criterion_arguments(
    *,
    stages: int,
    images: int,
    students: int,
    teachers: int,
    targets: int,
    classes: int,
    box_kind: str = "generic",
    logit_kind: str = "generic",
    seed: int = 0,
) -> Arguments:
    """Arguments of a whole criterion: all that a :class:`DetectorOutput` may hold, and a target in every image."""
    predict = partial(
        make_predictions, stages=stages, images=images, classes=classes, box_kind=box_kind, logit_kind=logit_kind
    )
    student, group = predict(queries=students, seed=seed), predict(queries=teachers, seed=seed + 1)
    teacher = predict(queries=teachers, seed=seed + 2)
    truth = make_targets(
        images=images, targets=targets, classes=classes - 1, at_least=1, box_kind=box_kind, seed=seed + 3
    )
    features = make_feature_arguments(
        stages=stages, images=images, queries=teachers, channels=3, height=2, width=3, padded=True, seed=seed + 4
    ).without("quality")
    tensors = {
        "student_logits": student.logits,
        "student_boxes": student.boxes,
        "group_logits": group.logits,
        "group_boxes": group.boxes,
        "teacher_logits": teacher.logits,
        "teacher_boxes": teacher.boxes,
        "target_labels": truth.labels,
        "target_boxes": truth.boxes,
        "target_mask": truth.mask,
    }
    return Arguments(CRITERION, tensors | dict(features.tensors))


@remember_call
def make_cost_arguments(
    *, problems: int, rows: int, columns: int, kind: str, ragged: bool, single: bool = False, seed: int = 0
) -> Arguments:
    """Arguments of an assignment solver: float64, or float32 if `single`."""
    cost = make_costs(problems=problems, rows=rows, columns=columns, kind=kind, seed=seed)
    tensors = {"cost": cost.float() if single else cost}
    if ragged:
        numbers = generator(seed + 1)
        tensors["row_mask"] = torch.rand((problems, rows), generator=numbers) < 0.8
        tensors["column_mask"] = torch.rand((problems, columns), generator=numbers) < 0.8
    return Arguments(COSTS, tensors)


def distillation_arguments(
    *, box_kinds: Sequence[str] = BOX_KINDS, logit_kinds: Sequence[str] = LOGIT_KINDS
) -> SearchStrategy[Arguments]:
    """Arguments of a distillation loss."""
    return st.builds(
        make_distillation_arguments,
        stages=SIZES,
        images=SIZES,
        students=SIZES,
        teachers=SIZES,
        classes=st.integers(2, 4),
        split=st.booleans(),
        box_kind=st.sampled_from(box_kinds),
        logit_kind=st.sampled_from(logit_kinds),
        seed=SEEDS,
    )


def detection_arguments(
    *, at_least: int = 0, box_kinds: Sequence[str] = BOX_KINDS, logit_kinds: Sequence[str] = LOGIT_KINDS
) -> SearchStrategy[Arguments]:
    """Arguments of a detection loss, or of a matcher of targets; `at_least` so many targets in each image."""
    return st.builds(
        make_detection_arguments,
        stages=SIZES,
        images=SIZES,
        queries=SIZES,
        targets=st.integers(at_least, 4),
        classes=st.integers(2, 4),
        at_least=st.just(at_least),
        box_kind=st.sampled_from(box_kinds),
        logit_kind=st.sampled_from(logit_kinds),
        seed=SEEDS,
    )


def feature_arguments() -> SearchStrategy[Arguments]:
    """Arguments of a feature loss."""
    return st.builds(
        make_feature_arguments,
        stages=SIZES,
        images=SIZES,
        queries=SIZES,
        channels=SIZES,
        height=SIZES,
        width=SIZES,
        padded=st.booleans(),
        seed=SEEDS,
    )


def criterion_arguments(
    *, box_kinds: Sequence[str] = ("generic",), logit_kinds: Sequence[str] = ("generic",)
) -> SearchStrategy[Arguments]:
    """Arguments of a criterion; by default in generic position, where every matching has one optimum."""
    return st.builds(
        make_criterion_arguments,
        stages=SIZES,
        images=SIZES,
        students=SIZES,
        teachers=SIZES,
        targets=st.integers(1, 4),
        classes=st.integers(2, 4),
        box_kind=st.sampled_from(box_kinds),
        logit_kind=st.sampled_from(logit_kinds),
        seed=SEEDS,
    )


def cost_arguments(*, kinds: Sequence[str] = COST_KINDS) -> SearchStrategy[Arguments]:
    """Arguments of an assignment solver."""
    return st.builds(
        make_cost_arguments,
        problems=SIZES,
        rows=st.integers(1, 7),
        columns=st.integers(1, 7),
        kind=st.sampled_from(kinds),
        ragged=st.booleans(),
        single=st.booleans(),
        seed=SEEDS,
    )


@remember_call
def make_planted_arguments(*, rows: int, columns: int, seed: int = 0) -> Arguments:
    """A cost with large duals for an assignment solver, and "planted", its only optimum."""
    cost, planted = make_planted_costs(rows=rows, columns=columns, seed=seed)
    return Arguments(PLANTED, {"cost": cost, "planted": planted})


def planted_arguments() -> SearchStrategy[Arguments]:
    """Arguments of an assignment solver that have one optimum, which is known."""
    return st.builds(make_planted_arguments, rows=st.integers(1, 12), columns=st.integers(1, 12), seed=SEEDS)
