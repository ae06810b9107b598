"""The offline teacher: images that do not look alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

import detr_kd_losses as dkl
from detr_kd_losses.training.geometry import Geometry
from detr_kd_losses.training.offline import OfflineTeacher, save_predictions

from support.offline import CHANNELS, at, outputs


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


class TestUnequalNumbers:
    """Images that keep different numbers of queries."""

    @pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
    def test_are_padded(self, tmp_path: Path, activation: Any) -> None:
        output = outputs()
        output.boxes[-1, 0, 1:5, 0] = 0.9  # four of six queries leave the first image
        save_predictions(tmp_path, [0, 1], output, activation=activation, dtype=torch.float16)
        loaded = OfflineTeacher(tmp_path)([0, 1], [Geometry().crop(0, 0, 0.8, 1), Geometry()])
        assert loaded.query_mask.tolist() == [[True] * 2 + [False] * 4, [True] * 6]
        assert_close(loaded.logits[:, 0, :2], output.logits[:, 0, [0, 5]].half(), rtol=0, atol=0)
        assert_close(loaded.queries[:, 1], output.queries[:, 1].half(), rtol=0, atol=0)
        assert loaded.boxes[:, 0, 2:].eq(0).all()
        said = dkl.pseudo_targets(loaded.logits, loaded.boxes, threshold=1e-3, max_targets=9, activation=activation)
        assert said.mask.sum(-1).tolist() == [2, 6]

    def test_of_other_files(self, tmp_path: Path) -> None:
        whole = outputs()
        for name, number in (("a", 2), ("b", 5)):
            one = dkl.DetectorOutput(whole.logits[:, :1], whole.boxes[:, :1])
            save_predictions(tmp_path, [name], one, topk=number, activation="sigmoid")
        loaded = OfflineTeacher(tmp_path)(["b", "a"])
        assert loaded.query_mask.sum(-1).tolist() == [5, 2]
        assert_close(loaded.logits[:, 0, :2], loaded.logits[:, 1, :2])
        cut = OfflineTeacher(tmp_path, unequal="cut")(["b", "a"])
        assert cut.query_mask is None
        assert_close(cut.logits, loaded.logits[:, :, :2])

    def test_no_query_at_all(self, tmp_path: Path) -> None:
        save_predictions(tmp_path, [0, 1], outputs())
        away = Geometry().crop(0.95, 0.95, 1, 1)
        loaded = OfflineTeacher(tmp_path)([0, 1], [away, Geometry()])
        assert loaded.query_mask.sum(-1).tolist() == [0, 6]
        loaded = OfflineTeacher(tmp_path)([0, 1], [away, away])
        assert loaded.logits.shape[2] == 0
        assert loaded.query_mask is None

    def test_unknown_choice(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="`unequal` must be one of 'pad', 'cut', got 'crop'"):
            OfflineTeacher(tmp_path, unequal="crop")
