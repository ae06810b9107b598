"""A slim teacher on disk: less of each image, many images to a file, and names that stay in the folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import detr_kd_losses as dkl
from detr_kd_losses.training.geometry import Geometry

from support.offline import QUERIES, outputs, save_singly, save_together

safetensors = pytest.importorskip("safetensors.torch", reason="files of many images need safetensors")


WAYS_OUT = ["../x", "a/../../x", "a/..", "..", ".", "", "/etc/x", "~/../x", "a//b", "a/", "./a"]
WAYS_OUT += ["..\\x", "C:\\x", "C:/x", "C:x", "a\0b", "\ud800", "x" * 300]

UNSAVED = {
    "group": dkl.Predictions(torch.rand(3, 2, 4, 4), torch.rand(3, 2, 4, 4)),
    "query_mask": torch.ones(2, 6, dtype=torch.bool),
    "distributions": dkl.BoxDistributions(torch.rand(3, 2, 6, 20), torch.rand(3, 2, 6, 4), torch.arange(5.0), 4.0),
    "masks": torch.rand(3, 2, 6, 8, 8),
}

both_ways = pytest.mark.parametrize("save", [save_singly, save_together])


@both_ways
class TestOptions:
    """What is kept of an image, in either kind of file."""

    def test_all(self, save, tmp_path):
        output, view = outputs(), Geometry().flip().crop(0, 0, 1.2, 1)
        save(tmp_path, ["a", "folder/b"], output, features=True, geometries=[view, Geometry()], activation="sigmoid")
        loaded = dkl.OfflineTeacher(tmp_path, features=True)(["folder/b", "a"], [Geometry(), view])
        for name in ("logits", "boxes", "queries"):
            assert_close(getattr(loaded, name), getattr(output, name).flip(1), rtol=0, atol=0)
        for name in ("features", "padding_mask"):
            for own, level in zip(getattr(loaded, name), getattr(output, name), strict=True):
                assert_close(own, level.flip(0), rtol=0, atol=0)

    @pytest.mark.parametrize("layers", [[-1], [2], [0, -1], (1,)])
    def test_layers(self, save, tmp_path, layers):
        output = outputs()
        save(tmp_path, [0, 1], output, layers=layers)
        loaded = dkl.OfflineTeacher(tmp_path)([0, 1])
        for name in ("logits", "boxes", "queries"):
            assert_close(getattr(loaded, name), getattr(output, name)[list(layers)], rtol=0, atol=0)

    def test_without_queries(self, save, tmp_path):
        save(tmp_path, [0, 1], outputs(), queries=False)
        assert dkl.OfflineTeacher(tmp_path)([0, 1]).queries is None

    @pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
    def test_the_best_of_the_last_layer(self, save, tmp_path, activation):
        output = outputs()
        save(tmp_path, [0, 1], output, topk=2, layers=[0], activation=activation)
        loaded = dkl.OfflineTeacher(tmp_path)([0, 1])
        for image in range(2):
            scores = []
            for row in output.logits[-1, image]:
                scores.append((row.softmax(0)[:-1] if activation == "softmax" else row.sigmoid()).max().item())
            best = sorted(range(QUERIES), key=scores.__getitem__, reverse=True)[:2]
            for name in ("logits", "boxes", "queries"):
                assert_close(getattr(loaded, name)[:, image], getattr(output, name)[:1, image, best], rtol=0, atol=0)

    def test_no_more_than_there_are(self, save, tmp_path):
        save(tmp_path, [0, 1], outputs(), topk=100, activation="sigmoid")
        assert_close(dkl.OfflineTeacher(tmp_path)([0, 1]).logits, outputs().logits)

    def test_without_stages(self, save, tmp_path):
        staged = outputs()
        output = dkl.DetectorOutput(staged.logits[-1], staged.boxes[-1])
        save(tmp_path, [0, 1], output, topk=3, layers=[-1], activation="sigmoid")
        save_singly(tmp_path / "staged", [0, 1], staged, topk=3, layers=[-1], queries=False, activation="sigmoid")
        assert_close(
            dkl.OfflineTeacher(tmp_path)([0, 1]).logits, dkl.OfflineTeacher(tmp_path / "staged")([0, 1]).logits[0]
        )

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_dtype(self, save, tmp_path, dtype):
        output = outputs()
        save(tmp_path, [0, 1], output, dtype=dtype)
        loaded = dkl.OfflineTeacher(tmp_path)([0, 1])
        assert_close(loaded.logits, output.logits.to(dtype), rtol=0, atol=0)
        assert_close(loaded.boxes, output.boxes, rtol=0, atol=0)

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"layers": []}, ValueError, r"`layers` must be in \[-3, 3\), at least one, got \[\]"),
            ({"layers": [3]}, ValueError, r"`layers` must be in \[-3, 3\), at least one, got \[3\]"),
            ({"layers": -1}, TypeError, r"`layers` must be a sequence of layers, such as \[-1\], got -1"),
            ({"layers": [0.5]}, TypeError, "`layers` must be whole numbers, got 0.5"),
            ({"topk": 0, "activation": "sigmoid"}, ValueError, "`topk` must be greater than 0, got 0"),
            ({"topk": 5}, ValueError, "`activation` must be given where `topk` is"),
            ({"dtype": torch.int8}, TypeError, "`dtype` must be floating, got torch.int8"),
            ({"names": [7, "7"]}, ValueError, r"`image_ids` must be different, .* \['7'\] more than once"),
            ({"names": [7]}, ValueError, "one entry for each of the 2 images"),
            ({"output": outputs()._replace(features=None), "features": True}, ValueError, "must have features to save"),
            *(
                (
                    {"output": outputs()._replace(**{name: value})},
                    ValueError,
                    rf"`output.{name}` must be None, for it is not saved: output._replace\({name}=None\), got Detector",
                )
                for name, value in UNSAVED.items()
            ),
            (
                {"output": outputs()._replace(padding_mask=[torch.ones(2, 4, 5).bool()] * 2), "features": True},
                ValueError,
                r"`output.padding_mask` must have the sizes of `output.features` \[\(4, 5\), \(2, 3\)\], got",
            ),
        ],
    )
    def test_what_cannot_be_saved(self, save, tmp_path, options, error, message):
        with pytest.raises(error, match=message):
            save(**{"folder": tmp_path, "names": [0, 1], "output": outputs(), **options})
        assert not list(tmp_path.iterdir())


@both_ways
class TestNames:
    """Numbers in whatever form, and no way out of the folder."""

    @pytest.mark.parametrize(
        "form",
        [list, np.array, torch.tensor, lambda ids: [torch.tensor([one]) for one in ids], lambda ids: map(str, ids)],
    )
    def test_numbers(self, save, tmp_path, form):
        make = lambda ids: list(made) if isinstance(made := form(ids), map) else made  # noqa: E731
        output = outputs()
        save(tmp_path, make([139, 285]), output)
        for other in (list, torch.tensor):
            assert_close(dkl.OfflineTeacher(tmp_path)(other([285, 139])).logits, output.logits.flip(1))
        assert_close(dkl.OfflineTeacher(tmp_path)(make([285, 139])).logits, output.logits.flip(1))

    @pytest.mark.parametrize("name", WAYS_OUT)
    def test_no_way_out(self, save, tmp_path, name):
        folder = tmp_path / "inside"
        with pytest.raises(ValueError, match="`image_ids` must be"):
            save(folder, ["a", name], outputs())
        with pytest.raises(ValueError, match="`image_ids` must be"):
            dkl.OfflineTeacher(folder)([name])
        assert not list(tmp_path.rglob("*"))

    @pytest.mark.parametrize(
        "name", [True, 1.0, None, b"x", Path("x"), torch.tensor([1, 2]), torch.tensor(1.5), np.bool_(1)]
    )
    def test_what_is_no_name(self, save, tmp_path, name):
        with pytest.raises(TypeError, match="`image_ids` must be numbers or strings, got"):
            save(tmp_path, ["a", name], outputs())
        with pytest.raises(TypeError, match="`image_ids` must be numbers or strings, got"):
            dkl.OfflineTeacher(tmp_path)([name])
