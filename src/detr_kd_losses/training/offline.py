"""A teacher whose predictions were made once and saved, so that training reads a file instead of running it.

A :class:`Geometry` says how an image was flipped, cropped and padded on its way into a model. Saved predictions carry
that of the teacher; with that of the student's augmentation, boxes move to where they are now. What cannot be moved,
features of an image that is flipped or cropped, is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detr_kd_losses._validation import (
    validate_choice,
    validate_count,
    validate_predictions,
    validate_record,
    validate_same_shape,
)
from detr_kd_losses.boxes import box_cxcywh_to_xyxy, box_xyxy_to_cxcywh
from detr_kd_losses.heads import ACTIVATIONS, Activation, num_classes_of
from detr_kd_losses.outputs import DetectorOutput
from detr_kd_losses.training import _batches, _files
from detr_kd_losses.training.geometry import Geometry

__all__ = ["Geometry", "OfflineTeacher", "save_predictions"]


def save_predictions(
    folder: str | Path,
    image_ids: Sequence[int | str],
    output: DetectorOutput,
    *,
    geometries: Sequence[Geometry] | None = None,
    features: bool = False,
    dtype: torch.dtype | None = None,
    activation: Activation | None = None,
) -> list[Path]:
    """Save what a teacher says about a batch, one file for each image.

    Args:
        folder: Made if it is missing.
        image_ids: B names or numbers that find the images again.
        output: The teacher's outputs.
        geometries: B views of the images in which the teacher has seen them. None: whole and unpadded.
        features: Whether to save features, which need far more space and serve only images that are not augmented.
        dtype: Dtype of logits, queries and features in the files, such as `torch.float16`. None: as they are. Boxes
            keep theirs. A number beyond the range of `dtype` becomes its last one.
        activation: Head of the teacher, which the files then say to whoever loads them. None: they do not say it.

    Returns:
        The files, in the order of `image_ids`.

    Raises:
        ValueError: If the numbers of images differ, an image comes twice, or features are asked for and not there.
        TypeError: If `output` is no :class:`DetectorOutput`, or `dtype` is not floating.

    Examples:
        >>> import tempfile
        >>> output = DetectorOutput(torch.randn(6, 2, 300, 80), torch.rand(6, 2, 300, 4))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     print([path.name for path in save_predictions(folder, [139, 285], output)])
        ['139.pt', '285.pt']
    """
    views = [Geometry()] * len(image_ids) if geometries is None else list(geometries)
    _validate_saved(image_ids, output, views, features=features, dtype=dtype, activation=activation)
    levels = _levels(output.features) if features else None
    masks = _levels(output.padding_mask) if features else None
    paths = [_path(folder, image_id) for image_id in image_ids]
    for index, (path, view) in enumerate(zip(paths, views, strict=True)):
        content: dict[str, Any] = {
            "geometry": tuple(view),
            "activation": activation,
            "logits": _stored(output.logits[..., index, :, :], dtype),
            "boxes": _stored(output.boxes[..., index, :, :], None),
            "queries": None if output.queries is None else _stored(output.queries[..., index, :, :], dtype),
            "features": None if levels is None else [_stored(level[index], dtype) for level in levels],
            "padding_mask": None if masks is None else [_stored(mask[index], None) for mask in masks],
        }
        _files.write(path, content)
    return paths


def _validate_saved(
    image_ids: Sequence[int | str],
    output: DetectorOutput,
    views: Sequence[Geometry],
    *,
    features: bool,
    dtype: torch.dtype | None,
    activation: Activation | None,
) -> None:
    """Raise unless every image has its own predictions and its own file."""
    validate_record("output", output, DetectorOutput, "DetectorOutput(logits, boxes)")
    validate_predictions("output.", output.logits, output.boxes)
    if activation is not None:
        validate_choice("activation", activation, ACTIVATIONS)
    if dtype is not None and not dtype.is_floating_point:
        msg = f"`dtype` must be floating, got {dtype}"
        raise TypeError(msg)
    number = output.logits.shape[-3]
    if not number == len(image_ids) == len(views):
        msg = (
            "`image_ids` and `geometries` must have one entry for each of the "
            f"{number} images of `output`, got {len(image_ids)} and {len(views)}"
        )
        raise ValueError(msg)
    names = [str(image_id) for image_id in image_ids]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        msg = f"`image_ids` must be different, for each names a file, got {twice} more than once"
        raise ValueError(msg)
    if features and output.features is None:
        msg = "`output` must have features to save them, got None"
        raise ValueError(msg)
    for name in ("features", "padding_mask") if features else ():
        for level in _levels(getattr(output, name)) or []:
            validate_same_shape(f"output.{name}", level.shape[:1], "output.logits", (number,), "(B,)")


class OfflineTeacher:
    """Reads predictions of :func:`save_predictions`, in a data loader or in the training loop.

    Queries whose box of the last layer has its centre outside the view are dropped, the rest of a box that leaves it
    is cut off. All images of a batch keep the same number of queries: that of the image with the fewest, the most
    confident first.

    Args:
        folder: The folder of the predictions.
        activation: Head of the teacher, which says how confident it is: ``"sigmoid"``, or ``"softmax"`` with "no
            object" as its last channel. None: what the files say, or else ``"sigmoid"``.
        features: Whether to load the features. Where images have maps of different sizes, all get the largest, and a
            padding mask.
        num_classes: Number of classes that the predictions must have, without "no object". None: any.

    Examples:
        >>> import tempfile
        >>> output = DetectorOutput(torch.randn(6, 2, 300, 80), torch.full((6, 2, 300, 4), 0.25))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     files = save_predictions(folder, [139, 285], output)
        ...     teacher = OfflineTeacher(folder)([139, 285], [Geometry().flip(), Geometry()])
        >>> teacher.boxes[-1, :, 0, 0].tolist()
        [0.75, 0.25]
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        activation: Activation | None = None,
        features: bool = False,
        num_classes: int | None = None,
    ) -> None:
        if activation is not None:
            validate_choice("activation", activation, ACTIVATIONS)
        if num_classes is not None:
            validate_count("num_classes", num_classes)
        self.folder = Path(folder)
        self.activation = activation
        self.features = features
        self.num_classes = num_classes

    def __call__(self, image_ids: Sequence[int | str], geometries: Sequence[Geometry] | None = None) -> DetectorOutput:
        """Load the predictions for a batch, as if the teacher had seen the student's views.

        Args:
            image_ids: B names or numbers, as they were saved.
            geometries: B views of the images that the student sees. None: whole and unpadded.

        Returns:
            The outputs, with a batch dimension, on the CPU.

        Raises:
            FileNotFoundError: If an image has no predictions.
            ValueError: If the numbers differ, a file cannot be read or is of another head, number of classes or format,
                images do not go together, or features are wanted that are not there or cannot be moved.
        """
        views = [Geometry()] * len(image_ids) if geometries is None else list(geometries)
        if len(views) != len(image_ids) or not views:
            msg = f"`geometries` must have one entry for each image, at least 1, got {len(views)} and {len(image_ids)}"
            raise ValueError(msg)
        images = [self._load(image_id, view) for image_id, view in zip(image_ids, views, strict=True)]
        _batches.validate_batch(image_ids, images)
        kept = min(int(image["inside"].sum()) for image in images)
        for image in images:
            if kept < len(image["inside"]):
                confidence = _confidence(image["logits"], image["activation"] or "sigmoid").masked_fill(
                    ~image["inside"], -torch.inf
                )
                best = confidence.topk(kept).indices
                for name in ("logits", "boxes", "queries"):
                    image[name] = None if image[name] is None else image[name][..., best, :]
        return DetectorOutput(
            logits=_batches.stack(images, "logits"),
            boxes=_batches.stack(images, "boxes"),
            queries=None if images[0]["queries"] is None else _batches.stack(images, "queries"),
            features=_batches.stack_features(images) if self.features else None,
            padding_mask=_batches.stack_masks(images) if self.features else None,
        )

    def _load(self, image_id: int | str, view: Geometry) -> dict[str, Any]:
        """Predictions for one image, their boxes in the student's view."""
        path = _path(self.folder, image_id)
        content = _files.read(path, image_id)
        self._validate_metadata(path, image_id, content)
        change = view.seen_from(Geometry(*content.pop("geometry")))
        if self.features and content["features"] is None:
            msg = f"the predictions for image {image_id!r} have no features: save them with features=True"
            raise ValueError(msg)
        if self.features and not change.is_identity():
            msg = (
                f"the features of image {image_id!r} cannot be moved to a view that is flipped, cropped or padded "
                f"otherwise, got {change}; show the student the image as the teacher saw it, or set features=False"
            )
            raise ValueError(msg)
        if change.is_identity():
            content["inside"] = torch.ones(content["boxes"].shape[-2], dtype=torch.bool)
        else:
            boxes = change.move(content["boxes"])
            content["inside"] = _is_inside(boxes)
            content["boxes"] = box_xyxy_to_cxcywh(box_cxcywh_to_xyxy(boxes).clamp(0, 1))
        return content

    def _validate_metadata(self, path: Path, image_id: int | str, content: dict[str, Any]) -> None:
        """Raise if the file says that it is of another teacher; what it does not say is taken from the options."""
        said = content["activation"]
        content["activation"] = self.activation if said is None else said
        if self.activation not in (None, content["activation"]):
            msg = (
                f"the predictions for image {image_id!r} in {path} must be of a {self.activation} head, got {said}: "
                f"set activation={said!r}"
            )
            raise ValueError(msg)
        classes = num_classes_of(content["logits"], content["activation"] or "sigmoid")
        if self.num_classes not in (None, classes):
            msg = (
                f"the predictions for image {image_id!r} in {path} must have {self.num_classes} classes, "
                f"got {classes}: they are of another teacher"
            )
            raise ValueError(msg)


