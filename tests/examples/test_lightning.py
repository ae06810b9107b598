"""The LightningModule runs, and saves a student without its teacher."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lightning.pytorch", reason="the Lightning example needs lightning")
pytest.importorskip("transformers", reason="the Lightning example needs transformers")

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from hf_transformers.coco_shapes import collate

from support import zoo

pytestmark = pytest.mark.filterwarnings("default")  # Lightning has advice on loggers, workers and devices

MODULE = Path(__file__).parents[2] / "examples" / "lightning" / "module.py"


@pytest.fixture
def example() -> Any:
    """The file itself: its folder has the name of the library."""
    specification = importlib.util.spec_from_file_location("lightning_example", MODULE)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_module_trains_and_saves_the_student_alone(example: Any, tmp_path: Path) -> None:
    student, teacher = zoo.build("rt_detr"), zoo.build("rt_detr", seed=1, width=128, num_queries=20)
    images, targets = zoo.images(student, batch=4)["pixel_values"], zoo.labels(batch=4)
    data = [{"pixel_values": image, "labels": target} for image, target in zip(images, targets, strict=True)]
    module = example.DistillationModule(student, teacher)
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    trainer = pl.Trainer(
        default_root_dir=tmp_path,
        max_steps=2,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(data, batch_size=2, collate_fn=collate))

    metrics = trainer.callback_metrics
    assert {"loss_task", "loss_kd_class", "loss_kd_feature", "loss_kd_group_class"} <= metrics.keys()
    assert all(torch.isfinite(value) for value in metrics.values())
    moved = {name.split(".")[0] for name, parameter in module.named_parameters() if (parameter != before[name]).any()}
    assert moved == {"student", "distillation", "query_projection"}
    assert not teacher.training
    saved = torch.load(next(tmp_path.rglob("*.ckpt")), weights_only=True)["state_dict"]
    assert {name.split(".")[0] for name in saved} == {"student", "distillation", "query_projection"}
