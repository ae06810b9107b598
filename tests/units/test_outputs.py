"""The records: what they show, where they are, and what is said of something else in their place."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.testing import assert_close

import detr_kd_losses as dkl

from support.steps import make_output, make_targets, over_tensors


def step():
    return make_output(0, 3, 7, group=9), make_output(1, 3, 9), make_targets()


def test_repr_shows_no_numbers():
    student, _, targets = step()
    assert repr(student) == (
        "DetectorOutput(logits=(3, 2, 7, 5) float32 cpu, boxes=(3, 2, 7, 4) float32 cpu, "
        "queries=(3, 2, 7, 8) float32 cpu, features=[(2, 8, 6, 8) float32 cpu, (2, 8, 3, 4) float32 cpu], "
        "group=Predictions(logits=(3, 2, 9, 5) float32 cpu, boxes=(3, 2, 9, 4) float32 cpu))"
    )
    assert repr(targets) == "Targets(labels=(2, 4) int64 cpu, boxes=(2, 4, 4) float32 cpu, mask=(2, 4) bool cpu)"
    assert repr(student._replace(features=tuple(student.features), logits=3)).startswith("DetectorOutput(logits=int, ")


def test_to_moves_every_tensor():
    student, _, targets = step()
    student = student._replace(padding_mask=torch.ones(2, 6, 8, dtype=torch.bool))
    moved = student.to("meta")
    assert repr(moved) == repr(student).replace("cpu", "meta")
    assert type(moved) is dkl.DetectorOutput
    assert type(moved.group) is dkl.Predictions
    assert repr(targets.to("meta")) == repr(targets).replace("cpu", "meta")
    assert repr(student.group.to(torch.device("meta"))) == repr(student.group).replace("cpu", "meta")


def test_copies_and_pickles_keep_the_type():
    student, _, targets = step()
    for record in (student, targets):
        for twin in (copy.deepcopy(record), pickle.loads(pickle.dumps(record)), over_tensors(torch.clone, record)):
            assert repr(twin) == repr(record)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s, t, g: ({"pred_logits": s.logits, "pred_boxes": s.boxes}, t, g),
            r"`student` must be a DetectorOutput, got dict with keys \['pred_boxes', 'pred_logits'\]: "
            r"pass DetectorOutput\(outputs\['pred_logits'\], outputs\['pred_boxes'\]\)",
        ),
        (lambda s, t, g: (s, (t.logits, t.boxes), g), "`teacher` must be a DetectorOutput, got tuple: pass"),
        (
            lambda s, t, g: (s, t, [{"labels": torch.tensor([1]), "boxes": torch.rand(1, 4)}] * 2),
            r"`targets` must be a Targets, got list: pass pad_targets\(targets\)",
        ),
        (lambda s, t, g: (s, t, t), r"`targets` must be a Targets, got DetectorOutput: pass pad_targets"),
        (lambda s, t, g: (s, g, t), "`teacher` must be a DetectorOutput, got Targets"),
        (
            lambda s, t, g: (s._replace(group=s.group.logits), t, g),
            r"`student.group` must be a Predictions, got Tensor: pass Predictions\(logits, boxes\)",
        ),
    ],
)
def test_something_else_in_place_of_a_record(change, message):
    with pytest.raises(TypeError, match=message):
        dkl.DETRDistillationLoss()(*change(*step()))


class TestPadTargets:
    def test_pads_to_the_largest_image(self):
        images = [
            {"labels": torch.tensor([2, 0]), "boxes": torch.rand(2, 4)},
            {"class_labels": torch.tensor([], dtype=torch.int64), "boxes": torch.rand(0, 4)},
            {"labels": torch.tensor([1]), "boxes": torch.rand(1, 4)},
        ]
        targets = dkl.pad_targets(images)
        assert targets.mask.tolist() == [[True, True], [False, False], [True, False]]
        assert targets.labels[targets.mask].tolist() == [2, 0, 1]
        assert_close(targets.boxes[2, 0], images[2]["boxes"][0])

    def test_no_targets_at_all(self):
        image = {"labels": torch.tensor([], dtype=torch.int64), "boxes": torch.rand(0, 4)}
        assert [tuple(field.shape) for field in dkl.pad_targets([image, image])] == [(2, 0), (2, 0, 4), (2, 0)]

    @pytest.mark.parametrize(
        ("images", "error", "message"),
        [
            ([], ValueError, "`targets` must have at least one image"),
            ([{"boxes": torch.rand(1, 4)}], ValueError, r"`targets\[0\]` must have 'labels' .* got \['boxes'\]"),
            (
                [{"labels": torch.tensor([1.0]), "boxes": torch.rand(1, 4)}],
                TypeError,
                r"`targets\[0\]\['labels'\]` must have dtype torch.int64",
            ),
            (
                [{"labels": torch.tensor([1]), "boxes": torch.rand(2, 4)}],
                ValueError,
                r"same dimensions \(T,\), got \(1,\) and \(2,\)",
            ),
            (
                [{"labels": torch.tensor([1]), "boxes": torch.rand(1, 5)}],
                ValueError,
                r"`targets\[0\]\['boxes'\]` must have shape",
            ),
        ],
    )
    def test_errors(self, images, error, message):
        with pytest.raises(error, match=message):
            dkl.pad_targets(images)

    @pytest.mark.parametrize("dtypes", [("float32", "float64"), ("float64", "float32"), ("float16", "bfloat16")])
    def test_boxes_have_the_widest_dtype(self, dtypes):
        """That of the first image would round the others."""
        boxes = [torch.full((1, 4), 1 / 3, dtype=getattr(torch, dtype)) for dtype in dtypes]
        targets = dkl.pad_targets([{"labels": torch.tensor([1]), "boxes": box} for box in boxes])
        assert targets.boxes.dtype == torch.promote_types(boxes[0].dtype, boxes[1].dtype)
        for index, box in enumerate(boxes):
            assert_close(targets.boxes[index], box.to(targets.boxes.dtype), rtol=0, atol=0)

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            (
                {"labels": torch.empty(1, dtype=torch.int64, device="meta")},
                ValueError,
                r"`targets\[2\]\['labels'\]` must be on",
            ),
            (
                {"boxes": torch.empty(1, 4, device="meta")},
                ValueError,
                r"`targets\[2\]\['boxes'\]` must be on the device of",
            ),
            (
                {"boxes": torch.ones(1, 4).int()},
                TypeError,
                r"`targets\[2\]\['boxes'\]` must have a floating-point dtype",
            ),
            ({"boxes": None}, TypeError, r"`targets\[2\]\['boxes'\]` must be a torch.Tensor, got NoneType"),
            (None, TypeError, r"`targets\[2\]` must be a mapping with 'labels' and 'boxes', got NoneType"),
        ],
    )
    def test_one_image_that_differs_is_named(self, change, error, message):
        good = {"labels": torch.tensor([1]), "boxes": torch.rand(1, 4)}
        with pytest.raises(error, match=message):
            dkl.pad_targets([good, good, change and {**good, **change}, good])

    def test_the_dict_of_one_image_is_no_batch(self):
        with pytest.raises(TypeError, match=r"`targets\[0\]` must be a mapping with 'labels' and 'boxes', got str"):
            dkl.pad_targets({"labels": torch.tensor([1]), "boxes": torch.rand(1, 4)})


def test_labels_of_two_names():
    """A collator may write both; they are the same, or nobody knows which are meant."""
    boxes, labels = torch.rand(1, 4), torch.tensor([1])
    assert dkl.pad_targets([{"labels": labels, "class_labels": labels.clone(), "boxes": boxes}]).labels.item() == 1
    with pytest.raises(ValueError, match=r"`targets\[1\]` must have 'labels' or 'class_labels', got both"):
        dkl.pad_targets(
            [{"labels": labels, "boxes": boxes}, {"labels": labels, "class_labels": 1 - labels, "boxes": boxes}]
        )


@pytest.mark.parametrize("first", [None, "a mask"])
def test_a_level_that_is_no_tensor_is_named(first):
    """One of several levels decides for none of the others."""
    level, mask = torch.rand(2, 8, 4, 4), torch.ones(2, 4, 4, dtype=torch.bool)
    for call in (
        lambda masks: dkl.feature_distillation_loss([level] * 2, [level] * 2, padding_mask=masks),
        lambda masks: dkl.FeatureProjection()([level] * 2, [level] * 2, masks),
    ):
        with pytest.raises(TypeError, match=r"`padding_mask\[1\]` must be a tensor, got"):
            call([mask, first])
