"""What tap, teacher, replay and criterion cost beside the own step of three trainers, on one core, for the cost page.

    tests/trainers.sh PYTHON tests/trainers/cost.py

Time is that of the process, so that neighbours on the machine do not count. Memory is what is held for the backward
pass at the end of the forward pass, each storage once: the same on every device.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import detr_kd_losses as dkl
from detr_kd_losses.taps import QueryProjection, Tap, distillation_loss

from support.real_trainers import images, targets
from support.torchvision_on_cpu import import_torchvision

SIZE, BATCH, CLASSES, STEPS = 320, 2, 80, 3


class Trainer(NamedTuple):
    """A student and its teacher, the own step up to the loss, and how the teacher is called."""

    student: nn.Module
    teacher: nn.Module
    loss: Callable[[], Tensor]
    call: Callable[[nn.Module], Any]
    levels: tuple[list[int] | None, list[int] | None] = (None, None)


def pydfine() -> Trainer:
    from dfine.backends.native import DFINE, DFINECriterion
    from dfine.config import DFINEConfig

    configurations = [DFINEConfig.preset(size, backbone_pretrained=False, imgsz=SIZE) for size in "ns"]
    student, teacher = map(DFINE.from_config, configurations)
    criterion, pixels, truth = DFINECriterion.from_config(configurations[0]), images(SIZE, BATCH), targets(CLASSES)

    def loss() -> Tensor:
        return sum(criterion(student(pixels, targets=truth), truth, epoch=0, step=0, global_step=0).values())

    return Trainer(student, teacher, loss, lambda model: model(pixels), ([0, 1], [1, 2]))


def rf_detr() -> Trainer:
    from rfdetr.config import RFDETRNanoConfig, RFDETRSmallConfig, TrainConfig
    from rfdetr.models._defaults import MODEL_DEFAULTS
    from rfdetr.models.lwdetr import (
        build_criterion_from_config,
        build_model_from_config,
        nested_tensor_from_tensor_list,
    )

    offline = dataclasses.replace(MODEL_DEFAULTS, force_no_pretrain=True)
    configurations = [kind(device="cpu", pretrain_weights=None) for kind in (RFDETRNanoConfig, RFDETRSmallConfig)]
    student, teacher = (build_model_from_config(one, defaults=offline) for one in configurations)
    training = TrainConfig(dataset_dir=".", output_dir=".", tensorboard=False)
    criterion = build_criterion_from_config(configurations[0], training)[0].train()
    pixels, truth = nested_tensor_from_tensor_list(list(images(SIZE, BATCH))), targets(CLASSES)

    def loss() -> Tensor:
        losses = criterion(student(pixels, truth), truth)
        return sum(losses[name] * weight for name, weight in criterion.weight_dict.items() if name in losses)

    return Trainer(student, teacher, loss, lambda model: model(pixels))


def ultralytics() -> Trainer:
    from ultralytics.nn.tasks import RTDETRDetectionModel

    student, teacher = (
        RTDETRDetectionModel(f"rtdetr-{name}.yaml", nc=CLASSES, verbose=False) for name in ("l", "resnet50")
    )
    student.nc, pixels, truth = CLASSES, images(SIZE, BATCH), targets(CLASSES)
    batch = {
        "img": pixels,
        "cls": torch.cat([image["labels"] for image in truth]).float(),
        "bboxes": torch.cat([image["boxes"] for image in truth]),
        "batch_idx": torch.cat([torch.full_like(image["labels"], index) for index, image in enumerate(truth)]),
    }
    return Trainer(student, teacher, lambda: student.loss(batch)[0], lambda model: model(pixels))


class Held:
    """Bytes of the storages that autograd keeps, each once; without parameters, which are there anyway."""

    def __init__(self, model: nn.Module) -> None:
        self.known = {parameter.untyped_storage().data_ptr() for parameter in (*model.parameters(), *model.buffers())}
        self.kept: dict[int, int] = {}

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.known:
            self.kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    @property
    def mebibytes(self) -> float:
        return sum(self.kept.values()) / 2**20


def step(trainer: Trainer, criterion: nn.Module, projection: nn.Module, held: Held) -> dict[str, float]:
    """Seconds of each part of one step, and what is held after the own loss and after ours."""
    seconds, last = {}, time.process_time()

    def stop(name: str) -> None:
        nonlocal last
        now = time.process_time()
        seconds[name], last = now - last, now

    with torch.no_grad(), Tap(trainer.teacher) as teacher_tap:
        trainer.call(trainer.teacher)
    teacher_output = teacher_tap.output(levels=trainer.levels[1])
    stop("teacher")
    with torch.autograd.graph.saved_tensors_hooks(held.pack, lambda tensor: tensor):
        with Tap(trainer.student) as tap:
            loss = trainer.loss()
        seconds["held by the own step, MiB"] = held.mebibytes
        stop("own forward")
        output = tap.output(projection(teacher_tap.query_group()), levels=trainer.levels[0])
        stop("reading and replay")
        loss = loss + sum(criterion(output, teacher_output, dkl.pad_targets(targets(CLASSES))).values())
        stop("criterion")
    seconds["held more, MiB"] = held.mebibytes - seconds["held by the own step, MiB"]
    loss.backward()
    stop("backward of all")
    return seconds


def own_backward(trainer: Trainer) -> float:
    loss = trainer.loss()
    before = time.process_time()
    loss.backward()
    return time.process_time() - before


def main() -> None:
    torch.set_num_threads(1)
    import_torchvision()
    print(f"{SIZE} px, batch {BATCH}, PyTorch {torch.__version__}, one core, medians of {STEPS} steps")  # noqa: T201
    for build in (pydfine, rf_detr, ultralytics):
        torch.manual_seed(0)
        trainer = build()
        trainer.student.train()
        trainer.teacher.eval()
        levels = None if trainer.levels[0] is None else len(trainer.levels[0])
        criterion = distillation_loss(trainer.student, trainer.teacher, levels=levels)
        projection = QueryProjection(trainer.student, trainer.teacher)
        steps = [step(trainer, criterion, projection, Held(trainer.student)) for _ in range(STEPS + 1)][1:]
        found = {name: statistics.median(one[name] for one in steps) for name in steps[0]}
        found["own backward"] = statistics.median(own_backward(trainer) for _ in range(STEPS))
        shown = " | ".join(f"{name} {value:.3g}" for name, value in found.items())
        print(build.__name__, "|", shown, flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
