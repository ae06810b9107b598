"""Ultralytics' RT-DETR, with its own trainer: two epochs, an average of weights, checkpoints of pickled models."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("ultralytics", reason="`make trainers` installs ultralytics")

import numpy as np
from PIL import Image
from ultralytics.nn.tasks import RTDETRDetectionModel

from trainers.ultralytics_rt_detr import DistilledModel, DistillingTrainer, targets_of

from support.real_trainers import check_reading, images, targets

pytestmark = pytest.mark.filterwarnings("ignore")  # of the packages that it loads
MODEL = "rtdetr-resnet50.yaml"


def build(seed: int = 0) -> RTDETRDetectionModel:
    torch.manual_seed(seed)
    model = RTDETRDetectionModel(MODEL, nc=2, verbose=False)
    model.nc, model.model[-1].num_queries = 2, 20
    return model


def batch(size: int = 128) -> dict:
    truth = targets(2)
    owners = [torch.full_like(image["labels"], index) for index, image in enumerate(truth)]
    return {
        "img": images(size),
        "cls": torch.cat([image["labels"] for image in truth]).float().unsqueeze(1),
        "bboxes": torch.cat([image["boxes"] for image in truth]),
        "batch_idx": torch.cat(owners).float(),
    }


def test_reading() -> None:
    train = lambda model: model.loss(batch())  # noqa: E731
    check_reading(build(), build(1), lambda model: model(images()), train, layers=6, queries=20)


def test_targets() -> None:
    given = targets_of(batch())
    assert given.mask.tolist() == [[True, True], [True, False]]
    assert given.boxes[1, 0].tolist() == targets(2)[1]["boxes"][0].tolist()


def test_epochs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(os.environ, "YOLO_OFFLINE", "true")
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for folder in ("images", "labels"):
            (tmp_path / folder / split).mkdir(parents=True)
        for index in range(2):
            pixels = generator.integers(0, 255, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / split / f"{index}.jpg")
            (tmp_path / "labels" / split / f"{index}.txt").write_text(f"{index} 0.5 0.5 0.4 0.5")
    data = tmp_path / "data.yaml"
    data.write_text(f"path: {tmp_path}\ntrain: images/train\nval: images/val\nnames: {{0: a, 1: b}}\n")
    DistillingTrainer.teacher = build(1)
    options = {
        "imgsz": 64,
        "epochs": 2,
        "batch": 2,
        "workers": 0,
        "device": "cpu",
        "plots": False,
        "optimizer": "AdamW",
    }
    trainer = DistillingTrainer(overrides={"model": MODEL, "data": str(data), "project": str(tmp_path), **options})
    trainer.train()
    names = trainer.model.distillation.names
    assert set(names) < set(trainer.loss_names)
    assert all(f"train/{name}" in trainer.csv.read_text() for name in names)
    saved = torch.load(trainer.last, weights_only=False)
    student = saved["ema"] if saved.get("model") is None else saved["model"]
    assert isinstance(student, DistilledModel)
    assert repr(student.teacher) == "FrozenTeacher(None)"
    assert student.state_dict().keys() == RTDETRDetectionModel(MODEL, nc=2, verbose=False).state_dict().keys()
