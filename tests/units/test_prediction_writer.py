"""Files of many images: written whole, found, read by workers, and named where they are damaged."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from torch.testing import assert_close
from torch.utils.data import DataLoader

import detr_kd_losses as dkl

from support.offline import CLASSES, LAYERS, of_one, outputs, save_singly, save_together

safetensors = pytest.importorskip("safetensors.torch", reason="files of many images need safetensors")


def shards(folder):
    return sorted(folder.glob("*.safetensors"))


class TestWriter:
    """Many images to a file."""

    def test_full_files_are_written_at_once(self, tmp_path):
        with dkl.PredictionWriter(tmp_path, images_per_file=3) as writer:
            for number in range(5):
                writer.add([2 * number, 2 * number + 1], outputs(number))
                assert len(shards(tmp_path)) == len(writer.files) == (2 * number + 2) // 3
        assert shards(tmp_path) == writer.files
        assert len(writer.files) == 4
        loaded = dkl.OfflineTeacher(tmp_path)(range(10))
        expected = torch.cat([outputs(number).logits for number in range(5)], dim=1)
        assert_close(loaded.logits, expected, rtol=0, atol=0)

    def test_an_image_comes_once(self, tmp_path):
        writer = dkl.PredictionWriter(tmp_path, images_per_file=2)
        writer.add([0, 1], outputs())
        with pytest.raises(ValueError, match=r"got \['1'\] more than once"):
            writer.add([2, 1], outputs())

    def test_an_error_leaves_what_was_whole(self, tmp_path):
        writer = dkl.PredictionWriter(tmp_path)
        with pytest.raises(ValueError, match="one entry for each"), writer:
            [writer.add([number, number + 1], outputs()) for number in (0, 2)] + [writer.add([4], outputs())]
        assert dkl.OfflineTeacher(tmp_path)([1]).logits.shape[1] == 1

    def test_a_job_that_is_killed_leaves_no_file(self, tmp_path, monkeypatch):
        def half(content, path, metadata):
            path.write_bytes(b"half of a file")
            raise KeyboardInterrupt

        monkeypatch.setattr(safetensors, "save_file", half)
        with pytest.raises(KeyboardInterrupt):
            save_together(tmp_path, [0, 1], outputs())
        assert not list(tmp_path.iterdir())
        (tmp_path / "predictions-1.safetensors.tmp").write_bytes(b"killed without a word")
        with pytest.raises(FileNotFoundError, match=r"no predictions for image 0 .* save_predictions"):
            dkl.OfflineTeacher(tmp_path)([0])

    def test_the_newest_counts_and_a_file_of_its_own_first(self, tmp_path):
        save_together(tmp_path, [0, 1], outputs(1))
        save_together(tmp_path, [0, 1], outputs(2))
        assert_close(dkl.OfflineTeacher(tmp_path)([0, 1]).logits, outputs(2).logits)
        save_singly(tmp_path, [0, 1], outputs(3))
        assert_close(dkl.OfflineTeacher(tmp_path)([0, 1]).logits, outputs(3).logits)

    def test_a_teacher_finds_what_is_written_later(self, tmp_path):
        teacher = dkl.OfflineTeacher(tmp_path)
        for number in range(3):
            with pytest.raises(FileNotFoundError):
                teacher([number])
            save_together(tmp_path, [number], of_one(number))
            assert_close(teacher([number]).logits, of_one(number).logits)

    def test_many_files(self, tmp_path):
        """More than a process keeps open."""
        with dkl.PredictionWriter(tmp_path, images_per_file=1) as writer:
            for number in range(70):
                writer.add([number], of_one(number))
        teacher = dkl.OfflineTeacher(tmp_path)
        for number in (*range(70), 0, 69, 1):
            assert_close(teacher([number]).logits, of_one(number).logits)

    def test_without_safetensors(self, tmp_path, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, "safetensors.torch", None)
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'detr-kd-losses\[offline\]'"):
            dkl.PredictionWriter(tmp_path)


class TestDamage:
    """Files that are not what they were."""

    @pytest.mark.parametrize("left", [0, 4, 100, 0.5, 0.99])
    def test_cut_short(self, tmp_path, left):
        save_together(tmp_path, [7], of_one(7))
        save_together(tmp_path, [139, 285], outputs())
        path = shards(tmp_path)[-1]
        data = path.read_bytes()
        path.write_bytes(data[: int(left * len(data)) if isinstance(left, float) else left])
        teacher = dkl.OfflineTeacher(tmp_path)
        with pytest.raises(
            ValueError, match=rf"image 285 cannot be read: .*{path.name} is damaged or cut short; delete"
        ):
            teacher([285])
        assert_close(teacher([7]).logits, of_one(7).logits)
        path.unlink()
        with pytest.raises(FileNotFoundError):
            teacher([285])

    @pytest.mark.parametrize(
        ("said", "message"),
        [
            (None, "KeyError: 'detr_kd_losses'"),
            ("[", "JSONDecodeError"),
            (json.dumps({"format": 2, "images": []}), "its format must be 1, got 2"),
            (json.dumps({"format": 1}), "KeyError: 'images'"),
            (json.dumps({"format": 1, "images": [["5", [1, 1, 0, 0], None, True, 0, 0]]}), "queries"),
            (json.dumps({"format": 1, "images": [["5", [0, 1, 0, 0], None, False, 0, 0]]}), "`geometry`"),
            (json.dumps({"format": 1, "images": [["5", [1, 1, 0], None, False, 0, 0]]}), "`geometry`"),
            (json.dumps({"format": 1, "images": [["5", [1, 1, 0, 0], None, False, 0, 1]]}), "padding_mask"),
        ],
    )
    def test_header(self, tmp_path, said, message):
        tensors = {"0.logits": torch.zeros(1, 3, 2), "0.boxes": torch.zeros(1, 3, 4)}
        metadata = None if said is None else {"detr_kd_losses": said}
        safetensors.save_file(tensors, tmp_path / "predictions-0.safetensors", metadata=metadata)
        with pytest.raises(ValueError, match=r"image 5 .*predictions-0\.safetensors") as caught:
            dkl.OfflineTeacher(tmp_path)([5])
        assert message in str(caught.value)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"boxes": torch.zeros(3, 5, 4)}, r"`logits` \(3, 6, 4\) and `boxes` \(3, 5, 4\)"),
            ({"queries": torch.zeros(3, 5, 8)}, "or `queries` have different sizes"),
            ({"logits": [1]}, "what should be a tensor is none"),
            ({"padding_mask": [torch.ones(4, 5).bool(), torch.ones(4, 5).bool()]}, "`padding_mask` has not the sizes"),
            ({"padding_mask": [torch.ones(4, 5), torch.ones(2, 3)]}, "or is not bool"),
            ({"padding_mask": [torch.ones(4, 5).bool()]}, "`padding_mask` has not the sizes"),
        ],
    )
    def test_tensors_of_different_images(self, tmp_path, change, message):
        (path,) = dkl.save_predictions(tmp_path, ["a"], of_one(0), features=True)
        torch.save({**torch.load(path), **change}, path)
        with pytest.raises(ValueError, match=rf"image 'a' in .*a\.pt do not belong together: .*{message}"):
            dkl.OfflineTeacher(tmp_path)(["a"])

    def test_another_teacher_is_named_with_its_file(self, tmp_path):
        save_together(tmp_path, ["a"], of_one(0))
        save_together(tmp_path, ["b"], of_one(1, queries=None))
        with pytest.raises(ValueError, match=r"image 'b' must have the `queries` .*predictions-\d+-\w+\.safetensors"):
            dkl.OfflineTeacher(tmp_path)(["a", "b"])


class Collate:
    """What a trainer gives a data loader: it reads in the worker."""

    def __init__(self, folder):
        self.teacher = dkl.OfflineTeacher(folder)

    def __call__(self, image_ids):
        return self.teacher(image_ids).logits


class TestWorkers:
    """Read where the data loader reads."""

    @pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # on one core
    @pytest.mark.parametrize("method", ["fork", "spawn"])
    def test_of_a_data_loader(self, tmp_path, method):
        with dkl.PredictionWriter(tmp_path, images_per_file=3) as writer:
            for number in range(8):
                writer.add([number], of_one(number))
        collate = Collate(tmp_path)
        collate([0])  # a file is open already, in the process that is forked
        loader = DataLoader(range(8), batch_size=2, collate_fn=collate, num_workers=2, multiprocessing_context=method)
        expected = torch.cat([of_one(number).logits for number in range(8)], dim=1)
        assert_close(torch.cat(list(loader), dim=1), expected, rtol=0, atol=0)

    def test_a_teacher_that_has_read_can_be_pickled(self, tmp_path):
        save_together(tmp_path, [0, 1], outputs())
        teacher = dkl.OfflineTeacher(tmp_path, num_classes=CLASSES)
        expected = teacher([0, 1])
        again = pickle.loads(pickle.dumps(teacher))
        assert_close(again([0, 1]).logits, expected.logits)
        assert expected.logits.shape[0] == LAYERS
