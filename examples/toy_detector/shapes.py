"""A synthetic detection data set: shapes on a gradient, under clutter, occlusion and noise, with exact boxes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import detr_kd_losses as dkl

# Each shape fills the square |u| <= 1, |v| <= 1, with u to the right and v down.
SHAPES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "disc": lambda u, v: u**2 + v**2 <= 1,
    "ring": lambda u, v: np.abs(u**2 + v**2 - 0.65) <= 0.35,
    "square": lambda u, v: np.abs(u) + np.abs(v) <= 2,
    "frame": lambda u, v: np.maximum(np.abs(u), np.abs(v)) > 0.55,
    "triangle": lambda u, v: np.abs(u) <= (1 + v) / 2,
    "wedge": lambda u, v: np.abs(u) <= (1 - v) / 2,
    "plus": lambda u, v: np.minimum(np.abs(u), np.abs(v)) < 0.33,
    "cross": lambda u, v: np.abs(np.abs(u) - np.abs(v)) < 0.38,
}
CLASSES = tuple(SHAPES)
SIZE = 64  # pixels a side
NOISE = 0.10


class Layout(NamedTuple):
    """How many objects an image has, how large they are, and how far they may cover one another.

    `pixels` are the smallest and largest mean side, `stretch` the bounds of the logarithm of width over mean side, and
    `overlap` is the part of the smaller of two boxes that they may share.
    """

    objects: tuple[int, int] = (1, 6)
    pixels: tuple[float, float] = (9, 26)
    stretch: tuple[float, float] = (-0.3, 0.3)
    overlap: float = 0.35


SPARSE = Layout()
Scene = tuple[np.ndarray, list[int], list[list[float]]]  # an image (H, W, 3), labels, cxcywh boxes

ROWS, COLUMNS = np.mgrid[:SIZE, :SIZE].astype(np.float32) + 0.5  # the centres of the pixels


@dataclass(frozen=True)
class ShapeImages:
    """Images (I, 3, H, W) in uint8, and the objects in them."""

    images: Tensor
    targets: dkl.Targets

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.images)

    def select(self, indices: Tensor) -> ShapeImages:
        """Return some of the images, with their targets."""
        return ShapeImages(self.images[indices], dkl.Targets(*(tensor[indices] for tensor in self.targets)))

    def normalised(self) -> Tensor:
        """Return the images (I, 3, H, W) as a detector takes them: of mean 0 and variance 1, about."""
        return (self.images.float() / 255 - 0.5) / 0.25


@cache
def make_shapes(count: int, seed: int) -> ShapeImages:
    """Draw `count` images; the same seed gives the same images."""
    generator = np.random.default_rng(seed)
    return stack_scenes([draw_scene(generator) for _ in range(count)])


def stack_scenes(scenes: list[Scene]) -> ShapeImages:
    """Return images (H, W, 3), their labels and boxes as one data set."""
    targets = [
        {"labels": torch.tensor(labels), "boxes": torch.tensor(boxes, dtype=torch.float32)}
        for _, labels, boxes in scenes
    ]
    images = np.stack([image for image, _, _ in scenes]).transpose(0, 3, 1, 2)
    return ShapeImages(torch.from_numpy(np.ascontiguousarray(images)), dkl.pad_targets(targets))


def draw_scene(
    generator: np.random.Generator, layout: Layout = SPARSE, frequencies: Sequence[float] | None = None
) -> Scene:
    """Draw one image (H, W, 3) of some objects, their classes of some frequencies; return it with labels and boxes."""
    image = draw_background(generator)
    labels: list[int] = []
    boxes: list[list[float]] = []
    for xyxy in place_boxes(generator, layout):
        label = int(generator.choice(len(CLASSES), p=frequencies) if frequencies else generator.integers(len(CLASSES)))
        pixels = shape_pixels(CLASSES[label], xyxy)
        image[pixels] = contrasting_colour(generator, image[pixels].mean(0))
        labels.append(label)
        boxes.append(tight_box(pixels))
    return noisy(generator, image, NOISE), labels, boxes


def noisy(generator: np.random.Generator, image: np.ndarray, deviation: float) -> np.ndarray:
    """Return an image of values in [0, 1] with noise, in uint8."""
    image = image + generator.normal(0, deviation, image.shape)
    return (image.clip(0, 1) * 255).astype(np.uint8)


def draw_background(generator: np.random.Generator) -> np.ndarray:
    """Draw a muted gradient between two colours, crossed by up to three thin lines."""
    first, second = generator.uniform(0.26, 0.74, (2, 3))
    angle = generator.uniform(0, 2 * np.pi)
    blend = ((np.cos(angle) * COLUMNS + np.sin(angle) * ROWS) / SIZE + 1)[..., None] / 2
    image = first * (1 - blend) + second * blend
    for _ in range(generator.integers(4)):
        angle, offset = generator.uniform(0, 2 * np.pi), generator.uniform(-SIZE / 2, SIZE)
        image[np.abs(np.cos(angle) * COLUMNS + np.sin(angle) * ROWS - offset) < 0.8] = generator.uniform(0, 1, 3)
    return image


def place_boxes(generator: np.random.Generator, layout: Layout) -> list[np.ndarray]:
    """Draw some boxes, xyxy in pixels, that cover one another only in part."""
    fewest, most = layout.objects
    wanted = generator.integers(fewest, most + 1)
    placed: list[np.ndarray] = []
    for _ in range(4 * wanted):
        side = np.exp(generator.uniform(*np.log(layout.pixels)))
        extent = side * np.exp(generator.uniform(*layout.stretch) * np.array([1, -1]))  # width, height
        corner = generator.uniform(0, SIZE - extent)
        candidate = np.concatenate([corner, corner + extent])
        if len(placed) < wanted and all(overlap(candidate, other) < layout.overlap for other in placed):
            placed.append(candidate)
    return placed


def overlap(box: np.ndarray, other: np.ndarray) -> float:
    """Return the area shared by two xyxy boxes, as a part of the smaller one."""
    shared = (np.minimum(box[2:], other[2:]) - np.maximum(box[:2], other[:2])).clip(0).prod()
    return float(shared / min((box[2:] - box[:2]).prod(), (other[2:] - other[:2]).prod()))


def shape_pixels(name: str, xyxy: np.ndarray) -> np.ndarray:
    """Return the pixels (H, W), bool, that a shape covers when it fills a box."""
    x1, y1, x2, y2 = xyxy
    u, v = (2 * COLUMNS - x1 - x2) / (x2 - x1), (2 * ROWS - y1 - y2) / (y2 - y1)  # the box is [-1, 1] in both
    return SHAPES[name](u, v) & (np.abs(u) <= 1) & (np.abs(v) <= 1)


def tight_box(pixels: np.ndarray) -> list[float]:
    """Return the cxcywh box, relative to the image, that just holds the given pixels."""
    rows, columns = np.flatnonzero(pixels.any(1)), np.flatnonzero(pixels.any(0))
    x1, y1, x2, y2 = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    return [(x1 + x2) / 2 / SIZE, (y1 + y2) / 2 / SIZE, (x2 - x1) / SIZE, (y2 - y1) / SIZE]


def contrasting_colour(generator: np.random.Generator, background: np.ndarray) -> np.ndarray:
    """Draw a colour that differs from the background by at least 0.25 in some channel."""
    while True:
        colour = generator.uniform(0, 1, 3)
        if np.abs(colour - background).max() > 0.25:
            return colour
