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
from detr_kd_losses.training.geometry import Geometry
from detr_kd_losses.training.offline import OfflineTeacher, save_predictions

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

    @pytest.mark.parametrize("left", [0, 10, 0.5, 0.99])
    def test_damaged_file(self, tmp_path: Path, left: float) -> None:
        path = save_predictions(tmp_path, [139, 285], outputs())[1]
        data = path.read_bytes()
        path.write_bytes(data[: int(left * len(data)) if isinstance(left, float) else left])
        with pytest.raises(ValueError, match=r"image 285 cannot be read: .*285\.pt is damaged .* save_predictions"):
            OfflineTeacher(tmp_path)([139, 285])

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ({"logits": torch.zeros(1)}, "must have format 1, got no format: save them again"),
            ([1, 2], "must have format 1, got no format"),
            ({"format": 2}, "must have format 1, got format 2"),
            ({"format": 1, "logits": torch.zeros(1)}, r"lack \['geometry', 'activation', 'boxes'"),
        ],
    )
    def test_other_format(self, tmp_path: Path, content: object, message: str) -> None:
        torch.save(content, tmp_path / "5.pt")
        with pytest.raises(ValueError, match=f"predictions for image 5 in .*5.pt {message}"):
            OfflineTeacher(tmp_path)([5])

    def test_a_job_that_is_killed_leaves_the_file_as_it_was(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        save_predictions(tmp_path, [0, 1], outputs())

        def half(content: object, path: Path) -> None:
            path.write_bytes(b"half of a file")
            raise KeyboardInterrupt

        monkeypatch.setattr(torch, "save", half)
        with pytest.raises(KeyboardInterrupt):
            save_predictions(tmp_path, [0, 1], outputs(1))
        assert sorted(path.name for path in tmp_path.iterdir()) == ["0.pt", "1.pt"]
        assert_close(OfflineTeacher(tmp_path)([0, 1]).logits, outputs().logits)

    def test_another_head(self, tmp_path: Path) -> None:
        save_predictions(tmp_path, [0, 1], outputs(), activation="softmax")
        assert OfflineTeacher(tmp_path)([0, 1]).logits.shape[-1] == CLASSES
        with pytest.raises(
            ValueError, match=r"image 0 .* must be of a sigmoid head, got softmax: set activation='soft"
        ):
            OfflineTeacher(tmp_path, activation="sigmoid")([0, 1])

    def test_the_head_that_the_files_say_is_used(self, tmp_path: Path) -> None:
        """The last channel of a softmax head is no confidence."""
        output = at([0.2, 0.5, 0.1, 0.1], [0.8, 0.5, 0.1, 0.1])
        logits = torch.tensor([[[[0.0, 0.0, 9.0], [5.0, 0.0, 0.0]]]])
        for name in (0, 1):
            save_predictions(tmp_path, [name], output._replace(logits=logits), activation="softmax")
        views = [Geometry(), Geometry().crop(0.5, 0, 1, 1)]
        assert_close(OfflineTeacher(tmp_path)([0, 1], views).logits[:, 0], logits[:, 0, 1:])

    @pytest.mark.parametrize(
        ("activation", "classes"), [("sigmoid", CLASSES), ("softmax", CLASSES - 1), (None, CLASSES)]
    )
    def test_number_of_classes(self, tmp_path: Path, activation: Any, classes: int) -> None:
        save_predictions(tmp_path, [0, 1], outputs(), activation=activation)
        OfflineTeacher(tmp_path, num_classes=classes)([0, 1])
        with pytest.raises(ValueError, match=rf"image 0 .* must have 91 classes, got {classes}"):
            OfflineTeacher(tmp_path, num_classes=91)([0, 1])

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda o: o._replace(queries=None), r"image 'b' must have the `queries` .* of image 'a' .* got None"),
            (lambda o: o._replace(queries=o.queries[..., :5]), r"image 'b' must have the `queries`"),
            (lambda o: o._replace(logits=o.logits[..., :3]), r"image 'b' .* `logits` .* \(3, 4\), got \(3, 3\)"),
            (lambda o: o._replace(logits=o.logits[:2], boxes=o.boxes[:2]), r"image 'b' must have the `logits`"),
            (lambda o: o._replace(features=o.features[:1], padding_mask=None), r"image 'b' must have the `features`"),
        ],
    )
    def test_predictions_of_another_teacher(self, tmp_path: Path, change: Any, message: str) -> None:
        first, second = outputs(), change(outputs(1))

        def one(output: dkl.DetectorOutput) -> dkl.DetectorOutput:
            fields = (None if x is None else [y[:1] for y in x] if isinstance(x, list) else x[:, :1] for x in output)
            return dkl.DetectorOutput(*fields)

        save_predictions(tmp_path, ["a"], one(first), features=True)
        save_predictions(tmp_path, ["b"], one(second), features=True)
        for names in (["a", "b"], ["a", "a", "b"]):
            with pytest.raises(ValueError, match=message):
                OfflineTeacher(tmp_path, features=True)(names)

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"image_ids": [7, "7"]}, ValueError, r"`image_ids` must be different, .* \['7'\] more than once"),
            ({"dtype": torch.int8}, TypeError, "`dtype` must be floating, got torch.int8"),
            ({"activation": "relu"}, ValueError, "`activation` must be one of 'sigmoid', 'softmax', got 'relu'"),
            ({"output": {"logits": 1}}, TypeError, "`output` must be a DetectorOutput, got dict"),
            (
                {"output": outputs()._replace(features=torch.rand(3, 8, 2, 2)), "features": True},
                ValueError,
                r"`output.features` and `output.logits` must have the same dimensions \(B,\), got \(3,\) and \(2,\)",
            ),
        ],
    )
    def test_what_cannot_be_saved(self, tmp_path: Path, options: Any, error: type, message: str) -> None:
        with pytest.raises(error, match=message):
            save_predictions(**{"folder": tmp_path, "image_ids": [0, 1], "output": outputs(), **options})


