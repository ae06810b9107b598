"""The offline teacher: what comes back is what the teacher said, where it is now."""

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

from support.offline import BATCH, CLASSES, CLOSE, LAYERS, at, outputs, views


def through_files(folder: Path, output: dkl.DetectorOutput, *views: Geometry, **options: Any) -> dkl.DetectorOutput:
    """Save, and load for views of the student."""
    names = list(range(output.logits.shape[-3]))
    save_predictions(folder, names, output)
    return OfflineTeacher(folder, **options)(names, list(views))


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
        loaded = through_files(tmp_path, output, view, Geometry(), activation=activation, unequal="cut")
        assert loaded.query_mask is None
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
