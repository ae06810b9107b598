"""What everyone learns from: images, labels as an annotator left them, and the teachers trained on these."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
from runs import STUDENT, TEACHER
from shapes import CLASSES, ShapeImages, make_shapes
from torch import Tensor

import detr_kd_losses as dkl
from experiments.crowds import make_crowds
from experiments.digits import NUM_CLASSES, make_digits


class DataSet(NamedTuple):
    """Images by number and seed, and their classes."""

    draw: Callable[[int, int], ShapeImages]
    num_classes: int


class LabelNoise(NamedTuple):
    """How labels differ from the truth: in parts of a box's size (standard deviations), and of the objects."""

    shift: float = 0.0
    resize: float = 0.0
    missing: float = 0.0


class Recipe(NamedTuple):
    """How a teacher is trained."""

    model: dict[str, Any]
    steps: int
    seed: int = 0


class World(NamedTuple):
    """The training images, the labels that teacher and student alike get to see, and the teachers."""

    images: int
    teachers: Mapping[str, Recipe]
    data_set: str = "shapes"
    noise: LabelNoise = LabelNoise()
    labelled: int | None = None  # the first so many images have labels; None: all
    student: Mapping[str, Any] = STUDENT
    family: str = ""  # of transformers' models; none: the small detector


DATA_SETS = {
    "shapes": DataSet(make_shapes, len(CLASSES)),
    "digits": DataSet(make_digits, NUM_CLASSES),
    "crowds": DataSet(make_crowds, len(CLASSES)),
}

TEACHERS = {"teacher": Recipe(TEACHER, steps=3000)}
DEMO_TEACHERS = {
    "teacher": Recipe(TEACHER, steps=1000),
    "barely better": Recipe(STUDENT, steps=700, seed=100),
    "a student": Recipe(STUDENT, steps=600, seed=100),
}
MODERN_TEACHERS = {"teacher": Recipe({"width": 64, "layers": 3, "queries": 48, "backbone": [32, 64, 128]}, steps=3000)}
MODERN_STUDENT = {"width": 64, "layers": 2, "queries": 16, "backbone": [16, 32, 64]}
WORLDS = {
    "demo": World(4000, DEMO_TEACHERS),
    "shapes": World(6000, TEACHERS),
    "shapes, jittered": World(6000, TEACHERS, noise=LabelNoise(shift=0.08, resize=0.1)),
    "shapes, gaps": World(6000, TEACHERS, noise=LabelNoise(missing=0.2)),
    "shapes, jittered, gaps": World(6000, TEACHERS, noise=LabelNoise(shift=0.08, resize=0.1, missing=0.2)),
    "shapes, few labels": World(6000, TEACHERS, labelled=1500),
    "digits": World(6000, TEACHERS, data_set="digits"),
    "crowds": World(6000, TEACHERS, data_set="crowds"),
    # Models that train with denoising queries.
    **{family: World(4000, MODERN_TEACHERS, student=MODERN_STUDENT, family=family) for family in ("RT-DETR", "D-FINE")},
    # The same teacher of other students, as in the paper's Table 1.
    "demo, 48 queries": World(4000, DEMO_TEACHERS, student={**STUDENT, "num_queries": 48}),
    "demo, 8 queries": World(4000, DEMO_TEACHERS, student={**STUDENT, "num_queries": 8}),
    "demo, 1 decoder layer": World(4000, DEMO_TEACHERS, student={**STUDENT, "decoder_layers": 1}),
    "demo, half a backbone": World(4000, DEMO_TEACHERS, student={**STUDENT, "backbone_width": 4}),
}
VALIDATION, TEST = (500, 1), (1000, 2)  # images, seed: the second chooses nothing


def training_images(world: str) -> ShapeImages:
    """Return the images that have labels, with these."""
    images = all_images(world)
    return images.select(torch.arange(WORLDS[world].labelled or len(images)))


@cache
def all_images(world: str) -> ShapeImages:
    """Return all training images, with labels as an annotator left them and none where nobody looked."""
    recipe = WORLDS[world]
    drawn = DATA_SETS[recipe.data_set].draw(recipe.images, 0)
    targets = with_noise(drawn.targets, recipe.noise, seed=0)
    seen = torch.arange(recipe.images) < (recipe.labelled or recipe.images)
    return ShapeImages(drawn.images, dkl.Targets(targets.labels, targets.boxes, targets.mask & seen[:, None]))


def held_out_images(world: str, part: tuple[int, int]) -> ShapeImages:
    """Return images that nobody learns from, with exact labels."""
    return DATA_SETS[WORLDS[world].data_set].draw(*part)


def with_noise(targets: dkl.Targets, noise: LabelNoise, seed: int) -> dkl.Targets:
    """Move the boxes, resize them and leave some out, the same ones for each seed."""
    generator = torch.Generator().manual_seed(seed)
    centre, extent = targets.boxes.split(2, -1)

    def normal() -> Tensor:
        return torch.randn(centre.shape, generator=generator)

    centre = centre + noise.shift * extent * normal()
    extent = extent * (noise.resize * normal()).exp()
    low, high = (centre - extent / 2).clamp(0, 1), (centre + extent / 2).clamp(0, 1)  # within the image
    boxes = torch.cat([(low + high) / 2, high - low], -1)
    kept = torch.rand(targets.mask.shape, generator=generator) >= noise.missing
    return dkl.Targets(targets.labels, torch.where(targets.mask[..., None], boxes, 0.0), targets.mask & kept)
