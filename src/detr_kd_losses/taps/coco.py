"""The two ways in which detectors count the classes of COCO."""

from __future__ import annotations

__all__ = ["COCO_CATEGORY_IDS", "coco_class_map"]

_UNUSED = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)

COCO_CATEGORY_IDS: tuple[int, ...] = tuple(number for number in range(1, 91) if number not in _UNUSED)
"""The 80 category ids of COCO 2017, in order: entry k is the id of class k of a head with 80 classes."""


def coco_class_map(teacher_classes: int, student_classes: int) -> list[int]:
    """Return a `class_map` between heads that count COCO's classes differently.

    Heads with 90 or 91 classes number them by category id (DETR, Deformable DETR, DINO, RF-DETR); those with 80 without
    the gaps (RT-DETR and its heirs, Ultralytics).

    Args:
        teacher_classes: Of the teacher's head, without "no object": 80, 90 or 91.
        student_classes: Of the student's.

    Returns:
        The student's class of each teacher class, -1 = none, for :class:`DETRDistillationLoss`.

    Raises:
        ValueError: If a number of classes is another.

    Examples:
        >>> coco_class_map(91, 80)[:15]
        [-1, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, -1, 11, 12]
        >>> coco_class_map(80, 91)[:15]
        [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 14, 15, 16]
    """
    for name, number in (("teacher_classes", teacher_classes), ("student_classes", student_classes)):
        if number not in {80, 90, 91}:
            msg = f"`{name}` must be 80, 90 or 91, as of heads for COCO, got {number}"
            raise ValueError(msg)
    known = range(80) if student_classes == 80 else COCO_CATEGORY_IDS
    class_of = dict(zip(COCO_CATEGORY_IDS, known, strict=True))
    ids = COCO_CATEGORY_IDS if teacher_classes == 80 else range(teacher_classes)
    return [class_of.get(number, -1) if class_of.get(number, -1) < student_classes else -1 for number in ids]
