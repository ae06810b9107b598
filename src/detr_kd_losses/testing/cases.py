"""The signatures that have laws, and strategies for their arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from detr_kd_losses.outputs import DetectorOutput, Predictions, Targets
from detr_kd_losses.testing.arguments import Arguments, Signature
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
    make_predictions,
    make_targets,
)

__all__ = [
    "make_cost_arguments",
    "make_criterion_arguments",
    "make_detection_arguments",
    "make_distillation_arguments",
    "make_feature_arguments",
]

DISTILLATION = Signature(
    {
        "student_logits": "LBNC",
        "student_boxes": "LBNX",
        "teacher_logits": "LBMC",
        "teacher_boxes": "LBMX",
        "assignment": "LBN",
        "teacher_positive": "LBM",
    },
    student=("student_logits", "student_boxes"),
    partner_axis="M",
    keywords=("teacher_positive",),
)
DETECTION = Signature(
    {
        "logits": "LBNC",
        "boxes": "LBNX",
        "target_labels": "BT",
        "target_boxes": "BTX",
        "target_mask": "BT",
        "assignment": "LBN",
    },
    student=("logits", "boxes"),
    partner_axis="T",
)
FEATURES = Signature(
    {
        "student_features": "BDHW",
        "teacher_features": "BDHW",
        "teacher_queries": "LBMD",
        "quality": "LBM",
        "padding_mask": "BHW",
    },
    student=("student_features",),
    keywords=("padding_mask",),
)
# All by keyword: a criterion takes these tensors in tuples, see `group_outputs`.
_CRITERION_AXES = {
    "student_logits": "LBNC",
    "student_boxes": "LBNX",
    "student_features": "BDHW",
    "group_logits": "LBMC",
    "group_boxes": "LBMX",
    "teacher_logits": "LBMC",
    "teacher_boxes": "LBMX",
    "teacher_queries": "LBMD",
    "teacher_features": "BDHW",
    "padding_mask": "BHW",
    "target_labels": "BT",
    "target_boxes": "BTX",
    "target_mask": "BT",
}
CRITERION = Signature(
    _CRITERION_AXES,
    student=("student_logits", "student_boxes", "student_features", "group_logits", "group_boxes"),
    keywords=tuple(_CRITERION_AXES),
)
COSTS = Signature({"cost": "BNT", "row_mask": "BN", "column_mask": "BT"}, keywords=("row_mask", "column_mask"))


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


def group_outputs(tensors: Mapping[str, Tensor]) -> tuple[DetectorOutput, DetectorOutput, Targets]:
    """The arguments of a criterion as the tuples that it takes."""
    student = DetectorOutput(
        tensors["student_logits"],
        tensors["student_boxes"],
        features=tensors["student_features"],
        group=Predictions(tensors["group_logits"], tensors["group_boxes"]),
    )
    teacher = DetectorOutput(
        tensors["teacher_logits"],
        tensors["teacher_boxes"],
        queries=tensors["teacher_queries"],
        features=tensors["teacher_features"],
        padding_mask=tensors["padding_mask"],
    )
    return student, teacher, Targets(tensors["target_labels"], tensors["target_boxes"], tensors["target_mask"])


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
