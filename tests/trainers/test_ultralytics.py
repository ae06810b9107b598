"""Ultralytics' RT-DETR, with its own trainer: two epochs, an average of weights, checkpoints of pickled models."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("ultralytics", reason="`make trainers` installs ultralytics")

from ultralytics.nn.tasks import RTDETRDetectionModel

from trainers.ultralytics_rt_detr import DistillingTrainer, targets_of

from support.package_models import write_yolo_data, yolo_batch
from support.real_trainers import check_reading, check_traces, images, targets

pytestmark = pytest.mark.filterwarnings("ignore")  # of the packages that it loads
MODEL = "rtdetr-resnet50.yaml"


def build(seed: int = 0) -> RTDETRDetectionModel:
    torch.manual_seed(seed)
    model = RTDETRDetectionModel(MODEL, nc=2, verbose=False)
    model.nc, model.model[-1].num_queries = 2, 20
    return model


def test_reading() -> None:
    train = lambda model: model.loss(yolo_batch(2))  # noqa: E731
    check_reading(build(), build(1), lambda model: model(images()), train, layers=6, queries=20)


def test_targets() -> None:
    given = targets_of(yolo_batch(2))
    assert given.mask.tolist() == [[True, True], [True, False]]
    assert given.boxes[1, 0].tolist() == targets(2)[1]["boxes"][0].tolist()


def test_epochs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(os.environ, "YOLO_OFFLINE", "true")
    data = write_yolo_data(tmp_path)
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
    names = {"loss_kd_class", "loss_kd_bbox", "loss_kd_giou", "loss_kd_feature", "loss_kd_group_class"}
    assert names < set(trainer.loss_names)
    assert all(f"train/{name}" in trainer.csv.read_text() for name in names)
    plain = RTDETRDetectionModel(MODEL, nc=2, verbose=False)
    check_traces(trainer.model, plain, DistillingTrainer.teacher)
    check_traces(trainer.ema.ema, plain, DistillingTrainer.teacher)
    saved = torch.load(trainer.last, weights_only=False)
    student = saved["ema"] if saved.get("model") is None else saved["model"]
    assert type(student) is RTDETRDetectionModel
    assert student.state_dict().keys() == plain.state_dict().keys()
