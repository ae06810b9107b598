"""Micro-batches and processes: an optimizer's step of DistillationTrainer is that of one batch, and nobody waits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

pytest.importorskip("transformers", reason="the Hugging Face trainer needs transformers")
pytest.importorskip("accelerate", reason="the Hugging Face trainer needs accelerate")

import transformers

import detr_kd_losses as dkl
from hf_transformers.coco_shapes import collate
from hf_transformers.train import training_arguments
from hf_transformers.trainer import DistillationTrainer, average_gradients

from support import zoo
from support.two_processes import run_together

# The Trainer loads and saves through libraries that warn about themselves.
pytestmark = pytest.mark.filterwarnings("default::DeprecationWarning", "default::FutureWarning")

IMAGES = 4


def one_object_each() -> list[dict[str, Any]]:
    pixels = zoo.images(zoo.build("deformable_refine"), batch=IMAGES)["pixel_values"]
    labels = [{name: tensor[:1] for name, tensor in label.items()} for label in zoo.labels(batch=IMAGES)]
    return [{"pixel_values": image, "labels": label} for image, label in zip(pixels, labels, strict=True)]


class Ordered(DistillationTrainer):
    """Takes the images in their order, and may count objects, which the Trainer itself does not for detectors."""

    counts_objects = False

    def _get_train_sampler(self, *_: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def _get_num_items_in_batch(self, batches: list[Any], device: Any) -> int | None:
        if not self.counts_objects:
            return super()._get_num_items_in_batch(batches, device)
        return sum(len(label["boxes"]) for batch in batches for label in batch["labels"])


def mean_over_images(outputs: Any, labels: list[Any], num_items_in_batch: Any = None) -> Tensor:
    return outputs.logits.square().mean() + outputs.pred_boxes.square().mean()


def sum_over_objects(outputs: Any, labels: list[Any], num_items_in_batch: Any = None) -> Tensor:
    assert num_items_in_batch == IMAGES
    return mean_over_images(outputs, labels) * len(labels) / num_items_in_batch


def mean_of_half(outputs: Any, labels: list[Any], num_items_in_batch: Any = None) -> Tensor:
    return mean_over_images(outputs, labels) * len(labels) / IMAGES


def gradients(
    output: Path, micro_batches: int, loss: Callable[..., Tensor] | None, counts: bool, scaled: bool | None
) -> dict[str, Tensor]:
    torch.manual_seed(0)
    teacher = zoo.build("deformable_refine", seed=1, width=128, num_queries=20)
    student = zoo.build("deformable_refine", dropout=0.0)
    arguments = training_arguments(
        output,
        steps=1,
        batch_size=IMAGES // micro_batches,
        gradient_accumulation_steps=micro_batches,
        learning_rate=0.0,
        save_strategy="no",
        max_grad_norm=0.0,
    )
    trainer = Ordered(
        model=student,
        teacher=teacher,
        args=arguments,
        train_dataset=one_object_each(),
        data_collator=collate,
        compute_loss_func=loss,
    )
    trainer.counts_objects = counts
    if scaled is not None:
        trainer.loss_is_scaled_for_ga = scaled
    seen: dict[str, Tensor] = {}

    class Record(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            for part in (student, trainer.projections):
                seen.update({name: one.grad.clone() for name, one in part.named_parameters() if one.grad is not None})

    trainer.add_callback(Record)
    trainer.train()
    return seen


@pytest.mark.parametrize(
    ("loss", "counts", "scaled"),
    [
        (None, False, None),
        (None, True, None),  # whatever a subclass counts, the model's own loss does not know of it
        (mean_of_half, False, None),  # the Trainer takes a loss function to divide by itself
        (sum_over_objects, True, None),
        (mean_over_images, False, False),  # unless it is told otherwise
    ],
    ids=["model's loss", "model's loss, counted", "function", "function of the count", "function of a batch"],
)
def test_accumulated_gradient_is_that_of_one_batch(
    loss: Any, counts: bool, scaled: bool | None, tmp_path: Path
) -> None:
    if scaled is not None and not hasattr(transformers.Trainer, "loss_is_scaled_for_ga"):
        pytest.skip("this version of transformers has no loss_is_scaled_for_ga")
    expected = gradients(tmp_path, 1, loss, counts, scaled)
    assert any("terms.feature" in name for name in expected), "projections as well"
    for micro_batches in (2, 4):
        actual = gradients(tmp_path, micro_batches, loss, counts, scaled)
        assert actual.keys() == expected.keys()
        for name, gradient in expected.items():
            atol = 1e-6 + 5e-3 * gradient.abs().max().item()
            assert_close(actual[name], gradient, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


def average_and_train(rank: int, folder: Path) -> None:
    """What happens to one of two processes."""
    weights = [torch.nn.Parameter(torch.zeros(size)) for size in (2, 3, 4)]
    weights[0].grad = torch.full((2,), 1.0 + rank)
    if rank == 0:
        weights[1].grad = torch.full((3,), 4.0)

    def reduce(flat: Tensor, reduction: str) -> Tensor:
        torch.distributed.all_reduce(flat)
        return flat / 2

    average_gradients(weights, reduce)
    torch.save([weight.grad for weight in weights], folder / f"gradients_{rank}.pt")
    torch.save(steps_in_which_things_happen(rank, folder), folder / f"steps_{rank}.pt")


def steps_in_which_things_happen(rank: int, folder: Path) -> dict[str, Any]:
    """Step 0 is ordinary; in 1 all weights are 0, in 2 that of the features; in 3 a process has no object."""
    teacher = zoo.build("deformable_refine", seed=1, width=128, num_queries=20)
    student = zoo.build("deformable_refine", dropout=0.0)
    images = one_object_each()[:1] * 10
    images[7] = {**images[7], "labels": {name: tensor[:0] for name, tensor in images[7]["labels"].items()}}
    trainer = Ordered(
        model=student,
        teacher=teacher,
        args=training_arguments(folder, steps=5, batch_size=1, save_strategy="no", warmup_steps=0, logging_steps=1),
        train_dataset=images,
        data_collator=collate,
        schedule={name: lambda progress: float(progress != 0.2) for name in ("logits", "query_group")}
        | {"feature": lambda progress: float(progress not in (0.2, 0.4))},
    )
    moved: list[list[bool]] = []
    projections = list(trainer.projections.parameters())

    class Happenings(transformers.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if rank == 0:
                trainer.log({"loss": 0.0})  # by one process alone
            self.before = [one.detach().clone() for one in projections]

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            moved.append([not torch.equal(a, b) for a, b in zip(self.before, projections, strict=True)])

    trainer.add_callback(Happenings)
    trainer.train()
    logged = [sorted(name for name in entry if "kd" in name) for entry in trainer.state.log_history if "epoch" in entry]
    return {"moved": moved, "logged": logged, "projections": dict(trainer.projections.state_dict())}


def test_processes_do_not_wait_for_each_other(tmp_path: Path) -> None:
    run_together(average_and_train, tmp_path)
    gradients = [torch.load(tmp_path / f"gradients_{rank}.pt", weights_only=True) for rank in range(2)]
    for first, second, missing in gradients:
        assert_close(first, torch.full((2,), 1.5))
        assert_close(second, torch.full((3,), 2.0))
        assert missing is None
    first, second = (torch.load(tmp_path / f"steps_{rank}.pt", weights_only=True) for rank in range(2))
    assert_close(first["projections"], second["projections"], rtol=0, atol=0)
    assert first["moved"] == second["moved"]
    ordinary, stopped, _, no_objects, last = first["moved"]
    assert not any(stopped), "what has no gradient in any process is left alone"
    assert all(map(any, (ordinary, no_objects, last)))
    assert len([names for names in second["logged"] if names]) == 4
    assert second["logged"][0] == sorted(dkl.DETRDistillationLoss().names)
