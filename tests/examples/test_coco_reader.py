"""The reader of COCO data gives the losses what they can learn from, and names what it cannot read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("PIL", reason="the reader of images needs pillow")

from PIL import Image

import detr_kd_losses as dkl
from hf_transformers.coco_shapes import CocoDetection, clip, collate


def annotation(box: list[float], **others: Any) -> dict[str, Any]:
    return {"id": 1, "image_id": 7, "category_id": 44, "bbox": box, "area": 1, "iscrowd": 0} | others


def read(folder: Path, *annotations: dict[str, Any]) -> CocoDetection:
    Image.new("RGB", (100, 80)).save(folder / "a.png")
    content = {
        "images": [{"id": 7, "file_name": "a.png", "width": 100, "height": 80}],
        "categories": [{"id": 18, "name": "dog"}, {"id": 44, "name": "bottle"}],
        "annotations": list(annotations),
    }
    (folder / "instances.json").write_text(json.dumps(content))
    return CocoDetection(folder)


@pytest.mark.parametrize(
    ("left_out", "why"),
    [
        (annotation([0, 0, 100, 80], iscrowd=1), "crowd"),
        (annotation([50, 50, 0, 10]), "no width"),
        (annotation([50, 50, 10, -3]), "negative height"),
        (annotation([101, 5, 10, 10]), "outside"),
        (annotation([-20, 5, 20, 10]), "outside, ending at the border"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_object_is_left_out(left_out: dict[str, Any], why: str, tmp_path: Path) -> None:
    labels = read(tmp_path, left_out, annotation([10, 10, 20, 20]))[0]["labels"]
    assert labels["class_labels"].tolist() == [1]
    assert_close(labels["boxes"], torch.tensor([[0.2, 0.25, 0.2, 0.25]]))
    alone = read(tmp_path, left_out)[0]
    targets = dkl.pad_targets(collate([alone])["labels"])
    assert targets.boxes.shape == (1, 0, 4)
    assert targets.labels.dtype == torch.int64


def test_boxes_end_with_the_image(tmp_path: Path) -> None:
    missing = annotation([90, 70, 20, 20])
    del missing["iscrowd"]  # as in data of one's own
    labels = read(tmp_path, missing, annotation([-10, -10, 30, 30]), annotation([-5, -5, 200, 200]))[0]["labels"]
    expected = [[0.95, 0.9375, 0.1, 0.125], [0.1, 0.125, 0.2, 0.25], [0.5, 0.5, 1.0, 1.0]]
    assert_close(labels["boxes"], torch.tensor(expected))
    mask = torch.ones(1, 3, dtype=torch.bool)
    dkl.check_targets(labels["class_labels"][None], labels["boxes"][None], mask, num_classes=2)
    assert clip([10, 10, 5, 5], 100, 80) == [10, 10, 5, 5]


def test_truncated_image_is_named(tmp_path: Path) -> None:
    data = read(tmp_path, annotation([10, 10, 20, 20]))
    path = tmp_path / "a.png"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(OSError, match=r"image 7, .*a.png, cannot be read .* get the file again"):
        data[0]


@pytest.mark.parametrize("wrong", [{"image_id": 8}, {"category_id": 3}])
def test_annotation_of_nothing_is_named(wrong: dict[str, int], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"annotation 1 is of image \d and category \d+, not both listed"):
        read(tmp_path, annotation([10, 10, 20, 20]) | wrong)
