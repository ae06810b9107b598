"""What a Trainer loads is what was saved: the whole student, its projections, and the optimizer's state of both."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

pytest.importorskip("transformers", reason="the Hugging Face trainer needs transformers")
pytest.importorskip("accelerate", reason="the Hugging Face trainer needs accelerate")

import transformers

from hf_transformers.checkpoints import RestoringTrainer, restore
from hf_transformers.coco_shapes import collate
from hf_transformers.train import rt_detr, training_arguments
from hf_transformers.trainer import DistillationTrainer

from support import zoo

EXACT = {"rtol": 0, "atol": 0}
ITEM = {
    "pixel_values": torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0)),
    "labels": {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.3, 0.3]])},
}

# The Trainer loads and saves through libraries that warn about themselves.
pytestmark = pytest.mark.filterwarnings("default::DeprecationWarning", "default::FutureWarning")


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


class Begin(transformers.TrainerCallback):
    """Keeps what a run begins with."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.student = state_of(model)
        self.step = state.global_step


def trainer(output: Path, *, seed: int, steps: int, width: int | None = 64, **options: Any) -> Any:
    """A run under a teacher of `width`, None: without."""
    torch.manual_seed(seed)
    student = rt_detr(width=32, decoder_layers=1, num_queries=8)
    with torch.no_grad():
        for tensor in student.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.01 * torch.rand(tensor.shape))  # so that no tensor is the same in all fresh models
    arguments = training_arguments(
        output, steps=steps, batch_size=2, **{"save_steps": 1, "learning_rate": 1e-3} | options
    )
    data = {"train_dataset": [ITEM] * 8, "eval_dataset": [ITEM] * 2, "data_collator": collate}
    if width is None:
        made: Any = RestoringTrainer(model=student, args=arguments, **data)
    else:
        teacher = rt_detr(width=width, decoder_layers=2, num_queries=12)
        made = DistillationTrainer(model=student, teacher=teacher, args=arguments, **data)
    made.begin = Begin()
    made.add_callback(made.begin)
    return made


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_every_family_is_restored_whole(family: str, tmp_path: Path) -> None:
    saved, other = zoo.build(family), zoo.build(family)
    with torch.no_grad():
        for tensor in [*other.parameters(), *other.buffers()]:
            if tensor.is_floating_point():
                tensor.add_(1.0)
    saved.save_pretrained(tmp_path)
    restore(other, tmp_path)
    assert_close(state_of(other), state_of(saved), **EXACT)


@pytest.mark.parametrize("width", [None, 32, 64])
def test_resumed_run_begins_with_the_whole_student(width: int | None, tmp_path: Path) -> None:
    """Without a teacher, under one of the same width, and under a wider one."""
    first = trainer(tmp_path, seed=1, steps=1, width=width)
    first.train()
    resumed = trainer(tmp_path, seed=2, steps=2, width=width)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert resumed.begin.step == 1
    assert resumed.state.global_step == 2
    assert_close(resumed.begin.student, state_of(first.model), **EXACT)


def test_weights_in_several_files_are_restored(tmp_path: Path) -> None:
    saved, other = (trainer(tmp_path, seed=seed, steps=1, width=None) for seed in (1, 2))
    saved.model.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    other._load_from_checkpoint(str(tmp_path / "shards"))
    assert_close(state_of(other.model), state_of(saved.model), **EXACT)


