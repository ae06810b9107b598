"""Outputs of a teacher that are saved and loaded again, and views of images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st

import detr_kd_losses as dkl
from detr_kd_losses.training.geometry import Geometry

CLOSE = {"rtol": 0, "atol": 1e-5}
LAYERS, BATCH, QUERIES, CLASSES, CHANNELS = 3, 2, 6, 4, 8


def build(steps: list[Any]) -> Geometry:
    view = Geometry()
    for taken in steps:
        view = getattr(view, taken)() if isinstance(taken, str) else view.crop(*taken)
    return view


part = st.tuples(st.floats(-0.5, 0.4), st.floats(-0.5, 0.4), st.floats(0.6, 1.5), st.floats(0.6, 1.5))
step = st.one_of(st.just("flip"), st.just("flip_vertically"), part)
views = st.lists(step, max_size=4).map(build)


def outputs(seed: int = 0, *, queries: int = QUERIES) -> dkl.DetectorOutput:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.rand(*shape, generator=generator)  # noqa: E731
    return dkl.DetectorOutput(
        logits=8 * draw(LAYERS, BATCH, queries, CLASSES) - 4,
        boxes=torch.cat([0.3 + 0.4 * draw(LAYERS, BATCH, queries, 2), 0.1 * draw(LAYERS, BATCH, queries, 2)], -1),
        queries=draw(LAYERS, BATCH, queries, CHANNELS),
        features=[draw(BATCH, CHANNELS, 4, 5), draw(BATCH, CHANNELS, 2, 3)],
        padding_mask=[draw(BATCH, 4, 5) > 0.5, draw(BATCH, 2, 3) > 0.5],
    )


def at(*boxes: list[float], score: list[float] | None = None) -> dkl.DetectorOutput:
    """One image, one layer, boxes at given places."""
    logits = torch.tensor(score or [0.0] * len(boxes))[None, None, :, None]
    return dkl.DetectorOutput(logits, torch.tensor(boxes)[None, None])


def of_one(seed: int, **changes: Any) -> dkl.DetectorOutput:
    """Predictions for one image."""
    fields = (None if x is None else [y[:1] for y in x] if isinstance(x, list) else x[:, :1] for x in outputs(seed))
    return dkl.DetectorOutput(*fields)._replace(**changes)


def save_singly(folder: Path, names: Any, output: dkl.DetectorOutput, **options: Any) -> None:
    """Save a file for each image."""
    dkl.save_predictions(folder, names, output, **options)


def save_together(folder: Path, names: Any, output: dkl.DetectorOutput, **options: Any) -> None:
    """Save a file of all images."""
    views = options.pop("geometries", None)
    with dkl.PredictionWriter(folder, **options) as writer:
        writer.add(names, output, geometries=views)