class TestMixedBatches:
    """Neither the first nor the worst image decides for the others."""

    def save(self, folder: Path, name: str, seed: int, **options: Any) -> dkl.DetectorOutput:
        whole = outputs(seed)
        output = dkl.DetectorOutput(whole.logits[:, :1], whole.boxes[:, :1], whole.queries[:, :1], **options)
        save_predictions(folder, [name], output, features="features" in options)
        return output

    def test_maps_of_other_sizes_are_padded(self, tmp_path: Path) -> None:
        wide, high = torch.rand(1, CHANNELS, 2, 5), torch.rand(1, CHANNELS, 4, 3)
        inside = torch.rand(1, 4, 3) > 0.5
        self.save(tmp_path, "wide", 0, features=wide)
        self.save(tmp_path, "high", 1, features=high, padding_mask=inside)
        for names in (["wide", "high"], ["high", "wide"]):
            loaded = OfflineTeacher(tmp_path, features=True)(names)
            (features,), (mask,) = loaded.features, loaded.padding_mask
            a, b = names.index("wide"), names.index("high")
            assert features.shape == (2, CHANNELS, 4, 5)
            assert_close(features[a, :, :2], wide[0], rtol=0, atol=0)
            assert_close(features[b, :, :, :3], high[0], rtol=0, atol=0)
            assert mask[a].tolist() == [[True] * 5] * 2 + [[False] * 5] * 2
            assert_close(mask[b, :, :3], inside[0])
            assert not mask[b, :, 3:].any()

    @pytest.mark.parametrize("names", [["a", "b"], ["b", "a"]])
    def test_a_mask_of_one_image(self, tmp_path: Path, names: list[str]) -> None:
        features, inside = torch.rand(1, CHANNELS, 4, 3), torch.rand(1, 4, 3) > 0.5
        self.save(tmp_path, "a", 0, features=features)
        self.save(tmp_path, "b", 1, features=features, padding_mask=inside)
        (mask,) = OfflineTeacher(tmp_path, features=True)(names).padding_mask
        assert mask[names.index("a")].all()
        assert_close(mask[names.index("b")], inside[0])

    @pytest.mark.parametrize("names", [["a", "b"], ["b", "a"]])
    def test_the_widest_dtype(self, tmp_path: Path, names: list[str]) -> None:
        whole = outputs()
        for name, dtype in (("a", torch.float16), ("b", None)):
            output = dkl.DetectorOutput(whole.logits[:, :1], whole.boxes[:, :1], features=whole.features[0][:1])
            save_predictions(tmp_path, [name], output, dtype=dtype, features=True)
        loaded = OfflineTeacher(tmp_path, features=True)(names)
        assert loaded.logits.dtype == loaded.features[0].dtype == torch.float32
        assert_close(loaded.logits[:, names.index("b")], whole.logits[:, 0], rtol=0, atol=0)

    def test_numbers_beyond_the_dtype_stay_finite(self, tmp_path: Path) -> None:
        """A logit of -1e9, as masks of classes write it, would be infinite in half precision."""
        output = at([0.5, 0.5, 0.1, 0.1], [0.6, 0.5, 0.1, 0.1], score=[-1e9, float("-inf")])
        save_predictions(tmp_path, [0], output, dtype=torch.float16)
        assert OfflineTeacher(tmp_path)([0]).logits.flatten().tolist() == [-65504.0, float("-inf")]
