"""The LightningModule runs, saves a student without its teacher, and resumes with what it has saved."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lightning.pytorch", reason="the Lightning example needs lightning")
pytest.importorskip("transformers", reason="the Lightning example needs transformers")

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.testing import assert_close
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


def run(example: Any, folder: Path, module: Any, *, steps: int, checkpoint: Path | None = None, **options: Any) -> Any:
    """Train on one image again and again; return the module's state at the start, and the gradients of each step."""
    item = {"pixel_values": zoo.images(module.student, batch=1)["pixel_values"][0], "labels": zoo.labels(batch=1)[0]}
    begin: dict[str, Tensor] = {}
    gradients: list[dict[str, Tensor]] = []

    class Record(pl.Callback):
        def on_train_start(self, trainer: Any, module: Any) -> None:
            begin.update({name: tensor.clone() for name, tensor in module.state_dict().items()})

        def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
            named = module.named_parameters()
            gradients.append({name: one.grad.clone() for name, one in named if one.grad is not None})

    trainer = pl.Trainer(
        default_root_dir=folder,
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Record()],
        **options,
    )
    trainer.fit(module, DataLoader([item] * 8, batch_size=1, collate_fn=collate), ckpt_path=checkpoint)
    return begin, gradients, trainer


def module_of(example: Any, *, seed: int, teacher_width: int = 128, family: str = "rt_detr", **options: Any) -> Any:
    teacher = zoo.build(family, seed=9, width=teacher_width, num_queries=20)
    return example.DistillationModule(zoo.build(family, seed=seed, **options), teacher)


@pytest.mark.parametrize("teacher_width", [64, 128])
def test_resumed_run_begins_with_the_whole_module(example: Any, teacher_width: int, tmp_path: Path) -> None:
    first = module_of(example, seed=1, teacher_width=teacher_width)
    _, _, trainer = run(example, tmp_path, first, steps=1)
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    second = module_of(example, seed=2, teacher_width=teacher_width)
    begin, _, trainer = run(example, tmp_path, second, steps=2, checkpoint=tmp_path / "first.ckpt")
    assert trainer.global_step == 2
    assert_close(begin, dict(first.state_dict()), rtol=0, atol=0)
    loaded = example.DistillationModule.load_from_checkpoint(
        tmp_path / "first.ckpt",
        student=zoo.build("rt_detr", seed=3),
        teacher=zoo.build("rt_detr", seed=9, width=teacher_width, num_queries=20),
    )
    assert_close(dict(loaded.state_dict()), dict(first.state_dict()), rtol=0, atol=0)


def test_accumulated_gradient_is_that_of_one_batch(example: Any, tmp_path: Path) -> None:
    seen = []
    for count in (1, 4):
        module = module_of(example, seed=1, family="deformable_refine", dropout=0.0)
        module.warmup, module.learning_rate = 1e-9, 0.0  # the schedule is 0 in the first step, and 1 in the second
        _, gradients, _ = run(example, tmp_path, module, steps=2, accumulate_grad_batches=count)
        seen.append(gradients[1])
    assert seen[0].keys() == seen[1].keys()
    assert any(gradient.any() for name, gradient in seen[0].items() if name.startswith("distillation"))
    for name, expected in seen[0].items():
        assert_close(seen[1][name], expected, rtol=0, atol=1e-6 + 5e-3 * expected.abs().max().item())


def test_module_is_copied_and_trains_after_an_evaluation(example: Any, tmp_path: Path) -> None:
    module = module_of(example, seed=1)
    run(example, tmp_path, module, steps=1)
    other = copy.deepcopy(module)
    assert_close(dict(other.state_dict()), dict(module.state_dict()), rtol=0, atol=0)
    assert other.teacher.module is module.teacher.module
    assert not any(part._forward_hooks for part in [*other.student.modules(), *module.teacher.module.modules()])
    module.student.eval()
    trains = []
    hook = module.student.register_forward_pre_hook(lambda student, _: trains.append(student.training))
    run(example, tmp_path, module, steps=1)
    hook.remove()
    assert trains == [True]
    assert not module.teacher.module.training
