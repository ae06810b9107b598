"""Views of images, against the pixels of a small one and by their laws."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

import detr_kd_losses as dkl
from detr_kd_losses.training.geometry import Geometry

from support.offline import CLOSE, outputs, views


class TestGeometry:
    """Views, against the pixels of a small image."""

    def test_boxes_follow_the_pixels(self) -> None:
        image = torch.zeros(40, 60)
        image[8:16, 30:48] = 1  # cxcywh (0.65, 0.3, 0.3, 0.2)
        box = torch.tensor([[39 / 60, 12 / 40, 18 / 60, 8 / 40]])
        views = [
            (Geometry().flip(), image.flip(1)),
            (Geometry().flip_vertically(), image.flip(0)),
            (Geometry().crop(0.25, 0.1, 1, 0.9), image[4:36, 15:]),
            (Geometry().crop(0, 0, 1.5, 2), torch.nn.functional.pad(image, (0, 30, 0, 40))),
            (Geometry().crop(0.25, 0.1, 1, 0.9).flip(), image[4:36, 15:].flip(1)),
            (Geometry().flip().crop(0.1, 0.1, 0.9, 0.9), image.flip(1)[4:36, 6:54]),
        ]
        for view, pixels in views:
            rows, columns = pixels.nonzero(as_tuple=True)
            height, width = pixels.shape
            corners = torch.tensor(
                [columns.min() / width, rows.min() / height, (columns.max() + 1) / width, (rows.max() + 1) / height]
            )
            assert_close(dkl.box_cxcywh_to_xyxy(view.move(box))[0], corners, **CLOSE)

    @given(view=views, seed=st.integers(0, 99))
    def test_flipping_twice_changes_nothing(self, view: Geometry, seed: int) -> None:
        boxes = outputs(seed).boxes
        for twice in (view.flip().flip(), view.flip_vertically().flip_vertically()):
            assert_close(twice.move(boxes), view.move(boxes), **CLOSE)

    @given(first=views, second=views, seed=st.integers(0, 99))
    def test_views_of_views(self, first: Geometry, second: Geometry, seed: int) -> None:
        boxes = outputs(seed).boxes.double()
        assert_close(second.seen_from(first).move(first.move(boxes)), second.move(boxes), **CLOSE)
        assert first.seen_from(first).is_identity()

    def test_identity(self) -> None:
        assert Geometry().is_identity()
        assert Geometry().crop(0, 0, 1, 1).flip().flip().is_identity()
        assert not Geometry().flip().is_identity()
        assert not Geometry().crop(0, 0, 1, 0.99).is_identity()

    @pytest.mark.parametrize("part", [(0.5, 0, 0.5, 1), (0, 0.6, 1, 0.5), (0, 0, float("nan"), 1)])
    def test_part_without_area(self, part: tuple[float, ...]) -> None:
        with pytest.raises(ValueError, match="left < right and top < bottom"):
            Geometry().crop(*part)
