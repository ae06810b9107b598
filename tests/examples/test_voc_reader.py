"""The reader of PASCAL VOC's format, on a set that is generated here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("PIL", reason="the reader of images needs pillow")

from PIL import Image

import detr_kd_losses as dkl
from hf_transformers.coco_shapes import CocoDetection, collate, make_shapes
from hf_transformers.voc import CLASSES, VocDetection, open_detection

# Of an image of 100 by 80 pixels: the dog covers its columns 11 to 30 and its rows 1 to 40, counted from 1.
DOG = """<object><name>dog</name><pose>Left</pose><truncated>0</truncated><difficult>0</difficult>
  <bndbox><xmin>11</xmin><ymin>1</ymin><xmax>30</xmax><ymax>40</ymax></bndbox>{}</object>"""
PERSON = """<object><name>person</name>
  <part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></part>
  <bndbox><ymax>80.5</ymax><xmax>100</xmax><ymin>41</ymin><xmin>51</xmin></bndbox></object>"""
DIFFICULT = DOG.replace("<difficult>0", "<difficult>1").replace("dog", "cat")


def write_voc(folder: Path, images: dict[str, list[str]], split: str = "trainval") -> Path:
    """Write images of 100 by 80 pixels with the given objects in VOC's folders."""
    for part in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    (folder / "ImageSets/Main" / f"{split}.txt").write_text("".join(f"{name}\n" for name in images))
    for name, objects in images.items():
        size = "<size><width>100</width><height>80</height><depth>3</depth></size>"
        content = f"<annotation><filename>{name}.jpg</filename>{size}{''.join(objects)}</annotation>"
        (folder / "Annotations" / f"{name}.xml").write_text(content)
        Image.new("RGB", (100, 80), (255, 0, 0)).save(folder / "JPEGImages" / f"{name}.jpg")
    return folder


def labels_of(data: VocDetection, index: int = 0) -> dict[str, Any]:
    labels = data[index]["labels"]
    return {"classes": [CLASSES[label] for label in labels["class_labels"]], "boxes": labels["boxes"]}


def test_pixels_are_counted_from_1_and_parts_are_no_objects(tmp_path: Path) -> None:
    data = VocDetection(write_voc(tmp_path, {"000007": [DOG.format(""), PERSON]}), side=32)
    found = labels_of(data)
    assert found["classes"] == ["dog", "person"]
    # From the left edge of the first pixel to the right edge of the last; what is beyond the image is cut.
    assert_close(found["boxes"], torch.tensor([[0.2, 0.25, 0.2, 0.5], [0.75, 0.75, 0.5, 0.5]]))
    assert data[0]["pixel_values"].shape == (3, 32, 32)
    assert data[0]["pixel_values"][0].mean() > 0.9


def test_difficult_objects_are_left_out_unless_asked_for(tmp_path: Path) -> None:
    folder = write_voc(tmp_path, {"a": [DIFFICULT, PERSON]})
    assert labels_of(VocDetection(folder))["classes"] == ["person"]
    assert labels_of(VocDetection(folder, difficult=True))["classes"] == ["cat", "person"]


def test_a_split_is_read_in_its_order_and_an_image_may_have_no_object(tmp_path: Path) -> None:
    data = VocDetection(write_voc(tmp_path, {"b": [], "a": [PERSON]}, split="val"), "val")
    assert data.names == ["b", "a"]
    targets = dkl.pad_targets(collate([data[0], data[1]])["labels"])
    assert targets.mask.tolist() == [[False], [True]]
    dkl.check_targets(*targets, num_classes=20)


def test_an_unknown_class_is_named_and_may_be_made_known(tmp_path: Path) -> None:
    folder = write_voc(tmp_path, {"a": [DOG.format("").replace("dog", "wombat")]})
    with pytest.raises(ValueError, match=r"a\.xml has an object 'wombat', which is none of the 20 classes"):
        VocDetection(folder)
    assert VocDetection(folder, class_names=["wombat"])[0]["labels"]["class_labels"].tolist() == [0]


def test_a_folder_is_opened_by_its_format(tmp_path: Path) -> None:
    make_shapes(tmp_path / "coco", count=1)
    assert isinstance(open_detection(tmp_path / "coco"), CocoDetection)
    assert isinstance(open_detection(write_voc(tmp_path / "voc", {"a": [PERSON]})), VocDetection)


def test_a_missing_image_is_named(tmp_path: Path) -> None:
    folder = write_voc(tmp_path, {"a": [PERSON]})
    (folder / "JPEGImages" / "a.jpg").unlink()
    with pytest.raises(OSError, match=r"image a, .*a\.jpg, cannot be read"):
        VocDetection(folder)[0]
