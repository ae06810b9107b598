"""A second data set, of real images: the handwritten digits that scikit-learn ships, scattered over textures."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from shapes import (
    COLUMNS,
    ROWS,
    SIZE,
    Layout,
    Scene,
    ShapeImages,
    contrasting_colour,
    noisy,
    place_boxes,
    stack_scenes,
    tight_box,
)

NUM_CLASSES = 10
SCATTERED = Layout(objects=(1, 6), pixels=(13, 28), stretch=(-0.3, 0.0), overlap=0.2)
NOISE = 0.05
INK = 0.25  # a pixel with less of a digit's ink than that does not belong to it
# A quarter of the digits is only in validation images, another only in test images.
PARTS = {0: (0, 3), 1: (1,), 2: (2,)}


@cache
def make_digits(count: int, seed: int) -> ShapeImages:
    """Draw `count` images; the same seed, 0, 1 or 2, gives the same images, and no digit is in those of two seeds."""
    generator = np.random.default_rng(seed)
    images, labels = digits_of(seed)
    return stack_scenes([draw_scene(generator, images, labels) for _ in range(count)])


def digits_of(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the digits (I, 8, 8) of a part of the data, in [0, 1], and which they are."""
    from sklearn.datasets import load_digits  # noqa: PLC0415  (for this data set alone)

    digits = load_digits()
    own = np.isin(np.arange(len(digits.images)) % 4, PARTS[seed])
    return digits.images[own] / 16, digits.target[own]


def draw_scene(generator: np.random.Generator, digits: np.ndarray, classes: np.ndarray) -> Scene:
    """Draw one image of some digits; return it with their labels and boxes."""
    image = draw_texture(generator)
    labels, boxes = [], []
    for xyxy in place_boxes(generator, SCATTERED):
        index = int(generator.integers(len(digits)))
        ink = ink_of(digits[index], xyxy)
        image += ink[..., None] * (contrasting_colour(generator, image[ink > INK].mean(0)) - image)
        labels.append(int(classes[index]))
        boxes.append(tight_box(ink > INK))
    return noisy(generator, image, NOISE), labels, boxes


def draw_texture(generator: np.random.Generator) -> np.ndarray:
    """Draw muted stripes of three widths and directions across one another."""
    image = np.broadcast_to(generator.uniform(0.3, 0.7, 3), (SIZE, SIZE, 3)).copy()
    for wavelength in (32, 16, 8):
        angle, phase = generator.uniform(0, 2 * np.pi, 2)
        wave = np.sin(2 * np.pi * (np.cos(angle) * COLUMNS + np.sin(angle) * ROWS) / wavelength + phase)
        image += wave[..., None] * generator.uniform(-0.08, 0.08, 3)
    return image


def ink_of(digit: np.ndarray, xyxy: np.ndarray) -> np.ndarray:
    """Return how much ink (H, W) each pixel has when a digit (8, 8), without its margins, is stretched to a box."""
    inked = digit > INK
    digit = digit[np.ix_(inked.any(1), inked.any(0))]
    left, top, right, bottom = xyxy.round().astype(int)
    size = (int(bottom - top), int(right - left))
    stretched = F.interpolate(torch.from_numpy(digit)[None, None], size, mode="bilinear")[0, 0]
    ink = np.zeros((SIZE, SIZE))
    ink[top:bottom, left:right] = stretched.numpy()
    return ink
