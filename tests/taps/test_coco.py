"""The class map of COCO against the list of categories, as its annotation files have it."""

from __future__ import annotations

import pytest

from detr_kd_losses.taps import COCO_CATEGORY_IDS, coco_class_map

# Category ids of instances_val2017.json, as ranges.
RANGES = [(1, 11), (13, 25), (27, 28), (31, 44), (46, 65), (67, 67), (70, 70), (72, 82), (84, 90)]
IDS = [number for first, last in RANGES for number in range(first, last + 1)]


def test_ids() -> None:
    assert list(COCO_CATEGORY_IDS) == IDS
    assert len(IDS) == 80


@pytest.mark.parametrize("by_id", [90, 91])
def test_both_ways(by_id: int) -> None:
    there, back = coco_class_map(by_id, 80), coco_class_map(80, by_id)
    assert len(there) == by_id
    assert len(back) == 80
    for label, number in enumerate(IDS):
        if number < by_id:
            assert there[number] == label
            assert back[label] == number
        else:
            assert back[label] == -1
    assert there.count(-1) == by_id - sum(number < by_id for number in IDS)


def test_same_classes() -> None:
    assert coco_class_map(80, 80) == list(range(80))
    assert [label for label in coco_class_map(91, 91) if label >= 0] == IDS


def test_other_numbers() -> None:
    with pytest.raises(ValueError, match="`student_classes` must be 80, 90 or 91, as of heads for COCO, got 365"):
        coco_class_map(91, 365)
