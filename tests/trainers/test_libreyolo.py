"""LibreYOLO's RT-DETR, with its own trainer: an epoch with an average of weights, validation and checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("libreyolo", reason="`make trainers` installs libreyolo")

from libreyolo.models.rtdetr import nn as modules
from libreyolo.models.rtdetr.model import LibreRTDETR

from trainers.libreyolo_rt_detr import DistillingTrainer

from support.package_models import write_yolo_data
from support.real_trainers import check_traces

pytestmark = pytest.mark.filterwarnings("ignore")  # of the packages that it loads


def build(seed: int = 0) -> LibreRTDETR:
    torch.manual_seed(seed)
    return LibreRTDETR(size="r18", nb_classes=2, device="cpu")


def test_epoch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    backbone = modules.PResNet
    offline = lambda *given, **options: backbone(*given, **options | {"pretrained": False})  # noqa: E731
    monkeypatch.setattr(modules, "PResNet", offline)
    made: list[DistillingTrainer] = []

    class Kept(DistillingTrainer):
        teacher: nn.Module = build(1).model

        def _setup_optimizer(self) -> torch.optim.Optimizer:
            made.append(self)
            return super()._setup_optimizer()

    monkeypatch.setattr(LibreRTDETR, "_get_trainer_class", classmethod(lambda _: Kept))
    student = build()
    options = {"epochs": 2, "batch": 2, "imgsz": 128, "workers": 0, "device": "cpu"}
    found = student.train(data=str(write_yolo_data(tmp_path)), **options)
    (trainer,) = made
    assert trainer.criterion.counted.endswith("those of the distillation are added to its 'total_loss'")
    assert torch.tensor(found["epoch_losses"]).isfinite().all()
    plain = build().model
    check_traces(student.model, plain, Kept.teacher)
    check_traces(trainer.ema_model.ema, plain, Kept.teacher)
    saved = torch.load(found["last_checkpoint"], weights_only=False)
    assert saved["model"].keys() == plain.state_dict().keys()
