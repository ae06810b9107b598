"""One step of DistillationTrainer in a process of its own: what `test_hf_trainer` starts twice."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import detr_kd_losses as dkl

from support import zoo

IMAGES = 4


def task_loss(outputs: Any, labels: list[dict[str, Tensor]], num_items_in_batch: Any = None) -> Tensor:
    """A detection loss that is normalised over the processes; that of transformers is not."""
    targets = dkl.pad_targets(labels)
    assignment = dkl.match_targets(outputs.logits, outputs.pred_boxes, *targets)
    return torch.stack(
        list(dkl.detection_loss(outputs.logits, outputs.pred_boxes, *targets, assignment).values())
    ).sum()


def step_of_gradient_descent(output: Path, world_size: int) -> dict[str, Tensor]:
    """Train for one step with learning rate 1 on four images; return how every weight has moved."""
    from transformers import TrainingArguments

    from hf_transformers.coco_shapes import collate
    from hf_transformers.trainer import DistillationTrainer

    teacher = zoo.build("deformable_refine", seed=1, width=128, num_queries=20)
    student = zoo.build("deformable_refine", dropout=0.0)
    images = zoo.images(student, batch=IMAGES)["pixel_values"]
    targets = zoo.labels(batch=IMAGES)  # 3, 2, 1 and 3 objects: the processes have different numbers
    arguments = TrainingArguments(
        output_dir=str(output),
        use_cpu=True,
        ddp_backend="gloo" if world_size > 1 else None,
        max_steps=1,
        per_device_train_batch_size=IMAGES // world_size,
        optim="sgd",
        learning_rate=1.0,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = DistillationTrainer(
        model=student,
        teacher=teacher,
        args=arguments,
        train_dataset=[
            {"pixel_values": image, "labels": target} for image, target in zip(images, targets, strict=True)
        ],
        data_collator=collate,
        compute_loss_func=task_loss,
    )
    learned = {**dict(student.named_parameters()), **dict(trainer.projections.named_parameters())}
    before = {name: parameter.detach().clone() for name, parameter in learned.items()}
    trainer.train()
    return {name: before[name] - parameter.detach() for name, parameter in learned.items()}


def replica(rank: int, world_size: int, port: int, output: Path) -> None:
    """Be one of several processes, and leave the result in a file."""
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.save(step_of_gradient_descent(output, world_size), output / f"replica_{rank}.pt")
    torch.distributed.destroy_process_group()
