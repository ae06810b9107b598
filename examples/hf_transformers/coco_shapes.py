"""Detection data in COCO format: a reader for any of it, and coloured shapes to try things out."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.data import Dataset

CLASSES = ("disc", "rectangle", "triangle")
SIDE = 96


class CocoDetection(Dataset):
    """Images and targets of a folder with `instances.json`, as the detectors of transformers take them.

    As DETR does: regions of a crowd, which are no single objects, are left out, boxes end with the image, and what
    then has no area is left out.

    Args:
        folder: Where `instances.json` and the images are.
        side: Images are resized to squares of this many pixels.
    """

    def __init__(self, folder: Path, side: int = SIDE) -> None:
        self.folder, self.side = folder, side
        content = json.loads((folder / "instances.json").read_text())
        self.images = content["images"]
        self.class_names = [category["name"] for category in content["categories"]]
        class_of = {category["id"]: index for index, category in enumerate(content["categories"])}
        sizes = {image["id"]: (image["width"], image["height"]) for image in self.images}
        self.objects: dict[int, list[tuple[int, list[float]]]] = {image["id"]: [] for image in self.images}
        for annotation in content["annotations"]:
            image, category = annotation["image_id"], annotation["category_id"]
            if image not in sizes or category not in class_of:
                msg = f"annotation {annotation.get('id')} is of image {image} and category {category}, not both listed"
                raise ValueError(msg)
            box = clip(annotation["bbox"], *sizes[image])
            if not annotation.get("iscrowd", 0) and box[2] > 0 and box[3] > 0:
                self.objects[image].append((class_of[category], box))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = self.images[index]
        path, size = self.folder / image["file_name"], (image["width"], image["height"])
        return read_example(path, image["id"], self.objects[image["id"]], size, self.side)


def read_example(
    path: Path, name: str | int, objects: list[tuple[int, list[float]]], size: tuple[float, float], side: int
) -> dict[str, Any]:
    """Read an image of some size, in pixels, as a square; its objects are classes and xywh boxes in pixels."""
    try:
        with Image.open(path) as file:
            pixels = file.convert("RGB").resize((side, side))
    except OSError as error:
        msg = f"image {name}, {path}, cannot be read ({error}): get the file again, or take it off the list"
        raise OSError(msg) from error
    xywh = torch.tensor([box for _, box in objects], dtype=torch.float32).reshape(-1, 4)
    boxes = torch.cat([xywh[:, :2] + xywh[:, 2:] / 2, xywh[:, 2:]], 1)
    return {
        "pixel_values": torch.from_numpy(np.array(pixels)).permute(2, 0, 1) / 255,
        "labels": {
            "class_labels": torch.tensor([label for label, _ in objects], dtype=torch.int64),
            "boxes": boxes / torch.tensor([*size, *size]),
        },
    }


def clip(box: list[float], width: float, height: float) -> list[float]:
    """Return the part of an xywh box, in pixels, that is in the image."""
    left, top = max(box[0], 0), max(box[1], 0)
    return [left, top, min(box[0] + box[2], width) - left, min(box[1] + box[3], height) - top]


def collate(examples: list[dict[str, Any]]) -> dict[str, Tensor | list[dict[str, Tensor]]]:
    """Stack the images; the targets stay a list, as images have different numbers of them."""
    return {
        "pixel_values": torch.stack([example["pixel_values"] for example in examples]),
        "labels": [example["labels"] for example in examples],
    }


def make_shapes(folder: Path, count: int, *, seed: int = 0, side: int = SIDE) -> None:
    """Write `count` images of coloured shapes, and `instances.json` with their exact boxes, to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = random.Random(seed)
    images, annotations = [], []
    for index in range(count):
        image, objects = draw_shapes(generator, side)
        name = f"{index:06d}.png"
        image.save(folder / name)
        images.append({"id": index, "file_name": name, "width": side, "height": side})
        for label, (x, y, width, height) in objects:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index,
                    "category_id": label + 1,
                    "bbox": [x, y, width, height],
                    "area": width * height,
                    "iscrowd": 0,
                }
            )
    categories = [{"id": label + 1, "name": name} for label, name in enumerate(CLASSES)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "instances.json").write_text(json.dumps(content))


def draw_shapes(generator: random.Random, side: int) -> tuple[Image.Image, list[tuple[int, list[int]]]]:
    """Draw one to four shapes, one in each quarter of the image; return their labels and xywh boxes in pixels."""
    image = Image.new("RGB", (side, side), tuple(generator.randint(0, 90) for _ in range(3)))
    canvas = ImageDraw.Draw(image)
    half = side // 2
    quarters = generator.sample([(0, 0), (half, 0), (0, half), (half, half)], generator.randint(1, 4))
    objects = []
    for left, top in quarters:
        width, height = (generator.randint(half // 3, half - 2) for _ in range(2))
        x, y = left + generator.randint(0, half - width - 1), top + generator.randint(0, half - height - 1)
        right, bottom = x + width - 1, y + height - 1  # the last pixel belongs to the shape
        colour = tuple(generator.randint(120, 255) for _ in range(3))
        label = generator.randrange(len(CLASSES))
        if CLASSES[label] == "disc":
            canvas.ellipse([x, y, right, bottom], fill=colour)
        elif CLASSES[label] == "rectangle":
            canvas.rectangle([x, y, right, bottom], fill=colour)
        else:
            canvas.polygon([(x, bottom), ((x + right) // 2, y), (right, bottom)], fill=colour)
        objects.append((label, [x, y, width, height]))
    return image, objects
