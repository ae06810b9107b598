"""The offline teacher: images that do not look alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

import detr_kd_losses as dkl
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
