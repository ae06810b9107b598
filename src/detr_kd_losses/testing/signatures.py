"""The signatures that have laws: what a function is called with, in one place.

    >>> print(DISTILLATION)  # doctest: +ELLIPSIS
    (student_logits (L, B, N, C), student_boxes (L, B, N, 4), teacher_logits (L, B, M, C), ...
    >>> print(COSTS)
    (cost (B, N, T), *, row_mask (B, N), column_mask (B, T)) -> column of each row (B, N) int64, -1 = none

L decoder layers, B images, N queries of the student, M of the teacher, K of both, T targets, C classes, D channels, H
and W cells, E bins of all four edges; boxes are cxcywh in [0, 1], masks bool, labels and assignments int64. What stands
after ``*`` is passed by name, and not at all where a function does not take it. A law may call without L, or in half
precision.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from detr_kd_losses.outputs import DetectorOutput, Predictions, Targets
from detr_kd_losses.testing.arguments import Signature
from detr_kd_losses.testing.requirements import Terms

__all__ = [
    "BOX_DISTRIBUTIONS",
    "COSTS",
    "CRITERION",
    "DETECTION",
    "DISTILLATION",
    "FEATURES",
    "MASKS",
    "PLAIN_FEATURES",
    "PLANTED",
    "SHARED_QUERIES",
    "TARGET_MATCHING",
    "TEACHER_MATCHING",
    "WEIGHTED_DISTILLATION",
    "group_outputs",
]

_LOSS = "a dict of scalars by name, or a scalar"


def _say_as_partner(tensors: Mapping[str, Tensor]) -> Terms:
    """What the student says of its queries, as their partners say it."""
    partner = tensors["assignment"].clamp(min=0)
    kinds = [name.removeprefix("student_") for name in tensors if name.startswith("student_")]
    return {f"student_{kind}": _take(tensors[f"teacher_{kind}"], partner) for kind in kinds}


def _take(values: Tensor, index: Tensor) -> Tensor:
    """`values` (L, B, M, ...) at the entries `index` (L, B, N) of M."""
    trailing = values.shape[index.ndim :]
    return values.gather(
        -1 - len(trailing), index.reshape(*index.shape, *[1] * len(trailing)).expand(*index.shape, *trailing)
    )


def _answer_as_teacher(tensors: Mapping[str, Tensor]) -> Terms:
    """The teacher's predictions for the student's."""
    return {f"student_{kind}": tensors[f"teacher_{kind}"] for kind in ("logits", "boxes")}


def _see_as_teacher(tensors: Mapping[str, Tensor]) -> Terms:
    """The teacher's features for the student's."""
    return {"student_features": tensors["teacher_features"]}


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
    returns=_LOSS,
    twin=_say_as_partner,
)
WEIGHTED_DISTILLATION = replace(
    DISTILLATION,
    axes={**DISTILLATION.axes, "teacher_weight": "LBM"},
    keywords=("teacher_positive", "teacher_weight"),
)
BOX_DISTRIBUTIONS = Signature(
    {
        "student_distributions": "LBNE",
        "student_references": "LBNX",
        "teacher_distributions": "LBME",
        "teacher_references": "LBMX",
        "assignment": "LBN",
        "teacher_weight": "LBM",
    },
    student=("student_distributions",),
    partner_axis="M",
    keywords=("teacher_weight",),
    returns=_LOSS,
    twin=_say_as_partner,
)
MASKS = Signature(
    {
        "student_masks": "LBNHW",
        "teacher_masks": "LBMHW",
        "assignment": "LBN",
        "boxes": "LBMX",
        "teacher_weight": "LBM",
    },
    student=("student_masks",),
    partner_axis="M",
    keywords=("boxes", "teacher_weight"),
    returns=_LOSS,
    twin=_say_as_partner,
)
SHARED_QUERIES = Signature(
    {"student_logits": "LBKC", "student_boxes": "LBKX", "teacher_logits": "LBKC", "teacher_boxes": "LBKX"},
    student=("student_logits", "student_boxes"),
    returns=_LOSS,
    twin=_answer_as_teacher,
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
    returns=_LOSS,
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
    returns=_LOSS,
    twin=_see_as_teacher,
)
PLAIN_FEATURES = Signature(
    {"student_features": "BDHW", "teacher_features": "BDHW", "weight": "BHW", "padding_mask": "BHW"},
    student=("student_features",),
    keywords=("weight", "padding_mask"),
    returns=_LOSS,
    twin=_see_as_teacher,
)


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


CRITERION = Signature(
    {
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
    },
    student=("student_logits", "student_boxes", "student_features", "group_logits", "group_boxes"),
    returns=_LOSS,
    pack=group_outputs,
    packed=("student: DetectorOutput", "teacher: DetectorOutput", "targets: Targets"),
)

_PARTNERS = "partner of each query (L, B, N) int64, -1 = none"
TARGET_MATCHING = replace(DETECTION.without_argument("assignment"), returns=_PARTNERS)
TEACHER_MATCHING = replace(DISTILLATION.without_argument("assignment"), returns=_PARTNERS)

COSTS = Signature(
    {"cost": "BNT", "row_mask": "BN", "column_mask": "BT"},
    keywords=("row_mask", "column_mask"),
    returns="column of each row (B, N) int64, -1 = none",
)
# A cost of which the optimum is known: a law compares with it, a solver is not given it.
PLANTED = Signature({"cost": "NT", "planted": "N"})
