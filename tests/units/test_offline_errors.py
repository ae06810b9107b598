"""The offline teacher: what cannot be done is refused, by image and file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

import detr_kd_losses as dkl
from detr_kd_losses.training.geometry import Geometry
from detr_kd_losses.training.offline import OfflineTeacher, save_predictions

from support.offline import CLASSES, at, outputs


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
        assert_close(OfflineTeacher(tmp_path, unequal="cut")([0, 1], views).logits[:, 0], logits[:, 0, 1:])

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
