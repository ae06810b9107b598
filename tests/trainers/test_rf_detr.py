"""RF-DETR, with its own Lightning module: mixed precision, accumulation, its average of weights, clipping."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

pytest.importorskip("rfdetr", reason="`make trainers` installs rfdetr")

import pytorch_lightning as pl
from rfdetr.config import RFDETRNanoConfig, TrainConfig
from rfdetr.models._defaults import MODEL_DEFAULTS
from rfdetr.models.lwdetr import build_model_from_config, nested_tensor_from_tensor_list
from rfdetr.training import RFDETREMACallback, module_model

from trainers.rf_detr import DistilledModule

from support.real_trainers import check_reading, check_traces, images, targets
from support.rf_detr_together import Training, batch, be_one_of_two
from support.two_processes import run_together

pytestmark = pytest.mark.filterwarnings("ignore")  # of Lightning and of the packages that it loads
OFFLINE = dataclasses.replace(MODEL_DEFAULTS, force_no_pretrain=True)
CLASSES = 90


def configuration(**options: Any) -> RFDETRNanoConfig:
    sizes = {"num_queries": 20, "num_select": 20, "group_detr": 3}
    return RFDETRNanoConfig(device="cpu", pretrain_weights=None, **(sizes | options))


def build(seed: int = 0, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    return build_model_from_config(configuration(**options), defaults=OFFLINE)


def samples(size: int = 128, seed: int = 0) -> Any:
    return nested_tensor_from_tensor_list(list(images(size, seed=seed)))


def test_reading() -> None:
    """Of groups the first alone; boxes as shifts and log-scales."""
    train = lambda model: model(samples(), targets(CLASSES))  # noqa: E731
    teacher = build(1, num_queries=30, num_select=30, dec_layers=3)
    check_reading(build(), teacher, lambda model: model(samples()), train, layers=2, queries=20)


class Batches(torch.utils.data.IterableDataset):
    def __len__(self) -> int:
        return 4

    def __iter__(self) -> Iterator[Any]:
        for seed, size in enumerate((128, 160, 128, 192)):
            yield samples(size, seed), targets(CLASSES, seed=seed)


def test_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        module_model, "build_model_from_config", lambda *given: build_model_from_config(*given, OFFLINE)
    )
    options = {"epochs": 1, "batch_size": 2, "num_workers": 0, "tensorboard": False, "wandb": False}
    teacher = build(1, num_queries=30, num_select=30, dec_layers=3)
    torch.manual_seed(0)
    module = DistilledModule(configuration(), TrainConfig(dataset_dir=".", output_dir=".", **options), teacher)
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        precision="bf16-mixed",
        accumulate_grad_batches=2,
        gradient_clip_val=0.1,
        callbacks=[RFDETREMACallback()],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, torch.utils.data.DataLoader(Batches(), batch_size=None))
    logged = trainer.callback_metrics
    assert all(logged[f"train/{name}"].isfinite() for name in module.criterion.distillation.names)
    assert module.criterion.counted.startswith("the engine reads `weight_dict`")
    assert not [name for name in module.state_dict() if "teacher" in name]
    check_traces(module.model, build(), teacher)
    assert module.criterion.check(lambda model: model(samples()), targets(CLASSES))


def test_two_processes(tmp_path: Path) -> None:
    """All losses move every weight as in one process; an overflow in one of them stops neither."""
    run_together(be_one_of_two, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert_close(first, second, rtol=0, atol=0)
    alone = Training(together=False).step(*batch())
    assert_close(first[0], alone, rtol=1e-7, atol=1e-9)
    moved = {name for name, movement in alone.items() if movement.any()}
    learned = {name.partition(".")[0] for name in moved}
    assert learned >= {"backbone", "transformer", "bbox_embed", "class_embed", "distillation", "query_projection"}
    assert not any(movement.any() for movement in first[1].values())
    assert {name for name, movement in first[2].items() if movement.any()} >= moved
