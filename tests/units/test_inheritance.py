"""What a student inherits: every tensor that fits, from the layer that teaches it, and nothing half done."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

import detr_kd_losses as dkl


class Detector(nn.Module):
    """A backbone, a decoder of some depth whose boxes are refined, and a head that all layers share."""

    def __init__(self, seed: int, *, layers: int = 3, classes: int = 4, width: int = 6, backbone: int = 2) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.backbone = nn.Sequential(
            nn.Conv2d(3, backbone, 1), nn.BatchNorm2d(backbone), nn.Conv2d(backbone, width, 1)
        )
        self.decoder = nn.Module()
        self.decoder.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.decoder.norm = nn.BatchNorm1d(width)
        self.decoder.norm.running_mean.normal_()
        self.class_embed = nn.ModuleList([nn.Linear(width, classes)] * layers)  # one module under several names
        self.bbox_embed = nn.ModuleList(
            nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(width, width), nn.Linear(width, 4)])})
            for _ in range(layers)
        )
        self.query = nn.Parameter(torch.randn(7, width))


PARTS = ["decoder", "class_embed", "bbox_embed", "query"]


def nearest(k: int, students: int, teachers: int) -> int:
    """The teacher's layer at the same part of the depth, halves up."""
    return max(int((k + 1) * teachers / students + 0.5) - 1, 0)


@given(students=st.integers(1, 5), teachers=st.integers(1, 5))
def test_every_layer_has_that_of_its_teacher(students: int, teachers: int) -> None:
    student, teacher = Detector(0, layers=students), Detector(1, layers=teachers)
    found = dkl.inherit_weights(student, teacher, PARTS)
    for k in range(students):
        own, other = student.decoder.layers[k], teacher.decoder.layers[nearest(k, students, teachers)]
        assert torch.equal(own.weight, other.weight)
        own, other = student.bbox_embed[k], teacher.bbox_embed[nearest(k, students, teachers)]
        assert all(torch.equal(a, b) for a, b in zip(own.parameters(), other.parameters(), strict=True))
        assert torch.equal(student.class_embed[k].weight, teacher.class_embed[0].weight)
    assert torch.equal(student.query, teacher.query)
    assert torch.equal(student.decoder.norm.running_mean, teacher.decoder.norm.running_mean)
    assert set(found.inherited) == {name for name in student.state_dict() if not name.startswith("backbone")}
    assert not found.left


def test_what_is_not_named_and_the_teacher_stay_as_they_were() -> None:
    student, teacher = Detector(0), Detector(1)
    before = copy.deepcopy((student.state_dict(), teacher.state_dict()))
    dkl.inherit_weights(student, teacher, ["decoder.layers"])
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, before[name.startswith("decoder.layers")][name])
    assert all(torch.equal(tensor, before[1][name]) for name, tensor in teacher.state_dict().items())


def test_what_does_not_fit_is_left_and_named() -> None:
    student, teacher = Detector(0, classes=3, layers=1), Detector(1, classes=4, layers=2)
    before = student.class_embed[0].weight.clone()
    with pytest.raises(
        ValueError, match="parts that the teacher has, too, with tensors of the same shapes, got 'class_"
    ):
        dkl.inherit_weights(student, teacher, ["decoder", "class_embed"])
    found = dkl.inherit_weights(student, teacher, [""])
    assert found.left == ("class_embed.0.weight", "class_embed.0.bias")
    assert torch.equal(student.class_embed[0].weight, before)
    assert found.inherited["decoder.layers.0.weight"] == "decoder.layers.1.weight"


def test_a_shared_head_is_that_of_the_last_layer() -> None:
    student, teacher = Detector(0), Detector(1)
    teacher.class_embed = nn.ModuleList(nn.Linear(6, 4) for _ in range(3))  # a head for each layer
    dkl.inherit_weights(student, teacher, ["class_embed"])
    assert torch.equal(student.class_embed[0].weight, teacher.class_embed[2].weight)


def test_a_part_without_tensors_has_nothing_to_give() -> None:
    student, teacher = Detector(0), Detector(1)
    student.neck = nn.Identity()
    assert dkl.inherit_weights(student, teacher, ["neck"]) == dkl.Inheritance({}, ())


def test_an_optimizer_that_knows_the_student_goes_on_with_it() -> None:
    student, teacher = Detector(0), Detector(1)
    optimizer = torch.optim.SGD(student.parameters(), lr=1.0)
    dkl.inherit_weights(student, teacher, ["query"])
    assert student.query.requires_grad
    student.query.sum().backward()
    optimizer.step()
    assert_close(student.query, teacher.query - 1, rtol=0, atol=0)


def test_other_dtypes_are_converted() -> None:
    student, teacher = Detector(0).double(), Detector(1).bfloat16()
    dkl.inherit_weights(student, teacher, ["query"])
    assert student.query.dtype == torch.float64
    assert torch.equal(student.query, teacher.query.double())


@pytest.mark.parametrize(
    ("paths", "error", "message"),
    [
        ([], ValueError, "`paths` must name at least one part of the student, got none"),
        (["decoder", "head"], ValueError, "parts of the student, which has backbone, decoder, .*, got 'head'"),
        (["decoder", "backbone.0"], ValueError, "parts that the teacher has, too, .* got 'backbone.0'"),
        (["decoder", "decod"], ValueError, "parts of the student, .* got 'decod'"),
        ("decoder", TypeError, r"`paths` must be several names, got 'decoder'; write \['decoder'\]"),
    ],
)
def test_an_error_changes_nothing(paths: object, error: type[Exception], message: str) -> None:
    student = Detector(0)
    before = copy.deepcopy(student.state_dict())
    with pytest.raises(error, match=message):
        dkl.inherit_weights(student, Detector(1, backbone=5), paths)
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())


def test_refuses_what_is_no_model() -> None:
    with pytest.raises(TypeError, match=r"`teacher` must be a torch\.nn\.Module, got OrderedDict$"):
        dkl.inherit_weights(Detector(0), Detector(1).state_dict(), PARTS)
