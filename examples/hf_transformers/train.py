"""Train an RT-DETR, distil it into a smaller one, and load the result in plain transformers.

Run from the folder `examples`:

    python -m hf_transformers.train                 # a few minutes on one CPU core
    torchrun --nproc-per-node 2 -m hf_transformers.train
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    RTDetrConfig,
    RTDetrForObjectDetection,
    RTDetrResNetConfig,
    TrainingArguments,
    set_seed,
)

from hf_transformers.checkpoints import RestoringTrainer
from hf_transformers.coco_shapes import CLASSES, collate, make_shapes
from hf_transformers.trainer import DistillationTrainer
from hf_transformers.voc import open_detection


def rt_detr(
    *, width: int, decoder_layers: int, num_queries: int, class_names: Sequence[str] = CLASSES
) -> RTDetrForObjectDetection:
    """Build a small RT-DETR, with random weights."""
    backbone = RTDetrResNetConfig(
        embedding_size=16,
        hidden_sizes=[16, 32, 64, 128],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    config = RTDetrConfig(
        backbone_config=backbone,
        encoder_in_channels=[32, 64, 128],
        encoder_hidden_dim=width,
        decoder_in_channels=[width] * 3,
        d_model=width,
        encoder_ffn_dim=2 * width,
        decoder_ffn_dim=2 * width,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        decoder_layers=decoder_layers,
        num_queries=num_queries,
        num_denoising=20,
        freeze_backbone_batch_norms=False,  # the backbone starts from random weights as well
        id2label=dict(enumerate(class_names)),
        label2id={name: label for label, name in enumerate(class_names)},
    )
    return RTDetrForObjectDetection(config)


def training_arguments(output: Path, steps: int, batch_size: int, **others: Any) -> TrainingArguments:
    """Return arguments that fit detectors: the targets stay in the batch, and gradients are clipped tightly."""
    defaults: dict[str, Any] = {
        "output_dir": str(output),
        "max_steps": steps,
        "per_device_train_batch_size": batch_size,
        "per_device_eval_batch_size": batch_size,
        "learning_rate": 5e-4,
        "warmup_steps": steps // 10,
        "max_grad_norm": 0.1,
        "logging_steps": max(steps // 10, 1),
        "save_steps": steps,
        "remove_unused_columns": False,
        "prediction_loss_only": True,
        "dataloader_pin_memory": False,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": not torch.accelerator.is_available(),  # without it, processes on CPUs do not find each other
    }
    return TrainingArguments(**(defaults | others))


def main() -> None:
    """Train, distil, reload."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder in COCO's or PASCAL VOC's format; default: shapes are drawn")
    parser.add_argument("--output", type=Path, default=Path("hf_transformers_output"))
    parser.add_argument("--teacher-steps", type=int, default=300)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=8)
    arguments = parser.parse_args()
    set_seed(0)

    teacher_arguments = training_arguments(arguments.output / "teacher", arguments.teacher_steps, arguments.batch_size)
    folder = arguments.data or arguments.output / "shapes"
    with teacher_arguments.main_process_first():
        if arguments.data is None and not (folder / "instances.json").exists():
            make_shapes(folder, count=512)
    images = open_detection(folder)
    data = {"train_dataset": images, "data_collator": collate}

    teacher = rt_detr(width=64, decoder_layers=4, num_queries=40, class_names=images.class_names)
    RestoringTrainer(model=teacher, args=teacher_arguments, **data).train()

    student = rt_detr(width=32, decoder_layers=2, num_queries=20, class_names=images.class_names)
    student_arguments = training_arguments(arguments.output / "student", arguments.steps, arguments.batch_size)
    trainer = DistillationTrainer(model=student, teacher=teacher, args=student_arguments, **data)
    trainer.train()
    trainer.save_model()

    if trainer.is_world_process_zero():
        report(trainer)


def report(trainer: DistillationTrainer) -> None:
    """Print the terms of the first and the last tenth of the run, and load the student in plain transformers."""
    logs = [entry for entry in trainer.state.log_history if "loss_kd_class" in entry]
    for name in (key for key in logs[0] if key.startswith("loss")):
        print(f"{name:20} {float(logs[0][name]):8.3f} -> {float(logs[-1][name]):8.3f}")
    student = RTDetrForObjectDetection.from_pretrained(trainer.args.output_dir)
    print(f"{trainer.args.output_dir}: {student.num_parameters():,} parameters")


if __name__ == "__main__":
    main()
