"""Seeded random arguments of the functions under test: float64 NumPy, small enough for oracles in plain loops.

A case is a dict from a function's argument names to arrays (lists of arrays for levels). `HEADS` has the options
for every pair of heads with every kind of class map.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

Case = dict[str, Any]

STAGES, IMAGES, TARGETS, CLASSES, CHANNELS = 2, 2, 3, 4, 5

# Student class of each teacher class, -1 = dropped; the student has CLASSES classes.
CLASS_MAPS: dict[str, list[int] | None] = {
    "same classes": None,
    "dropped classes": [2, -1, 0, 1, 3, -1],
    "merged classes": [1, 1, 0, 2, 3, 0],
    "new student classes": [3, 0],
    "nothing in common": [-1, -1],
}
HEADS = [
    pytest.param(
        {"student_activation": student, "teacher_activation": teacher, "class_map": class_map},
        id=f"{teacher} teaches {student}, {name}",
    )
    for teacher, student, (name, class_map) in itertools.product(
        ("sigmoid", "softmax"), ("sigmoid", "softmax"), CLASS_MAPS.items()
    )
]


def num_channels(classes: int, activation: str) -> int:
    """A softmax head has "no object" on top of its classes."""
    return classes + (activation == "softmax")


def random_boxes(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Boxes (*shape, 4) inside the image, many of which overlap."""
    return np.concatenate((rng.uniform(0.25, 0.75, (*shape, 2)), rng.uniform(0.1, 0.5, (*shape, 2))), axis=-1)


def random_assignment(rng: np.random.Generator, lead: tuple[int, ...], rows: int, columns: np.ndarray) -> np.ndarray:
    """One-to-one pairs (*lead, rows) with the valid `columns` (*lead, M), at least one of them left out of many."""
    assignment = np.full((*lead, rows), -1)
    for problem in np.ndindex(*lead):
        valid = np.flatnonzero(columns[problem])
        most = min(rows, len(valid))
        pairs = rng.integers(1, most) if most > 1 else most
        assignment[problem][rng.permutation(rows)[:pairs]] = rng.permutation(valid)[:pairs]
    return assignment


def distillation(
    *,
    stages: int | None = STAGES,
    students: int = 7,
    teachers: int = 6,
    student_activation: str = "sigmoid",
    teacher_activation: str = "sigmoid",
    class_map: list[int] | None = None,
    seed: int = 0,
) -> Case:
    """Predictions of a student and of a teacher, pairs between them, and which teacher queries are positive."""
    rng = np.random.default_rng(seed)
    lead = (IMAGES,) if stages is None else (stages, IMAGES)
    teacher_classes = CLASSES if class_map is None else len(class_map)
    return {
        "student_logits": 2 * rng.normal(size=(*lead, students, num_channels(CLASSES, student_activation))),
        "student_boxes": random_boxes(rng, *lead, students),
        "teacher_logits": 2 * rng.normal(size=(*lead, teachers, num_channels(teacher_classes, teacher_activation))),
        "teacher_boxes": random_boxes(rng, *lead, teachers),
        "assignment": random_assignment(rng, lead, students, np.ones((*lead, teachers), dtype=bool)),
        "teacher_positive": rng.random((*lead, teachers)) < 0.5,
    }


def weighted(case: Case, *, stages: bool = True, seed: int = 0) -> Case:
    """A case of distillation with weights of the teacher queries, some of them 0; without `stages`, of all alike."""
    teacher = next(value for name, value in case.items() if name.startswith("teacher_"))
    shape = teacher.shape[: case["assignment"].ndim]
    shape = shape if stages else shape[-2:]
    weight = 2 * np.random.default_rng(seed).random(shape) - 0.4
    return {**case, "teacher_weight": weight.clip(0.0)}


def published_weights() -> Case:
    """What weights of teacher queries are functions of; the second image has one target, which some overlap."""
    case = of_teacher(detection(queries=9, seed=3))
    case["target_boxes"][0, :2] = case["teacher_boxes"][0, 0, :2]
    return case


def box_distributions(
    *, stages: int | None = STAGES, students: int = 5, teachers: int = 4, own_bins: bool = True, seed: int = 0
) -> Case:
    """Box distributions of a student and of a teacher; `own_bins`: the teacher has others, and another scale."""
    rng = np.random.default_rng(seed)
    lead = (IMAGES,) if stages is None else (stages, IMAGES)
    student_bins, teacher_bins = np.array([-4.0, -1.0, 0.0, 0.7, 4.0]), np.array([-3.0, -0.5, 0.2, 3.0])
    teachers_bins = teacher_bins if own_bins else student_bins
    case = {
        "student_distributions": 2 * rng.normal(size=(*lead, students, 4 * len(student_bins))),
        "student_references": random_boxes(rng, *lead, students),
        "teacher_distributions": 2 * rng.normal(size=(*lead, teachers, 4 * len(teachers_bins))),
        "teacher_references": random_boxes(rng, *lead, teachers),
        "assignment": random_assignment(rng, lead, students, np.ones((*lead, teachers), dtype=bool)),
        "student_bins": student_bins,
        "student_scale": np.array(4.0),
    }
    return case | ({"teacher_bins": teacher_bins, "teacher_scale": np.array(3.0)} if own_bins else {})


