"""Box geometry against the oracle, by hand, and at its edges."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import detr_kd_losses as dkl

from support import oracles
from support.oracles import pairwise
from support.tolerances import TOLERANCES

FAMILIES = {
    "ordinary": lambda rng: np.concatenate([rng.uniform(0.2, 0.8, (6, 2)), rng.uniform(0.05, 0.4, (6, 2))], -1),
    "tiny": lambda rng: np.concatenate([rng.uniform(0.4, 0.4001, (6, 2)), rng.uniform(1e-5, 1e-4, (6, 2))], -1),
    "one is the image": lambda rng: np.tile([0.5, 0.5, 1.0, 1.0], (6, 1)) * rng.uniform(0.2, 1, (6, 1)),
}


@pytest.fixture(params=FAMILIES)
def boxes(request):
    rng = np.random.default_rng(3)
    return FAMILIES[request.param](rng), FAMILIES[request.param](rng)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["box_iou", "generalized_box_iou"])
def test_all_pairs_and_partners_agree_with_oracle(name, dtype, boxes):
    one, other = (torch.from_numpy(b) for b in boxes)
    # In float32 the corners of a tiny box keep few digits of its size: compare what the rounded corners say.
    corners = [dkl.box_cxcywh_to_xyxy(b).to(dtype) for b in (one, other)]
    rounded = [dkl.box_xyxy_to_cxcywh(c.double()).numpy() for c in corners]
    expected = pairwise(getattr(oracles, name), *rounded)
    rtol, atol = TOLERANCES[dtype]
    atol = max(atol, 1e-3) if dtype == torch.float32 and one[:, 2].max() < 1e-3 else atol
    assert_close(getattr(dkl, name)(*corners).double(), torch.from_numpy(expected), rtol=rtol, atol=atol)
    paired = getattr(dkl, f"paired_{name}")(*corners)
    assert_close(paired.double(), torch.from_numpy(expected.diagonal().copy()), rtol=rtol, atol=atol)


def test_leading_dimensions_broadcast():
    one, other = dkl.box_cxcywh_to_xyxy(torch.rand(6, 1, 5, 4)), dkl.box_cxcywh_to_xyxy(torch.rand(2, 3, 4))
    iou = dkl.box_iou(one, other)
    assert iou.shape == (6, 2, 5, 3)
    assert_close(iou[4, 1], dkl.box_iou(one[4, 0], other[1]))


def test_geometry_by_hand():
    square = torch.tensor([0.0, 0.0, 2.0, 2.0])
    right_half, diagonal = torch.tensor([1.0, 0.0, 3.0, 2.0]), torch.tensor([2.0, 2.0, 4.0, 4.0])
    inside = torch.tensor([0.5, 0.5, 1.5, 1.5])
    others = torch.stack([square, right_half, diagonal, inside])
    assert_close(dkl.box_iou(square[None], others)[0], torch.tensor([1, 1 / 3, 0, 1 / 4]))
    # diagonal: hull of 16 and union of 8
    assert_close(dkl.generalized_box_iou(square[None], others)[0], torch.tensor([1, 1 / 3, -0.5, 1 / 4]))
    assert dkl.box_area(others).tolist() == [4, 4, 4, 1]


def test_conversions_are_inverse():
    boxes = torch.rand(7, 4, dtype=torch.float64)
    assert_close(dkl.box_xyxy_to_cxcywh(dkl.box_cxcywh_to_xyxy(boxes)), boxes, rtol=1e-15, atol=1e-15)


POINT, OTHER_POINT = [0.5, 0.5, 0.5, 0.5], [0.25, 0.5, 0.25, 0.5]
LINE, INVERTED, BOX = [0.2, 0.5, 0.8, 0.5], [0.6, 0.2, 0.2, 0.8], [0.2, 0.2, 0.6, 0.6]


@pytest.mark.parametrize(
    ("one", "other", "iou", "giou"),
    [
        (POINT, POINT, 1, 1),
        (LINE, LINE, 1, 1),
        (POINT, OTHER_POINT, 0, -1),
        (POINT, LINE, 0, -1),
        (POINT, BOX, 0, 0),
        (INVERTED, BOX, 0, 0.16 / 0.24 - 1),
        (INVERTED, INVERTED, 1, 1),
    ],
)
def test_boxes_without_area_have_finite_values_and_gradients(one, other, iou, giou):
    one, other = torch.tensor([one], requires_grad=True), torch.tensor([other])
    assert_close(dkl.paired_box_iou(one, other), torch.tensor([float(iou)]))
    value = dkl.paired_generalized_box_iou(one, other)
    assert_close(value, torch.tensor([float(giou)]))
    value.sum().backward()
    assert one.grad.isfinite().all()


def test_gradient_vanishes_where_boxes_coincide():
    boxes = torch.rand(200, 4, requires_grad=True)
    corners = dkl.box_cxcywh_to_xyxy(boxes)
    dkl.paired_generalized_box_iou(corners, corners.detach()).sum().backward()
    assert boxes.grad.eq(0).all()


def test_nan_stays_visible():
    bad = torch.tensor([[float("nan"), 0.0, 1.0, 1.0]])
    assert dkl.box_iou(bad, torch.rand(2, 4)).isnan().all()
    assert dkl.generalized_box_iou(bad, torch.rand(2, 4)).isnan().all()


def test_gradcheck():
    one, other = dkl.box_cxcywh_to_xyxy(torch.rand(2, 5, 4, dtype=torch.float64) * 0.5 + 0.1)
    assert torch.autograd.gradcheck(dkl.generalized_box_iou, (one.requires_grad_(), other.requires_grad_()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    one, other = (dkl.box_cxcywh_to_xyxy(torch.rand(5, 4)).to(dtype) for _ in range(2))
    for name in ("box_iou", "generalized_box_iou", "paired_box_iou", "paired_generalized_box_iou"):
        value = getattr(dkl, name)(one, other)
        assert value.dtype == torch.float32
        assert_close(value, getattr(dkl, name)(one.float(), other.float()), rtol=0, atol=0)


def test_empty_sets():
    empty = torch.rand(2, 0, 4, requires_grad=True)
    iou = dkl.box_iou(empty, torch.rand(2, 3, 4))
    assert iou.shape == (2, 0, 3)
    iou.sum().backward()
    assert dkl.paired_box_iou(empty, empty).shape == (2, 0)


@pytest.mark.parametrize(
    ("one", "other", "error", "message"),
    [
        (torch.rand(3, 5), torch.rand(3, 4), ValueError, r"`boxes1` must have shape \(..., N, 4\), got \(3, 5\)"),
        (torch.rand(3, 4), torch.rand(4), ValueError, r"`boxes2` must have shape \(..., N, 4\), got \(4,\)"),
        (
            torch.ones(3, 4).int(),
            torch.rand(3, 4),
            TypeError,
            "`boxes1` must have a floating-point dtype, got torch.int32",
        ),
        (
            torch.rand(3, 4),
            torch.rand(3, 4, device="meta"),
            ValueError,
            "`boxes2` must be on the device of `boxes1` cpu, got meta",
        ),
        ([[0.0] * 4], torch.rand(1, 4), TypeError, "`boxes1` must be a torch.Tensor, got list"),
    ],
)
def test_errors(one, other, error, message):
    with pytest.raises(error, match=message):
        dkl.box_iou(one, other)


def test_partners_must_be_as_many():
    with pytest.raises(
        ValueError, match=r"`boxes1` and `boxes2` must have the same dimensions .* \(2, 4\) and \(3, 4\)"
    ):
        dkl.paired_box_iou(torch.rand(2, 4), torch.rand(3, 4))