def _is_inside(boxes: Tensor) -> Tensor:
    """Which queries (M,) have the centre of their last box, of boxes (..., M, 4), in the view."""
    centre = boxes.flatten(0, -3)[-1, :, :2] if boxes.ndim > 2 else boxes[:, :2]
    return ((centre >= 0) & (centre <= 1)).all(-1)


def _confidence(logits: Tensor, activation: Activation) -> Tensor:
    """Score (M,) of the best class in the last layer."""
    last = (logits.flatten(0, -3)[-1] if logits.ndim > 2 else logits).float()
    scores = last.softmax(-1)[:, :-1] if activation == "softmax" else last.sigmoid()
    return scores.amax(-1)


def _path(folder: str | Path, image_id: int | str) -> Path:
    return Path(folder) / f"{image_id}.pt"


def _levels(levels: Tensor | Sequence[Tensor] | None) -> list[Tensor] | None:
    if levels is None:
        return None
    return [levels] if isinstance(levels, Tensor) else list(levels)


def _stored(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A copy of its own, so that no file holds the batch; what is finite stays finite."""
    tensor = tensor.detach()
    if dtype is not None and tensor.is_floating_point():
        limit = torch.finfo(dtype).max
        tensor = tensor.clamp(-limit, limit).where(tensor.isfinite(), tensor)
    return tensor.to(device="cpu", dtype=dtype, copy=True).contiguous()
