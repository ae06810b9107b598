"""A teacher whose predictions were made once and saved, so that training reads a file instead of running it.

A :class:`Geometry` says how an image was flipped, cropped and padded on its way into a model. Saved predictions carry
that of the teacher; with that of the student's augmentation, boxes move to where they are now. What cannot be moved,
features of an image that is flipped or cropped, is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from detr_kd_losses._validation import validate_choice, validate_count
from detr_kd_losses.boxes import box_cxcywh_to_xyxy, box_xyxy_to_cxcywh
from detr_kd_losses.heads import ACTIVATIONS, Activation, nothing, num_classes_of
from detr_kd_losses.outputs import DetectorOutput
from detr_kd_losses.training import _batches, _files
from detr_kd_losses.training._contents import what_is_wrong
from detr_kd_losses.training._image_ids import ImageId, image_name, plain_id
from detr_kd_losses.training._shards import Shards
from detr_kd_losses.training.geometry import Geometry
from detr_kd_losses.training.saving import PredictionWriter, save_predictions

__all__ = ["Geometry", "OfflineTeacher", "PredictionWriter", "save_predictions"]


class OfflineTeacher:
    """Reads predictions of :func:`save_predictions` or :class:`PredictionWriter`, mostly in a data loader.

    It holds no lock, and may be pickled, so that the workers of a data loader read by themselves: call it in their
    `collate_fn`. An image that has a file of its own is read from that, else from the newest file that has it.

    Queries whose box of the last layer has its centre outside the view are dropped, the rest of a box that leaves it
    is cut off. Where images of a batch then have different numbers of queries, they are padded to the most, with
    queries that are certain of nothing and a `query_mask`, which every term honours.

    Args:
        folder: The folder of the predictions.
        activation: Head of the teacher, which says how confident it is: ``"sigmoid"``, or ``"softmax"`` with "no
            object" as its last channel. None: what the files say, or else ``"sigmoid"``.
        features: Whether to load the features. Where images have maps of different sizes, all get the largest, and a
            padding mask.
        num_classes: Number of classes that the predictions must have, without "no object". None: any.
        unequal: What becomes of images with different numbers of queries: ``"pad"``, or ``"cut"``, which leaves all
            as many as the image with the fewest has, the most confident first, and needs no mask.

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
        unequal: Literal["pad", "cut"] = "pad",
    ) -> None:
        validate_choice("unequal", unequal, ("pad", "cut"))
        if activation is not None:
            validate_choice("activation", activation, ACTIVATIONS)
        if num_classes is not None:
            validate_count("num_classes", num_classes)
        self.folder = Path(folder)
        self.activation = activation
        self.features = features
        self.num_classes = num_classes
        self.unequal = unequal
        self._shards = Shards(self.folder)

    def __call__(
        self, image_ids: Sequence[ImageId] | Tensor, geometries: Sequence[Geometry] | None = None
    ) -> DetectorOutput:
        """Load the predictions for a batch, as if the teacher had seen the student's views.

        Args:
            image_ids: B names or numbers, as they were saved; tensors of one number, too.
            geometries: B views of the images that the student sees. None: whole and unpadded.

        Returns:
            The outputs, with a batch dimension, on the CPU.

        Raises:
            FileNotFoundError: If an image has no predictions.
            ValueError: If the numbers differ, a file cannot be read or is of another head, number of classes or format,
                images do not go together, or features are wanted that are not there or cannot be moved.
        """
        names = [plain_id(image_id) for image_id in image_ids]
        views = [Geometry()] * len(names) if geometries is None else list(geometries)
        if len(views) != len(names) or not views:
            msg = f"`geometries` must have one entry for each image, at least 1, got {len(views)} and {len(names)}"
            raise ValueError(msg)
        images = [self._load(image_id, view) for image_id, view in zip(names, views, strict=True)]
        _batches.validate_batch(names, images)
        mask = self._make_even(images)
        return DetectorOutput(
            logits=_batches.stack(images, "logits"),
            boxes=_batches.stack(images, "boxes"),
            queries=None if images[0]["queries"] is None else _batches.stack(images, "queries"),
            features=_batches.stack_features(images) if self.features else None,
            padding_mask=_batches.stack_masks(images) if self.features else None,
            query_mask=mask,
        )

    def _make_even(self, images: list[dict[str, Any]]) -> Tensor | None:
        """Give all images the same number of queries; the mask (B, M) of those that are none, if there are some."""
        numbers = [int(image["inside"].sum()) for image in images]
        fewest, most = min(numbers), max(numbers)
        for image, number in zip(images, numbers, strict=True):
            head: Activation = image["activation"] or "sigmoid"
            if self.unequal == "cut" and fewest < len(image["inside"]):
                confidence = _confidence(image["logits"], head).masked_fill(~image["inside"], -torch.inf)
                _batches.select(image, confidence.topk(fewest).indices)
            elif self.unequal == "pad":
                if number < len(image["inside"]):
                    _batches.select(image, image["inside"].nonzero().squeeze(-1))
                _batches.pad(image, most, nothing(image["logits"], head))
        if self.unequal == "cut" or fewest == most:
            return None
        return torch.arange(most) < torch.tensor(numbers).unsqueeze(-1)

    def _load(self, image_id: int | str, view: Geometry) -> dict[str, Any]:
        """Predictions for one image, their boxes in the student's view."""
        path, content = self._find(image_id)
        reason = what_is_wrong(content)
        if reason is not None:
            msg = f"the predictions for image {image_id!r} in {path} do not belong together: {reason}; save them again"
            raise ValueError(msg)
        content["path"] = path
        self._validate_metadata(path, image_id, content)
        change = view.seen_from(Geometry(*content.pop("geometry")))
        if self.features and content["features"] is None:
            msg = f"the predictions for image {image_id!r} have no features: save them with features=True ({path})"
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

    def _find(self, image_id: int | str) -> tuple[Path, dict[str, Any]]:
        """The file of an image, and its content."""
        name = image_name(image_id)
        path = self.folder / f"{name}.pt"
        if path.exists():
            return path, _files.read(path, image_id)
        found = self._shards.find(name, image_id)
        if found is None:
            msg = f"there are no predictions for image {image_id!r} in {self.folder}: make them with save_predictions"
            raise FileNotFoundError(msg)
        return found

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
