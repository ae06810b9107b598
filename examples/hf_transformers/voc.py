"""Detection data in PASCAL VOC's format, such as VOC2007 as it is distributed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

from torch.utils.data import Dataset

from hf_transformers.coco_shapes import SIDE, CocoDetection, clip, read_example

CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog"),
    *("horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)


class Annotation(NamedTuple):
    """The size of an image in pixels, and the class and the xywh box of each object."""

    size: tuple[float, float]
    objects: list[tuple[int, list[float]]]


class VocDetection(Dataset):
    """Images and targets of a folder in VOC's format, as `CocoDetection` has them.

    Pixels are counted from 1, and the last one belongs to the box. What is marked as difficult is left out unless asked
    for; so are parts of objects, and boxes without area in the image.

    Args:
        folder: Where `Annotations`, `ImageSets/Main` and `JPEGImages` are, such as `VOCdevkit/VOC2007`.
        split: Name of a list of images in `ImageSets/Main`.
        class_names: The names of the classes, in the order of the labels.
        side: Images are resized to squares of this many pixels.
        difficult: Whether objects that are marked as difficult count.
    """

    def __init__(
        self,
        folder: Path,
        split: str = "trainval",
        *,
        class_names: Sequence[str] = CLASSES,
        side: int = SIDE,
        difficult: bool = False,
    ) -> None:
        self.folder, self.side, self.class_names = folder, side, list(class_names)
        self.names = (folder / "ImageSets" / "Main" / f"{split}.txt").read_text().split()
        files = (folder / "Annotations" / f"{name}.xml" for name in self.names)
        self.annotations = [read_annotation(file, self.class_names, difficult=difficult) for file in files]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        name, (size, objects) = self.names[index], self.annotations[index]
        return read_example(self.folder / "JPEGImages" / f"{name}.jpg", name, objects, size, self.side)


def read_annotation(path: Path, class_names: Sequence[str], *, difficult: bool) -> Annotation:
    """Return what a file says of an image."""
    root = ElementTree.parse(path).getroot()
    width, height = (float(root.findtext(f"size/{side}")) for side in ("width", "height"))
    objects = []
    for entry in root.findall("object"):
        name = entry.findtext("name", "").strip()
        if name not in class_names:
            msg = f"{path} has an object {name!r}, which is none of the {len(class_names)} classes"
            raise ValueError(msg)
        left, top, right, bottom = (float(entry.findtext(f"bndbox/{k}")) for k in ("xmin", "ymin", "xmax", "ymax"))
        box = clip([left - 1, top - 1, right - left + 1, bottom - top + 1], width, height)
        if box[2] > 0 and box[3] > 0 and (difficult or entry.findtext("difficult", "0").strip() != "1"):
            objects.append((class_names.index(name), box))
    return Annotation((width, height), objects)


def open_detection(folder: Path) -> CocoDetection | VocDetection:
    """Open a folder of either format."""
    return VocDetection(folder) if (folder / "Annotations").is_dir() else CocoDetection(folder)
