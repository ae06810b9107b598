"""The explicit checks of values."""

from __future__ import annotations

import re

import pytest
import torch

from detr_kd_losses import check_finite, check_targets


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_check_finite_names_the_tensor_and_the_entry(dtype, value):
    boxes = torch.zeros(2, 3, 4, dtype=dtype)
    check_finite(logits=boxes, boxes=boxes, nothing=boxes[:0])
    boxes[1, 2, 3] = value
    with pytest.raises(ValueError, match=rf"`boxes` must be finite, got {value}.*\(?1, .*2, .*3"):
        check_finite(logits=boxes[:1], boxes=boxes)


@pytest.mark.parametrize(
    ("name", "shape", "where"),
    [
        ("student_logits", (2, 3, 4, 5), "stage 1, image 2, query 3, class 4"),
        ("student.boxes", (3, 4, 4), "image 2, query 3, coordinate 3"),
        ("target_boxes", (3, 4, 4), "image 2, target 3, coordinate 3"),
        ("quality", (2, 3, 4), "stage 1, image 2, query 3"),
        ("teacher_features", (2, 3, 4, 5), "image 1, channel 2, row 3, column 4"),
        ("cost", (2, 3, 4, 5), "stage 1, image 2, row 3, column 4"),
    ],
)
def test_check_finite_names_stage_image_and_query(name, shape, where):
    tensor = torch.zeros(shape)
    last = tuple(size - 1 for size in shape)
    tensor[last] = float("nan")
    message = f"`{name}` must be finite, got nan at index {last} ({where}), the first of 1"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check_finite(**{name: tensor})


@pytest.mark.parametrize("shape", [(), (2,), (1, 2, 3, 4, 5)])
def test_check_finite_takes_any_number_of_dimensions(shape):
    with pytest.raises(ValueError, match=r"^`boxes` must be finite, got inf at index \("):
        check_finite(boxes=torch.full(shape, float("inf")))


@pytest.mark.parametrize(
    ("value", "match"),
    [([1.0], "`boxes` must be a torch.Tensor, got list"), (torch.zeros(2).int(), "`boxes` must have a floating-point")],
)
def test_check_finite_takes_floating_tensors(value, match):
    with pytest.raises(TypeError, match=match):
        check_finite(boxes=value)


def good_targets():
    """Two images with two targets and one, and what nobody should look at in the padding."""
    labels = torch.tensor([[0, 3, -1], [2, 400, -1]])
    boxes = torch.full((2, 3, 4), 0.25)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    boxes[~mask] = float("nan")
    return labels, boxes, mask


@pytest.mark.parametrize("num_targets", [0, 3])
def test_check_targets_accepts(num_targets):
    labels, boxes, mask = (tensor[:, :num_targets] for tensor in good_targets())
    check_targets(labels, boxes, mask, num_classes=4)
    check_targets(labels[0], boxes[0], mask[0], num_classes=4)


def test_check_targets_accepts_the_whole_image():
    labels, boxes, mask = good_targets()
    boxes[0, 0] = torch.tensor([0.5, 0.5, 1.0, 1.0])
    check_targets(labels, boxes, mask, num_classes=4)


@pytest.mark.parametrize("label", [-1, 4, 91])
def test_check_targets_labels(label):
    labels, boxes, mask = good_targets()
    labels[1, 0] = label
    with pytest.raises(ValueError, match=rf"`target_labels` must be in \[0, 4\), got {label}\b.*1, .*0"):
        check_targets(labels, boxes, mask, num_classes=4)


@pytest.mark.parametrize(
    ("box", "rule"),
    [
        ([0.5, float("nan"), 0.2, 0.2], "finite"),
        ([0.5, 0.5, float("inf"), 0.2], "finite"),
        ([0.5, 0.5, 0.0, 0.2], "positive width and height"),
        ([0.5, 0.5, 0.2, -0.1], "positive width and height"),
        ([1.5, 0.5, 0.2, 0.2], r"cxcywh in \[0, 1\]"),
        ([-0.1, 0.5, 0.2, 0.2], r"cxcywh in \[0, 1\]"),
        ([320.0, 240.0, 64.0, 48.0], r"cxcywh in \[0, 1\]"),
    ],
)
def test_check_targets_boxes(box, rule):
    labels, boxes, mask = good_targets()
    boxes[0, 1] = torch.tensor(box)
    with pytest.raises(ValueError, match=rf"`target_boxes` must .*{rule}, got .*0, .*1"):
        check_targets(labels, boxes, mask, num_classes=4)


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({0: lambda x: x.int()}, TypeError, "`target_labels` must have dtype torch.int64, got torch.int32"),
        ({1: lambda x: x[..., :3]}, ValueError, r"`target_boxes` must have shape \(\.\.\., N, 4\), got"),
        ({2: lambda x: x.int()}, TypeError, "`target_mask` must have dtype torch.bool, got torch.int32"),
        ({0: lambda x: x[:, 1:]}, ValueError, "`target_labels` and `target_boxes` must have the same dimensions"),
        ({2: lambda x: x[:, 1:]}, ValueError, "`target_labels` and `target_mask` must have the same dimensions"),
        ({1: lambda x: x.to("meta")}, ValueError, "`target_boxes` must be on the device of `target_labels` cpu, got"),
    ],
)
def test_check_targets_metadata(changes, error, match):
    arguments = [changes.get(i, lambda x: x)(tensor) for i, tensor in enumerate(good_targets())]
    with pytest.raises(error, match=match):
        check_targets(*arguments, num_classes=4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_check_targets_forgives_rounding(dtype):
    """A box over the whole image, resized and divided in float32, is 1.0000001 wide; a hundredth more is a mistake."""
    eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    labels, boxes, mask = good_targets()
    boxes = boxes.to(dtype)
    for box in ([0.5, 0.5, 1 + 2 * eps, 1 + 2 * eps], [-2 * eps, 0.5, 0.2, 0.2]):
        boxes[0, 1] = torch.tensor(box, dtype=dtype)
        check_targets(labels, boxes, mask, num_classes=4)
    for box in ([0.5, 0.5, 1.01 + 8 * eps, 1.0], [-0.01 - 8 * eps, 0.5, 0.2, 0.2]):
        boxes[0, 1] = torch.tensor(box, dtype=dtype)
        with pytest.raises(ValueError, match=r"cxcywh in \[0, 1\]"):
            check_targets(labels, boxes, mask, num_classes=4)
