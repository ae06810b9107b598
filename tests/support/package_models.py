"""Models and losses of trainers that are packages, small: what tests/trainers.sh installs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from support.real_trainers import images, targets
from support.repository_models import Subject


def pydfine() -> Subject:
    from dfine.backends.native import DFINE, DFINECriterion
    from dfine.config import DFINEConfig

    configuration = DFINEConfig.preset(
        "n", backbone_pretrained=False, num_classes=80, num_queries=30, num_top_queries=30, imgsz=128
    )
    criterion, pixels, truth = DFINECriterion.from_config(configuration).train(), images(), targets(80)

    def loss(outputs: Any) -> Tensor:
        return torch.stack(list(criterion(outputs, truth, epoch=0, step=0, global_step=0).values())).sum()

    return Subject(
        build=lambda: DFINE.from_config(configuration),
        call=lambda model: model(pixels),
        train=lambda model: model(pixels, targets=truth),
        classes=80,
        loss=loss,
        rate=8e-4,  # of D-FINE-N
    )


def rf_detr() -> Subject:
    from rfdetr.config import RFDETRNanoConfig, TrainConfig
    from rfdetr.models._defaults import MODEL_DEFAULTS
    from rfdetr.models.lwdetr import (
        build_criterion_from_config,
        build_model_from_config,
        nested_tensor_from_tensor_list,
    )

    offline = dataclasses.replace(MODEL_DEFAULTS, force_no_pretrain=True)
    configuration = RFDETRNanoConfig(device="cpu", pretrain_weights=None, num_queries=20, num_select=20, group_detr=3)
    training = TrainConfig(dataset_dir=".", output_dir=".", tensorboard=False)
    criterion = build_criterion_from_config(configuration, training)[0].train()
    samples, truth = nested_tensor_from_tensor_list(list(images())), targets(90)

    def loss(outputs: Any) -> Tensor:
        losses, weights = criterion(outputs, truth), criterion.weight_dict
        return torch.stack([losses[name] * weights[name] for name in losses if name in weights]).sum()

    return Subject(
        build=lambda: build_model_from_config(configuration, defaults=offline),
        call=lambda model: model(samples),
        train=lambda model: model(samples, truth),
        classes=90,
        loss=loss,
    )


def ultralytics() -> Subject:
    from ultralytics.nn.tasks import RTDETRDetectionModel

    pixels, batch = images(), yolo_batch(80)

    def build() -> nn.Module:
        model = RTDETRDetectionModel("rtdetr-resnet50.yaml", nc=80, verbose=False)
        model.nc, model.model[-1].num_queries = 80, 20
        return model

    return Subject(
        build=build,
        call=lambda model: model(pixels),
        train=lambda model: model.loss(batch),
        classes=80,
        loss=lambda outputs: outputs[0],
    )


def yolo_batch(classes: int, size: int = 128) -> dict[str, Tensor]:
    """As Ultralytics has it: boxes of all images in one list, with the image of each."""
    truth = targets(classes)
    owners = [torch.full_like(image["labels"], index) for index, image in enumerate(truth)]
    return {
        "img": images(size),
        "cls": torch.cat([image["labels"] for image in truth]).float().unsqueeze(1),
        "bboxes": torch.cat([image["boxes"] for image in truth]),
        "batch_idx": torch.cat(owners).float(),
    }


def write_yolo_data(folder: Path) -> Path:
    """Two pictures to train with and two to validate, in the format of YOLO; return the file that describes them."""
    import numpy as np
    from PIL import Image

    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (folder / kind / split).mkdir(parents=True)
        for index in range(2):
            pixels = generator.integers(0, 255, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "images" / split / f"{index}.jpg")
            (folder / "labels" / split / f"{index}.txt").write_text(f"{index} 0.5 0.5 0.4 0.5")
    data = folder / "data.yaml"
    data.write_text(f"path: {folder}\ntrain: images/train\nval: images/val\nnc: 2\nnames: {{0: a, 1: b}}\n")
    return data


PACKAGES = {"pydfine": pydfine, "rf_detr": rf_detr, "ultralytics": ultralytics}
