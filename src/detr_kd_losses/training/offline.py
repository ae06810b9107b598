"""A teacher whose predictions were made once and saved, so that training reads a file instead of running it.

A :class:`Geometry` says how an image was flipped, cropped and padded on its way into a model. Saved predictions carry
that of the teacher; with that of the student's augmentation, boxes move to where they are now. What cannot be moved,
features of an image that is flipped or cropped, is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from detr_kd_losses._validation import validate_boxes, validate_choice
from detr_kd_losses.boxes import box_cxcywh_to_xyxy, box_xyxy_to_cxcywh
from detr_kd_losses.heads import ACTIVATIONS, Activation
from detr_kd_losses.outputs import DetectorOutput

__all__ = ["Geometry", "OfflineTeacher", "save_predictions"]


class Geometry(NamedTuple):
    """Where a point of an image is in a view of it: ``scale * point + shift`` on each axis, in fractions of either.

    Start with ``Geometry()``, the image itself, and apply what is done to it, in its order. Resizing changes no
    fraction, so it needs no entry.

    Attributes:
        scale_x: Negative where the image is flipped left to right.
        scale_y: Negative where the image is flipped top to bottom.
        shift_x: Fraction of the view.
        shift_y: Fraction of the view.

    Examples:
        Crop the left half, then mirror it:

        >>> view = Geometry().crop(0, 0, 0.5, 1).flip()
        >>> view.move(torch.tensor([[0.125, 0.5, 0.25, 0.5]])).tolist()
        [[0.75, 0.5, 0.5, 0.5]]
    """

    scale_x: float = 1.0
    scale_y: float = 1.0
    shift_x: float = 0.0
    shift_y: float = 0.0

    def flip(self) -> Geometry:
        """Mirror left and right."""
        return self._replace(scale_x=-self.scale_x, shift_x=1 - self.shift_x)

    def flip_vertically(self) -> Geometry:
        """Mirror top and bottom."""
        return self._replace(scale_y=-self.scale_y, shift_y=1 - self.shift_y)

    def crop(self, left: float, top: float, right: float, bottom: float) -> Geometry:
        """Cut out a part, given in fractions of the present view; beyond [0, 1] it pads.

        An image of 480 x 640 pixels padded at its right and bottom to 512 x 640: ``crop(0, 0, 640 / 640, 512 / 480)``.

        Raises:
            ValueError: If the part has no area.
        """
        width, height = right - left, bottom - top
        if not (width > 0 and height > 0):
            msg = f"the part must have left < right and top < bottom, got {(left, top, right, bottom)}"
            raise ValueError(msg)
        return Geometry(
            self.scale_x / width,
            self.scale_y / height,
            (self.shift_x - left) / width,
            (self.shift_y - top) / height,
        )

    def seen_from(self, other: Geometry) -> Geometry:
        """This view of an image, as a view of another view of it."""
        scale_x, scale_y = self.scale_x / other.scale_x, self.scale_y / other.scale_y
        return Geometry(
            scale_x, scale_y, self.shift_x - scale_x * other.shift_x, self.shift_y - scale_y * other.shift_y
        )

    def move(self, boxes: Tensor) -> Tensor:
        """Move boxes (..., N, 4), cxcywh in [0, 1] of the image, into the view; they may leave it."""
        validate_boxes("boxes", boxes)
        scale = boxes.new_tensor([self.scale_x, self.scale_y])
        shift = boxes.new_tensor([self.shift_x, self.shift_y])
        return torch.cat((boxes[..., :2] * scale + shift, boxes[..., 2:] * scale.abs()), dim=-1)

    def is_identity(self) -> bool:
        """Whether the view is the whole image, as it is."""
        return all(abs(a - b) < 1e-6 for a, b in zip(self, Geometry(), strict=True))


def save_predictions(
    folder: str | Path,
    image_ids: Sequence[int | str],
    output: DetectorOutput,
    *,
    geometries: Sequence[Geometry] | None = None,
    features: bool = False,
    dtype: torch.dtype | None = None,
) -> list[Path]:
    """Save what a teacher says about a batch, one file for each image.

    Args:
        folder: Made if it is missing.
        image_ids: B names or numbers that find the images again.
        output: The teacher's outputs.
        geometries: B views of the images in which the teacher has seen them. None: whole and unpadded.
        features: Whether to save features, which need far more space and serve only images that are not augmented.
        dtype: Dtype of logits, queries and features in the files, such as `torch.float16`. None: as they are. Boxes
            keep theirs.

    Returns:
        The files, in the order of `image_ids`.

    Raises:
        ValueError: If the numbers of images differ, or features are asked for and not there.

    Examples:
        >>> import tempfile
        >>> output = DetectorOutput(torch.randn(6, 2, 300, 80), torch.rand(6, 2, 300, 4))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     print([path.name for path in save_predictions(folder, [139, 285], output)])
        ['139.pt', '285.pt']
    """
    views = [Geometry()] * len(image_ids) if geometries is None else list(geometries)
    if not output.logits.shape[-3] == len(image_ids) == len(views):
        msg = (
            "`image_ids` and `geometries` must have one entry for each of the "
            f"{output.logits.shape[-3]} images of `output`, got {len(image_ids)} and {len(views)}"
        )
        raise ValueError(msg)
    if features and output.features is None:
        msg = "`output` must have features to save them, got None"
        raise ValueError(msg)
    levels = _levels(output.features) if features else None
    masks = _levels(output.padding_mask) if features else None
    paths = [_path(folder, image_id) for image_id in image_ids]
    for index, (path, view) in enumerate(zip(paths, views, strict=True)):
        content: dict[str, Any] = {
            "geometry": tuple(view),
            "logits": _stored(output.logits[..., index, :, :], dtype),
            "boxes": _stored(output.boxes[..., index, :, :], None),
            "queries": None if output.queries is None else _stored(output.queries[..., index, :, :], dtype),
            "features": None if levels is None else [_stored(level[index], dtype) for level in levels],
            "padding_mask": None if masks is None else [_stored(mask[index], None) for mask in masks],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, path)
    return paths


class OfflineTeacher:
    """Reads predictions of :func:`save_predictions`, in a data loader or in the training loop.

    Queries whose box of the last layer has its centre outside the view are dropped, the rest of a box that leaves it
    is cut off. All images of a batch keep the same number of queries: that of the image with the fewest, the most
    confident first.

    Args:
        folder: The folder of the predictions.
        activation: Head of the teacher, which says how confident it is: ``"sigmoid"``, or ``"softmax"`` with "no
            object" as its last channel.
        features: Whether to load the features.

    Examples:
        >>> import tempfile
        >>> output = DetectorOutput(torch.randn(6, 2, 300, 80), torch.full((6, 2, 300, 4), 0.25))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     files = save_predictions(folder, [139, 285], output)
        ...     teacher = OfflineTeacher(folder)([139, 285], [Geometry().flip(), Geometry()])
        >>> teacher.boxes[-1, :, 0, 0].tolist()
        [0.75, 0.25]
    """

    def __init__(self, folder: str | Path, *, activation: Activation = "sigmoid", features: bool = False) -> None:
        validate_choice("activation", activation, ACTIVATIONS)
        self.folder = Path(folder)
        self.activation = activation
        self.features = features

    def __call__(self, image_ids: Sequence[int | str], geometries: Sequence[Geometry] | None = None) -> DetectorOutput:
        """Load the predictions for a batch, as if the teacher had seen the student's views.

        Args:
            image_ids: B names or numbers, as they were saved.
            geometries: B views of the images that the student sees. None: whole and unpadded.

        Returns:
            The outputs, with a batch dimension, on the CPU.

        Raises:
            FileNotFoundError: If an image has no predictions.
            ValueError: If the numbers differ, or features are wanted that are not there or cannot be moved.
        """
        views = [Geometry()] * len(image_ids) if geometries is None else list(geometries)
        if len(views) != len(image_ids) or not views:
            msg = f"`geometries` must have one entry for each image, at least 1, got {len(views)} and {len(image_ids)}"
            raise ValueError(msg)
        images = [self._load(image_id, view) for image_id, view in zip(image_ids, views, strict=True)]
        kept = min(int(image["inside"].sum()) for image in images)
        for image in images:
            if kept < len(image["inside"]):
                confidence = _confidence(image["logits"], self.activation).masked_fill(~image["inside"], -torch.inf)
                best = confidence.topk(kept).indices
                for name in ("logits", "boxes", "queries"):
                    image[name] = None if image[name] is None else image[name][..., best, :]
        return DetectorOutput(
            logits=_stack(images, "logits"),
            boxes=_stack(images, "boxes"),
            queries=_stack(images, "queries") if images[0]["queries"] is not None else None,
            features=_stack_levels(images, "features") if self.features else None,
            padding_mask=_stack_levels(images, "padding_mask") if self.features else None,
        )

    def _load(self, image_id: int | str, view: Geometry) -> dict[str, Any]:
        """Predictions for one image, their boxes in the student's view."""
        path = _path(self.folder, image_id)
        if not path.exists():
            msg = f"there are no predictions for image {image_id!r} in {self.folder}: make them with save_predictions"
            raise FileNotFoundError(msg)
        content: dict[str, Any] = torch.load(path, weights_only=True)
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
    """A copy of its own, so that no file holds the batch."""
    return tensor.detach().to(device="cpu", dtype=dtype, copy=True).contiguous()


def _stack(images: list[dict[str, Any]], name: str) -> Tensor:
    return torch.stack([image[name] for image in images], dim=-3)


def _stack_levels(images: list[dict[str, Any]], name: str) -> list[Tensor] | None:
    if images[0][name] is None:
        return None
    return [torch.stack(level) for level in zip(*(image[name] for image in images), strict=True)]
