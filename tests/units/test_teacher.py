"""FrozenTeacher: it teaches, and is no part of what holds it."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from detr_kd_losses.training.teacher import FrozenTeacher


class Holder(nn.Module):
    """A student with a teacher."""

    def __init__(self, teacher: nn.Module) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)
        self.teacher = FrozenTeacher(teacher)

    def forward(self, inputs: Tensor) -> Tensor:
        return (self.head(inputs) - self.teacher(inputs)).square().sum()


@pytest.fixture
def teacher() -> nn.Module:
    """A model that answers otherwise in training mode, and whose buffers would change."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))


def test_is_frozen_and_in_evaluation_mode(teacher: nn.Module) -> None:
    FrozenTeacher(teacher.train())
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


@pytest.mark.parametrize(
    "disturb",
    [
        lambda holder, _: holder.train(),
        lambda holder, _: holder.requires_grad_(True),
        lambda holder, _: holder.double().float(),
        lambda holder, _: holder.apply(lambda module: module.train()),
        lambda _, teacher: teacher.train(),
        lambda _, teacher: teacher[1].train(),
        lambda _, teacher: [part.train() for part in list(teacher.modules())[1:]],
    ],
    ids=[
        "holder.train",
        "holder.requires_grad_",
        "holder.double",
        "holder.apply",
        "teacher.train",
        "batch norm.train",
        "parts.train",
    ],
)
def test_stays_as_it_is(teacher: nn.Module, disturb: Any) -> None:
    holder, inputs = Holder(teacher), torch.randn(16, 4)
    expected, state = holder.teacher(inputs), copy.deepcopy(teacher.state_dict())
    disturb(holder, teacher)
    for _ in range(3):
        assert_close(holder.teacher(inputs), expected, rtol=0, atol=0)
    assert_close(dict(teacher.state_dict()), dict(state), rtol=0, atol=0)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_holder_does_not_own_it(teacher: nn.Module) -> None:
    holder = Holder(teacher)
    assert sorted(holder.state_dict()) == ["head.bias", "head.weight"]
    assert [name for name, _ in holder.named_parameters()] == ["head.weight", "head.bias"]
    assert [name for name, _ in holder.named_modules()] == ["", "head"]
    assert list(holder.buffers()) == []
    holder.load_state_dict(nn.Module.state_dict(Holder(nn.Linear(4, 2))))


def test_outputs_serve_in_a_loss(teacher: nn.Module) -> None:
    holder, inputs = Holder(teacher), torch.randn(16, 4, requires_grad=True)
    output = holder.teacher(inputs)
    assert not output.requires_grad
    assert not output.is_inference()
    # A product saves the teacher's output for the backward pass, which inference tensors forbid.
    (holder.head(inputs) * output).sum().backward()
    assert holder.head.weight.grad.any()
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_gradients_stay_enabled_around_it(teacher: nn.Module) -> None:
    FrozenTeacher(teacher)(torch.randn(2, 4))
    assert torch.is_grad_enabled()


def test_copy_of_the_holder_shares_it(teacher: nn.Module) -> None:
    holder = Holder(teacher)
    copied = copy.deepcopy(holder)
    assert copied.teacher.module is teacher
    assert copied.head.weight is not holder.head.weight
    averaged = torch.optim.swa_utils.AveragedModel(holder)
    assert averaged.module.teacher.module is teacher


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ((torch.empty(2, 4, device="meta"),), {}),
        ((), {"inputs": torch.empty(2, 4, device="meta")}),
        (([{"image": torch.empty(2, 4, device="meta")}],), {}),
    ],
    ids=["positional", "keyword", "nested"],
)
def test_moves_to_the_device_of_its_inputs(arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, inputs: Any) -> Tensor:
            return (inputs if isinstance(inputs, Tensor) else inputs[0]["image"]) * self.weight

    teacher = FrozenTeacher(Model())
    assert teacher(*arguments, **options).device.type == "meta"
    assert teacher.module.weight.device.type == "meta"


def test_without_tensors_it_stays_where_it_is() -> None:
    class Model(nn.Linear):
        def forward(self, scale: float) -> Tensor:
            return scale * self.weight

    assert FrozenTeacher(Model(2, 2))(2.0).device.type == "cpu"


def test_to_casts_and_returns_it(teacher: nn.Module) -> None:
    frozen = FrozenTeacher(teacher)
    assert frozen.to(torch.float64) is frozen
    assert frozen(torch.randn(2, 4, dtype=torch.float64)).dtype == torch.float64


def test_show_the_module() -> None:
    assert repr(FrozenTeacher(nn.ReLU())) == "FrozenTeacher(ReLU())"


def test_refuses_what_is_no_module() -> None:
    with pytest.raises(TypeError, match=r"`module` must be a torch\.nn\.Module, got str"):
        FrozenTeacher("detr")


class NestedTensor:
    """Images and their padding as DETR passes them: no tensor, with a device of none."""

    def __init__(self, tensors: Tensor) -> None:
        self.tensors, self.mask = tensors, None


def test_finds_the_device_of_a_nested_tensor() -> None:
    class Model(nn.Linear):
        def forward(self, samples: NestedTensor) -> Tensor:
            return super().forward(samples.tensors)

    teacher = FrozenTeacher(Model(4, 2))
    assert teacher(NestedTensor(torch.rand(3, 4, device="meta"))).device.type == "meta"
    assert teacher.module.weight.device.type == "meta"


def test_a_pickle_is_without_the_teacher(teacher: nn.Module) -> None:
    holder, file, alone = Holder(teacher), io.BytesIO(), io.BytesIO()
    torch.save(holder, file)
    torch.save(holder.head, alone)
    assert file.tell() < alone.tell() + 2000
    file.seek(0)
    other = torch.load(file, weights_only=False)
    assert_close(other.head.weight, holder.head.weight)
    assert repr(other.teacher) == "FrozenTeacher(None)"
    with pytest.raises(
        AttributeError, match=r"was pickled, without its teacher: make a new one, FrozenTeacher\(module"
    ):
        other(torch.rand(3, 4))
    with pytest.raises(AttributeError, match="has no attribute 'other'"):
        _ = other.teacher.other
    assert copy.copy(holder.teacher) is holder.teacher
