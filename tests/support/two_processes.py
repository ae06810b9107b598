"""Processes that train together: how a test starts them, and one step of DistillationTrainer in each."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import detr_kd_losses as dkl

from support import zoo

IMAGES = 4
TIMEOUT = 60  # seconds, for the processes of a test together


def run_together(work: Callable[..., None], *arguments: Any, world_size: int = 2) -> None:
    """Call `work(rank, *arguments)` in processes of one gloo group; fail if one does, or if they hang."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = time.monotonic()
    context = torch.multiprocessing.spawn(
        _process, args=(world_size, port, work, arguments), nprocs=world_size, join=False
    )
    try:
        while not context.join(timeout=1):
            assert time.monotonic() - start < TIMEOUT, f"the processes hang for {TIMEOUT} s"
    finally:
        for process in context.processes:
            process.kill()


def _process(rank: int, world_size: int, port: int, work: Callable[..., None], arguments: tuple) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT // 2))
    work(rank, *arguments)
    dist.destroy_process_group()


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


def replica(rank: int, output: Path) -> None:
    """Leave the step of one of two processes in a file."""
    torch.save(step_of_gradient_descent(output, world_size=2), output / f"replica_{rank}.pt")
