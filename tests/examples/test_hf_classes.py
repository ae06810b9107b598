"""Names and order of classes, heads and models of the trainer for transformers: compared where they are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="the Hugging Face adapter needs transformers")
pytest.importorskip("accelerate", reason="the Hugging Face trainer needs accelerate")

import detr_kd_losses as dkl
from detr_kd_losses.taps import distillation_loss, match_classes
from hf_transformers.train import rt_detr, training_arguments
from hf_transformers.trainer import DistillationTrainer

from support import zoo


def model(*names: str) -> nn.Module:
    return rt_detr(width=32, decoder_layers=1, num_queries=5, class_names=names)


def test_same_classes_in_another_order_are_refused_with_the_map() -> None:
    teacher, student = model("person", "car", "dog"), model("dog", "person", "car")
    with pytest.raises(ValueError, match=r"same order.*match_classes\(student, teacher\).*by the map \[1, 2, 0\]"):
        distillation_loss(student, teacher)
    class_map = match_classes(student, teacher)
    assert class_map == [1, 2, 0]
    assert distillation_loss(student, teacher, class_map=class_map).class_map.tolist() == class_map


@pytest.mark.parametrize(
    ("student", "teacher", "class_map"),
    [
        (("dog", "cat"), ("cat", "bird", "dog"), [1, -1, 0]),  # fewer
        (("a", "b", "c", "d"), ("d", "a"), [3, 0]),  # more
        (("n/a", "dog", "n/a"), ("N/A", "n/a", "Dog"), [-1, -1, 1]),  # a name that is none
        (("dog", "cat"), ("hund", "katze"), [-1, -1]),
    ],
)
def test_other_classes_are_refused_with_the_map(student: Any, teacher: Any, class_map: list[int]) -> None:
    models = model(*student), model(*teacher)
    with pytest.raises(ValueError, match="must have the same classes"):
        distillation_loss(*models)
    assert match_classes(*models) == class_map
    assert distillation_loss(*models, class_map=class_map).class_map.tolist() == class_map


def test_same_classes_pass() -> None:
    for student, teacher in (
        (("Dog", "cat "), ("dog", "Cat")),
        (("LABEL_0", "LABEL_1"), ("dog", "cat")),  # without names there is nothing to compare
        (("N/A", "dog", "N/A"), ("N/A", "dog", "N/A")),
    ):
        assert distillation_loss(model(*student), model(*teacher)).class_map is None


def test_numbers_without_names() -> None:
    models = [zoo.build("rt_detr", num_labels=count) for count in (5, 4)]
    with pytest.raises(
        ValueError, match=r"got 5 \(without names\) and 4 \(without names\); otherwise give `class_map`"
    ):
        distillation_loss(*models)
    with pytest.raises(ValueError, match="must have names"):
        match_classes(*models)


def trainer(tmp_path: Path, student: nn.Module, teacher: nn.Module, **options: Any) -> DistillationTrainer:
    arguments = training_arguments(tmp_path, steps=1, batch_size=1)
    return DistillationTrainer(model=student, teacher=teacher, args=arguments, **options)


def test_loss_of_ones_own_is_compared_as_well(tmp_path: Path) -> None:
    models = model("dog", "cat"), model("cat", "dog")
    with pytest.raises(ValueError, match="same order"):
        trainer(tmp_path, *models, distillation=dkl.DETRDistillationLoss())
    trainer(tmp_path, *models, distillation=dkl.DETRDistillationLoss(class_map=[1, 0]))


@pytest.mark.parametrize(("family", "given"), [("detr", "sigmoid"), ("rt_detr", "softmax")])
def test_head_that_a_model_does_not_have(family: str, given: Any, tmp_path: Path) -> None:
    loss = dkl.DETRDistillationLoss([dkl.LogitsTerm()], student_activation=given, teacher_activation=given)
    with pytest.raises(ValueError, match=f"student_activation='s.*' for a .*ForObjectDetection, got '{given}'"):
        trainer(tmp_path, zoo.build(family), zoo.build(family, seed=1), distillation=loss)


def test_teacher_with_parameters_of_the_student(tmp_path: Path) -> None:
    student, teacher = zoo.build("rt_detr"), zoo.build("rt_detr", seed=1)
    teacher.model.backbone = student.model.backbone
    for make in (lambda: distillation_loss(student, teacher), lambda: trainer(tmp_path, student, teacher)):
        with pytest.raises(ValueError, match=r"parameters of its own.*deepcopy"):
            make()
    assert all(one.requires_grad for one in student.model.decoder.parameters())


def test_classes_reach_the_loss(tmp_path: Path) -> None:
    """A teacher that is the student with its classes in another order has nothing to teach, by the map."""
    student, teacher = model("dog", "cat", "bird"), model("bird", "dog", "cat")
    teacher.load_state_dict(student.state_dict())
    order = torch.tensor([2, 0, 1])  # of each class of the teacher, the student's
    assert match_classes(student, teacher) == order.tolist()
    logits, boxes = torch.randn(1, 2, 5, 3), torch.rand(1, 2, 5, 4)
    targets = dkl.pad_targets([{"labels": torch.tensor([0]), "boxes": torch.rand(1, 4)}] * 2)
    for class_map, same in ((match_classes(student, teacher), True), ([0, 1, 2], False)):
        loss = distillation_loss(student, teacher, terms=[dkl.LogitsTerm()], class_map=class_map)
        terms = loss(dkl.DetectorOutput(logits, boxes), dkl.DetectorOutput(logits[..., order], boxes), targets)
        assert (terms["loss_kd_class"].abs().item() < 1e-5) is same