def test_best_model_is_loaded_whole_with_its_projections(tmp_path: Path) -> None:
    options = {
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
        "eval_strategy": "steps",
        "eval_steps": 1,
    }
    run = trainer(tmp_path, seed=1, steps=3, **options)
    seen: dict[str, Any] = {}

    class Keep(transformers.TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            seen[f"checkpoint-{state.global_step}"] = state_of(model), state_of(run.projections)

    run.add_callback(Keep)
    losses = iter([2.0, 1.0, 3.0])
    run.evaluation_loop = lambda *_, **__: transformers.trainer_utils.EvalLoopOutput(
        None, None, {"eval_loss": next(losses)}, 2
    )
    run.train()
    student, projections = seen["checkpoint-2"]
    assert_close(state_of(run.model), student, **EXACT)
    assert_close(state_of(run.projections), projections, **EXACT)


def test_mixed_dtypes_are_kept(tmp_path: Path) -> None:
    """A model in bfloat16 stays one, with the values that were saved."""
    saved, other = (trainer(tmp_path, seed=seed, steps=1, width=None).model.bfloat16() for seed in (1, 2))
    saved.save_pretrained(tmp_path / "bf16")
    restore(other, tmp_path / "bf16")
    assert_close(state_of(other), state_of(saved), **EXACT)


def test_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    rt_detr(width=32, decoder_layers=2, num_queries=8).save_pretrained(tmp_path / "deeper")
    rt_detr(width=32, decoder_layers=1, num_queries=8).save_pretrained(tmp_path / "shallower")
    with pytest.raises(ValueError, match=r"as a whole: 0 .* are missing .* of another model .* same configuration"):
        restore(rt_detr(width=32, decoder_layers=1, num_queries=8), tmp_path / "deeper")
    with pytest.raises(ValueError, match=r"as a whole: \d\d .* are missing"):
        restore(rt_detr(width=32, decoder_layers=2, num_queries=8), tmp_path / "shallower")


@pytest.mark.parametrize("width", [32, 64])
def test_run_without_a_teacher_goes_on_with_one(width: int, tmp_path: Path) -> None:
    """A teacher of the same width has nothing to load; the projections of another begin, and a warning says so."""
    first = trainer(tmp_path, seed=1, steps=1, width=None)
    first.train()
    before = copy.deepcopy(first.optimizer.state_dict()["state"])
    resumed = trainer(tmp_path, seed=2, steps=3, width=width)
    start = state_of(resumed.projections)
    loaded = []

    class Look(transformers.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            loaded.append(copy.deepcopy(resumed.optimizer.state_dict()))

    resumed.add_callback(Look)
    checkpoint = str(tmp_path / "checkpoint-1")
    if width == 32:
        resumed.train(resume_from_checkpoint=checkpoint)
    else:
        with pytest.warns(UserWarning, match=r"checkpoint-1 has no distillation.pt.* start anew"):
            resumed.train(resume_from_checkpoint=checkpoint)
    assert_close(resumed.begin.student, state_of(first.model), **EXACT)
    assert_close(loaded[0]["state"], before, **EXACT)
    rates = [group["lr"] for group in loaded[1]["param_groups"]]
    assert len(set(rates)) == 1, "the projections are as far in the schedule as the student"
    if width != 32:
        name = "1.maps.content.weight"
        assert (resumed.projections.state_dict()[name] != start[name]).any(), "they learn"
    again = trainer(tmp_path, seed=3, steps=4, width=width)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert again.state.global_step == 4


def test_projections_of_another_teacher_are_refused(tmp_path: Path) -> None:
    trainer(tmp_path, seed=1, steps=1, width=64).train()
    for width in (128, 32):
        other = trainer(tmp_path, seed=2, steps=2, width=width)
        with pytest.raises(ValueError, match=r"distillation.pt must hold the projections of this .* from_pretrained"):
            other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_checkpoint_of_the_model_alone(tmp_path: Path) -> None:
    first = trainer(tmp_path, seed=1, steps=1, save_only_model=True)
    first.train()
    resumed = trainer(tmp_path, seed=2, steps=2)
    with pytest.warns(UserWarning, match=r"no distillation.pt, .* save_only_model"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert_close(resumed.begin.student, state_of(first.model), **EXACT)


def test_student_is_copied_after_training(tmp_path: Path) -> None:
    run = trainer(tmp_path, seed=1, steps=1, save_strategy="no")
    run.train()
    assert not any(module._forward_hooks for model in (run.model, run.teacher.module) for module in model.modules())
    assert_close(state_of(copy.deepcopy(run.model)), state_of(run.model), **EXACT)
