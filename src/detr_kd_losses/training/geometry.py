"""How an image was flipped, cropped and padded on its way into a model."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from detr_kd_losses._validation import validate_boxes

__all__ = ["Geometry"]


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
