"""The offline teacher: what comes back is what the teacher said, where it is now, or an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

import detr_kd_losses as dkl
from detr_kd_losses.training.offline import Geometry, OfflineTeacher, save_predictions

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


def through_files(folder: Path, output: dkl.DetectorOutput, *views: Geometry, **options: Any) -> dkl.DetectorOutput:
    """Save, and load for views of the student."""
    names = list(range(output.logits.shape[-3]))
    save_predictions(folder, names, output)
    return OfflineTeacher(folder, **options)(names, list(views))


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


class TestRoundTrip:
    """Saved and loaded for the view in which the teacher has seen the image."""

    @pytest.mark.parametrize("view", [Geometry(), Geometry().flip().crop(0, 0, 1.2, 1)])
    def test_is_exact(self, tmp_path: Path, view: Geometry) -> None:
        output = outputs()
        output.boxes[0, 0, 0] = torch.tensor([0.01, 0.5, 0.5, 0.5])  # sticks out, as predictions do
        save_predictions(tmp_path, ["a", "folder/b"], output, geometries=[view, view], features=True)
        loaded = OfflineTeacher(tmp_path, features=True)(["a", "folder/b"], [view, view])
        for name in ("logits", "boxes", "queries", "features", "padding_mask"):
            assert_close(getattr(loaded, name), getattr(output, name), rtol=0, atol=0)

    def test_order_is_that_of_the_request(self, tmp_path: Path) -> None:
        output = outputs()
        save_predictions(tmp_path, [7, 9], output)
        loaded = OfflineTeacher(tmp_path)([9, 7, 9])
        assert_close(loaded.logits, output.logits[:, [1, 0, 1]])

    def test_without_stages_and_single_map(self, tmp_path: Path) -> None:
        staged = outputs()
        output = dkl.DetectorOutput(staged.logits[0], staged.boxes[0], features=staged.features[0])
        save_predictions(tmp_path, [0, 1], output, features=True)
        loaded = OfflineTeacher(tmp_path, features=True)([0, 1])
        assert_close(loaded.logits, output.logits)
        assert_close(loaded.features, [output.features])
        assert loaded.queries is None
        assert loaded.padding_mask is None

    def test_half_precision_leaves_boxes_exact(self, tmp_path: Path) -> None:
        output = outputs()
        save_predictions(tmp_path, [0, 1], output, dtype=torch.float16)
        loaded = OfflineTeacher(tmp_path)([0, 1])
        assert loaded.logits.dtype == loaded.queries.dtype == torch.float16
        assert_close(loaded.boxes, output.boxes, rtol=0, atol=0)
        assert loaded.features is None

    def test_a_file_holds_one_image(self, tmp_path: Path) -> None:
        output = dkl.DetectorOutput(torch.rand(8, 500, 4), torch.rand(8, 500, 4), features=torch.rand(8, 16, 20, 20))
        path = save_predictions(tmp_path, range(8), output, features=True)[0]
        one_image = 4 * (2 * 500 * 4 + 16 * 20 * 20)
        assert one_image < path.stat().st_size < 1.2 * one_image

    def test_it_teaches(self, tmp_path: Path) -> None:
        output, student = outputs(), outputs(1)._replace(logits=outputs(1).logits.requires_grad_())
        save_predictions(tmp_path, [0, 1], output, features=True)
        targets = dkl.Targets(torch.tensor([[1], [2]]), output.boxes[-1, :, :1], torch.tensor([[True], [True]]))
        loss, loaded = dkl.DETRDistillationLoss(), OfflineTeacher(tmp_path, features=True)([0, 1])
        assert_close(loss(student, loaded, targets), loss(student, output, targets))


class TestViews:
    """Loaded for a view of the student."""

    @given(seed=st.integers(0, 99))
    def test_flip_moves_every_box(self, seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
        output = outputs(seed)
        loaded = through_files(tmp_path_factory.mktemp("flip"), output, Geometry().flip(), Geometry())
        assert_close(loaded.boxes[:, 0, :, 0], 1 - output.boxes[:, 0, :, 0], **CLOSE)
        assert_close(loaded.boxes[:, 0, :, 1:], output.boxes[:, 0, :, 1:], **CLOSE)
        assert_close(loaded.boxes[:, 1], output.boxes[:, 1], rtol=0, atol=0)
        assert_close(loaded.logits, output.logits, rtol=0, atol=0)

    def test_teachers_own_flip_is_undone(self, tmp_path: Path) -> None:
        output = outputs()
        save_predictions(tmp_path, [0, 1], output, geometries=[Geometry().flip()] * 2)
        loaded = OfflineTeacher(tmp_path)([0, 1])
        assert_close(loaded.boxes[..., 0], 1 - output.boxes[..., 0], **CLOSE)

    def test_crop_drops_what_is_outside_and_cuts_what_sticks_out(self, tmp_path: Path) -> None:
        output = at([0.25, 0.5, 0.1, 0.2], [0.45, 0.5, 0.2, 0.2], [0.75, 0.5, 0.1, 0.2])
        loaded = through_files(tmp_path, output, Geometry().crop(0, 0, 0.5, 1))
        kept = {tuple(round(x, 4) for x in box) for box in loaded.boxes[0, 0].tolist()}
        assert kept == {(0.5, 0.5, 0.2, 0.2), (0.85, 0.5, 0.3, 0.2)}

    @pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
    def test_batch_keeps_the_most_confident(self, tmp_path: Path, activation: str) -> None:
        output = outputs()
        output.boxes[-1, 0, :4, 0] = 0.9  # four of six queries leave the first image
        view = Geometry().crop(0, 0, 0.8, 1)
        loaded = through_files(tmp_path, output, view, Geometry(), activation=activation)
        assert loaded.logits.shape == (LAYERS, BATCH, 2, CLASSES)
        last = output.logits[-1, 1]
        confidence = last.sigmoid() if activation == "sigmoid" else last.softmax(-1)[:, :-1]
        best = confidence.amax(-1).topk(2).indices
        for name in ("logits", "boxes", "queries"):
            assert_close(getattr(loaded, name)[:, 1], getattr(output, name)[:, 1, best])
        assert set(loaded.logits[-1, 0, :, 0].tolist()) == set(output.logits[-1, 0, 4:, 0].tolist())

    def test_nothing_left(self, tmp_path: Path) -> None:
        loaded = through_files(tmp_path, at([0.2, 0.5, 0.1, 0.1]), Geometry().crop(0.5, 0, 1, 1))
        assert loaded.boxes.shape == (1, 1, 0, 4)

    @given(view=views)
    def test_boxes_stay_in_the_view(self, view: Geometry, tmp_path_factory: pytest.TempPathFactory) -> None:
        loaded = through_files(tmp_path_factory.mktemp("view"), outputs(), view, Geometry())
        corners = dkl.box_cxcywh_to_xyxy(loaded.boxes)
        assert ((corners >= -1e-5) & (corners <= 1 + 1e-5)).all()


class TestErrors:
    """What cannot be done is refused."""

    @pytest.mark.parametrize("view", [Geometry().flip(), Geometry().flip_vertically(), Geometry().crop(0, 0, 0.9, 1)])
    def test_features_of_another_view(self, tmp_path: Path, view: Geometry) -> None:
        save_predictions(tmp_path, [0, 1], outputs(), features=True)
        with pytest.raises(ValueError, match=r"features of image 1 cannot be moved .* set features=False"):
            OfflineTeacher(tmp_path, features=True)([0, 1], [Geometry(), view])
        assert OfflineTeacher(tmp_path)([0, 1], [Geometry(), view]).features is None

    def test_features_that_were_not_saved(self, tmp_path: Path) -> None:
        save_predictions(tmp_path, [0, 1], outputs())
        with pytest.raises(ValueError, match=r"image 0 have no features: save them with features=True"):
            OfflineTeacher(tmp_path, features=True)([0, 1])

    def test_features_that_are_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="`output` must have features to save them"):
            save_predictions(tmp_path, [0, 1], outputs()._replace(features=None), features=True)

    def test_unknown_image(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"no predictions for image 5 .* save_predictions"):
            OfflineTeacher(tmp_path)([5])

    @pytest.mark.parametrize(("names", "views"), [([0], None), ([0, 1], [Geometry()])])
    def test_numbers_that_differ(self, tmp_path: Path, names: list[int], views: Any) -> None:
        with pytest.raises(ValueError, match="one entry for each of the 2 images"):
            save_predictions(tmp_path, names, outputs(), geometries=views)

    @pytest.mark.parametrize(("names", "views"), [([], None), ([0, 1], [Geometry()])])
    def test_numbers_that_differ_when_loading(self, tmp_path: Path, names: list[int], views: Any) -> None:
        with pytest.raises(ValueError, match="`geometries` must have one entry for each image, at least 1"):
            OfflineTeacher(tmp_path)(names, views)

    def test_unknown_activation(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="`activation` must be one of 'sigmoid', 'softmax', got 'relu'"):
            OfflineTeacher(tmp_path, activation="relu")