def masks(
    *,
    stages: int | None = STAGES,
    students: int = 4,
    teachers: int = 3,
    size: tuple[int, int] = (3, 4),
    teacher_size: tuple[int, int] = (5, 6),
    boxed: bool = True,
    seed: int = 0,
) -> Case:
    """Masks of a student and of a teacher of another size, pairs between them, and the teacher's boxes."""
    rng = np.random.default_rng(seed)
    lead = (IMAGES,) if stages is None else (stages, IMAGES)
    case = {
        "student_masks": 2 * rng.normal(size=(*lead, students, *size)),
        "teacher_masks": 2 * rng.normal(size=(*lead, teachers, *teacher_size)),
        "assignment": random_assignment(rng, lead, students, np.ones((*lead, teachers), dtype=bool)),
    }
    return case | ({"boxes": random_boxes(rng, *lead, teachers)} if boxed else {})


def predictions_only(case: Case) -> Case:
    """What costs and matching take of a case of distillation."""
    return {name: value for name, value in case.items() if name.endswith(("logits", "boxes"))}


def shared(*, stages: int | None = STAGES, queries: int = 4, seed: int = 0, **heads: Any) -> Case:
    """Predictions of a student and of a teacher for the same queries."""
    return predictions_only(distillation(stages=stages, students=queries, teachers=queries, seed=seed, **heads))


def targets(rng: np.random.Generator, count: int = TARGETS) -> Case:
    """Padded targets (B, count): all of them in the first image, two less in the second."""
    mask = np.zeros((IMAGES, count), dtype=bool)
    mask[0], mask[1, : max(count - 2, 0)] = True, True
    return {
        "target_labels": rng.integers(0, CLASSES, (IMAGES, count)),
        "target_boxes": random_boxes(rng, IMAGES, count),
        "target_mask": mask,
    }


def detection(
    *, stages: int | None = STAGES, queries: int = 5, count: int = TARGETS, activation: str = "sigmoid", seed: int = 0
) -> Case:
    """Predictions, padded targets and pairs between them."""
    rng = np.random.default_rng(seed)
    lead = (IMAGES,) if stages is None else (stages, IMAGES)
    padded = targets(rng, count)
    return {
        "logits": 2 * rng.normal(size=(*lead, queries, num_channels(CLASSES, activation))),
        "boxes": random_boxes(rng, *lead, queries),
        **padded,
        "assignment": random_assignment(rng, lead, queries, np.broadcast_to(padded["target_mask"], (*lead, count))),
    }


def of_teacher(case: Case, prefix: str = "teacher") -> Case:
    """A case of detection under the names of the teacher's predictions, or of the teacher's queries as a group."""
    renamed = {"logits": f"{prefix}_logits", "boxes": f"{prefix}_boxes", "assignment": "teacher_assignment"}
    return {renamed.get(name, name): value for name, value in case.items()}


def features(
    *,
    stages: int | None = STAGES,
    queries: int = 6,
    sizes: tuple[tuple[int, int], ...] = ((4, 3), (2, 2)),
    padded: bool = True,
    seed: int = 0,
) -> Case:
    """Levels of features of a student and a teacher with padding, and the teacher's queries with their quality."""
    rng = np.random.default_rng(seed)
    lead = (IMAGES,) if stages is None else (stages, IMAGES)
    masks = [np.ones((IMAGES, *size), dtype=bool) for size in sizes]
    for mask in masks:
        mask[1, -1:] = False
        mask[1, :, -1:] = False
    # A quarter of the queries has no quality.
    quality = rng.random((*lead, queries)) * (rng.random((*lead, queries)) > 0.25)
    return {
        "student_features": [rng.normal(size=(IMAGES, CHANNELS, *size)) for size in sizes],
        "teacher_features": [rng.normal(size=(IMAGES, CHANNELS, *size)) for size in sizes],
        "teacher_queries": rng.normal(size=(*lead, queries, CHANNELS)),
        "quality": quality,
        **({"padding_mask": masks} if padded else {}),
    }


def plain_features(*, weighted: bool = True, seed: int = 0, **options: Any) -> Case:
    """Levels of features of a student and a teacher with padding, and weights of the cells, some of them 0."""
    case = features(seed=seed, **options)
    del case["teacher_queries"], case["quality"]
    rng = np.random.default_rng(seed + 1)
    levels = [2 * rng.random((IMAGES, *level.shape[2:])) - 0.4 for level in case["student_features"]]
    return {**case, **({"weight": [level.clip(0.0) for level in levels]} if weighted else {})}


def filled(case: Case, name: str, where: np.ndarray, value: float) -> Case:
    """The case with `value` wherever `where`, over the leading dimensions of argument `name`."""
    array = case[name].copy()
    array[where] = value
    return {**case, name: array}
