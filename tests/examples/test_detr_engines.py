"""How the engines of the repositories call the model and the criterion, and what else they may pass."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import detr_kd_losses as dkl
from detr_convention.adapter import KEY, DetrReader, DistillationCriterion, attach_teacher
from detr_convention.standin import SetCriterion, StandIn
from detr_convention.train import NUM_CLASSES

from support.stand_ins import batch, stand_in


class NestedTensor:
    """Images and their padding as most of the repositories pass them: no tensor, with a device of none."""

    def __init__(self, tensors: Tensor) -> None:
        self.tensors, self.mask = tensors, torch.zeros(tensors[:, 0].shape, dtype=torch.bool, device=tensors.device)


class Model(StandIn):
    """Takes images in each of the forms; answers a tuple where it denoises, as DN-DETR does."""

    def forward(self, samples: Any, targets: Any = None, *, mask: Any = None, dn_args: Any = None) -> Any:
        self.called_with = (samples, targets, mask, dn_args)
        outputs = super().forward(getattr(samples, "tensors", samples))
        return outputs if dn_args is None else (outputs, {"pad_size": 4})


class Criterion(SetCriterion):
    """Records what it is called with."""

    def forward(self, outputs: Any, targets: Any, *arguments: Any, **options: Any) -> dict[str, Tensor]:
        self.called_with = (arguments, options)
        assert KEY not in outputs
        return super().forward(outputs, targets)


class Engine(NamedTuple):
    """How an engine calls: after the samples, with the targets `t` and the second part of the outputs `o`."""

    model: Any
    criterion: Any
    nested: bool = True


METAS = {"epoch": 0, "step": 1, "global_step": 1}
ENGINES = {
    "DETR, Conditional DETR, Deformable DETR": Engine(lambda m, x, t: m(x), lambda c, o, t: c(o, t)),
    "DAB-DETR, DINO": Engine(lambda m, x, t: m(x, t), lambda c, o, t: c(o, t)),
    "DN-DETR": Engine(lambda m, x, t: m(x, dn_args=(t, 5, 0.2, 0.4, 0)), lambda c, o, t: c(o[0], t, o[1])),
    "RT-DETRv2": Engine(lambda m, x, t: m(x, targets=t), lambda c, o, t: c(o, t, **METAS), nested=False),
    "D-FINE, DEIM": Engine(lambda m, x, t: m(x, targets=t), lambda c, o, t: c(o, t, **METAS, epoch_step=9), False),
    "by keywords alone": Engine(lambda m, x, t: m(targets=t, samples=x), lambda c, o, t: c(targets=t, outputs=o)),
    "with a mask": Engine(lambda m, x, t: m(x, mask="mask"), lambda c, o, t: c(o, t), nested=False),
}
OF_THE_CRITERION = {
    "DN-DETR": (({"pad_size": 4},), {}),
    "RT-DETRv2": ((), METAS),
    "D-FINE, DEIM": ((), {**METAS, "epoch_step": 9}),
}


@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
def test_engines(engine: Engine, request: pytest.FixtureRequest) -> None:
    """The calls of `engine.py` or `det_engine.py` of each repository; the teacher sees the images and no targets."""
    name = request.node.callspec.id
    torch.manual_seed(0)
    student, teacher = (Model(num_classes=NUM_CLASSES, num_queries=6, layers=2) for _ in range(2))
    dn = {"dn_args": 0} if name == "DN-DETR" else {}
    attach_teacher(student, teacher, reader=DetrReader, teacher_options=dn)
    original = Criterion(layers=2)
    criterion = DistillationCriterion(original, dkl.DETRDistillationLoss())
    images, targets = batch()
    samples = NestedTensor(images) if engine.nested else images
    outputs = engine.model(student.train(), samples, targets)
    losses = engine.criterion(criterion.train(), outputs, targets)
    assert set(criterion.distillation.names) <= losses.keys()
    mask = "mask" if name == "with a mask" else None
    assert teacher.called_with == (samples, None, mask, dn.get("dn_args"))
    assert original.called_with == OF_THE_CRITERION.get(name, ((), {}))
    sum(losses.values()).backward()
    assert all(parameter.grad is not None for parameter in student.parameters())
    student.eval(), criterion.eval()
    outputs = engine.model(student, samples, targets)
    assert not set(criterion.distillation.names) & engine.criterion(criterion, outputs, targets).keys()


def test_criterion_takes_the_tuple_of_a_model() -> None:
    student = Model(num_classes=NUM_CLASSES, num_queries=6, layers=2)
    attach_teacher(student, stand_in(1))
    images, targets = batch()
    outputs = student(images, dn_args=())

    class Whole(SetCriterion):
        def forward(self, outputs: Any, targets: Any) -> dict[str, Tensor]:
            assert isinstance(outputs, tuple)
            assert outputs[1] == {"pad_size": 4}
            return super().forward(outputs[0], targets)

    criterion = DistillationCriterion(Whole(layers=2), dkl.DETRDistillationLoss())
    assert {"loss_class", "loss_kd_class"} <= criterion(outputs, targets).keys()


def test_teacher_follows_the_student_where_samples_have_no_device() -> None:
    student, teacher = (Model(num_classes=NUM_CLASSES, num_queries=6, layers=2) for _ in range(2))
    attach_teacher(student.to("meta"), teacher, reader=DetrReader)
    outputs = student(NestedTensor(torch.rand(2, 3, 64, 64, device="meta")))
    assert {output.logits.device.type for output in outputs[KEY]} == {"meta"}


def test_targets_move_to_the_outputs() -> None:
    """With a device of none, to which nothing can be copied back: the loss asks for targets on its own."""
    student = stand_in(0)
    attach_teacher(student, stand_in(1))
    seen = []

    class Loss(dkl.DETRDistillationLoss):
        def forward(self, student: Any, teacher: Any, targets: dkl.Targets) -> dict[str, Tensor]:
            seen.append(targets.boxes.device.type)
            return {}

    images, targets = batch()
    outputs = student(images)
    outputs[KEY] = tuple(output.to("meta") for output in outputs[KEY])
    DistillationCriterion(SetCriterion(layers=3), Loss())(outputs, targets)
    assert seen == ["meta"]


@pytest.mark.parametrize("answer", [(torch.rand(2, 6, 4), torch.rand(2, 6, 3)), {"boxes": 1}, []])
def test_outputs_of_another_convention_are_named(answer: Any) -> None:
    class Other(StandIn):
        def forward(self, samples: Tensor) -> Any:
            super().forward(samples)
            return answer

    student = Other(num_classes=NUM_CLASSES, num_queries=6)
    attach_teacher(student, stand_in(1))
    with pytest.raises(TypeError, match="must be a dict with 'pred_logits' and 'pred_boxes'"):
        student(batch()[0])


def test_images_must_come_first() -> None:
    class Other(StandIn):
        def forward(self, **inputs: Any) -> Any:
            return super().forward(inputs["pixel_values"])

    student = Other(num_classes=NUM_CLASSES, num_queries=6)
    attach_teacher(student, stand_in(1))
    with pytest.raises(TypeError, match=r"images must be the first argument .* got \['pixel_values'\]"):
        student(pixel_values=batch()[0])


def test_teacher_of_one_layer_is_told_of() -> None:
    """In evaluation mode RT-DETRv2 and D-FINE answer their last layer alone."""
    student = stand_in(0)
    attach_teacher(student, stand_in(1, layers=1))
    with pytest.warns(UserWarning, match="shows 1 decoder layer and the student 3"):
        student(batch()[0])


def test_criterion_answers_for_the_original() -> None:
    original = SetCriterion(layers=3)
    original.loss_weight_decay = lambda epoch: epoch
    criterion = DistillationCriterion(original, dkl.DETRDistillationLoss())
    assert criterion.loss_weight_decay(epoch=3) == 3
    with pytest.raises(AttributeError, match=r"SetCriterion.*'matcher'"):
        _ = criterion.matcher
    assert copy.deepcopy(criterion).weight_dict == criterion.weight_dict
