"""A third data set, another in kind: many small shapes that crowd together, of classes from common to rare."""

from __future__ import annotations

from functools import cache

import numpy as np
from shapes import CLASSES, Layout, ShapeImages, draw_scene, stack_scenes

CROWDED = Layout(objects=(5, 12), pixels=(7, 12), overlap=0.5)
WEIGHTS = [1 / (rank + 1) ** 1.5 for rank in range(len(CLASSES))]
FREQUENCIES = [weight / sum(WEIGHTS) for weight in WEIGHTS]  # from 0.51 of the objects to 0.02


@cache
def make_crowds(count: int, seed: int) -> ShapeImages:
    """Draw `count` images; the same seed gives the same images."""
    generator = np.random.default_rng(seed)
    return stack_scenes([draw_scene(generator, CROWDED, FREQUENCIES) for _ in range(count)])
