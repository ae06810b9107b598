"""Students that train with denoising queries: small RT-DETR and D-FINE of transformers, by their own loss.

What differs from the small detector of the other worlds: the model, whose loss is its own with denoising queries and
all auxiliary terms, and that both models are read by taps. Images, settings, batches, schedule and rows are the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from shapes import CLASSES, ShapeImages
from torch import Tensor, nn
from train import endless_batches, evaluate, learning_rate_factor

import detr_kd_losses as dkl
from detr_kd_losses.taps import Tap
from experiments.controls import begin_with_decoder, send_best_queries
from experiments.rows import Row, Run
from experiments.settings import SETTINGS, Setting
from experiments.training import TeacherOf, keep_teacher, rounded, teacher_facts, teacher_file, weight_schedule
from experiments.worlds import TEST, VALIDATION, WORLDS, held_out_images, training_images

BATCH_SIZE, LEARNING_RATE, SHARE = 16, 1e-3, 0.25
DECODER = (  # as far as a family has it
    "model.decoder",
    "model.decoder_input_proj",
    "model.enc_output",
    "model.enc_score_head",
    "model.enc_bbox_head",
    "model.denoising_class_embed",
    "class_embed",
    "bbox_embed",
)
STAGES = ["stage2", "stage3", "stage4"]
BACKBONES = {
    "RT-DETR": lambda widths: transformers.RTDetrResNetConfig(
        embedding_size=16, hidden_sizes=[16, *widths], depths=[1] * 4, layer_type="basic", out_features=STAGES
    ),
    "D-FINE": lambda widths: transformers.HGNetV2Config(
        stem_channels=[3, 16, 16],
        stage_in_channels=[16, 16, *widths[:2]],
        stage_mid_channels=[16, *(width // 2 for width in widths)],
        stage_out_channels=[16, *widths],
        stage_num_blocks=[1] * 4,
        stage_numb_of_layers=[2] * 4,
        embedding_size=16,
        hidden_sizes=[16, *widths],
        depths=[1] * 4,
        out_features=STAGES,
    ),
}
CLASSES_OF = {
    "RT-DETR": (transformers.RTDetrConfig, transformers.RTDetrForObjectDetection),
    "D-FINE": (transformers.DFineConfig, transformers.DFineForObjectDetection),
}


def build(family: str, kind: Mapping[str, Any]) -> nn.Module:
    """Return an untrained model of a family."""
    config_class, model_class = CLASSES_OF[family]
    width, widths = kind["width"], kind["backbone"]
    config = config_class(
        backbone_config=BACKBONES[family](widths),
        encoder_in_channels=widths,
        encoder_hidden_dim=width,
        decoder_in_channels=[width] * 3,
        d_model=width,
        encoder_ffn_dim=2 * width,
        decoder_ffn_dim=2 * width,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        decoder_layers=kind["layers"],
        num_queries=kind["queries"],
        num_denoising=20,
        freeze_backbone_batch_norms=False,
        num_labels=len(CLASSES),
    )
    return model_class(config)


class Detector(nn.Module):
    """A model that answers as the small detector does, for its evaluation."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> dkl.DetectorOutput:
        """Detect in images (B, 3, H, W)."""
        with Tap(self.model) as tap:
            self.model(pixel_values=enlarged(images))
        output = tap.output()
        return output._replace(features=output.features[0], padding_mask=None)


def enlarged(images: Tensor) -> Tensor:
    """Images of twice the size: these models look at strides of 8, 16 and 32."""
    return nn.functional.interpolate(images, scale_factor=2, mode="bilinear", align_corners=False)


def labels_of(targets: dkl.Targets) -> list[dict[str, Tensor]]:
    """Return the targets as transformers takes them."""
    parts = zip(*targets, strict=True)
    return [{"class_labels": labels[mask], "boxes": boxes[mask]} for labels, boxes, mask in parts]


def train(
    model: nn.Module,
    run: tuple[str, int, int],
    setting: Setting,
    teacher: nn.Module | None,
    on_step: Callable[[], None],
) -> tuple[list[list[float]], float]:
    """Train a model in place, and return its curve on the validation images and the seconds, without its teacher's."""
    world, steps, seed = run
    data, validation = training_images(world), held_out_images(world, VALIDATION)
    criterion = dkl.DETRDistillationLoss({name: part.make() for name, part in setting.parts.items()})
    schedule = weight_schedule(criterion, setting.parts)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=1e-4, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, steps))
    evaluate_at = {round(steps * (part + 1) / 5) for part in range(5)}
    curve, seconds = [], 0.0
    for step, indices in zip(range(1, steps + 1), endless_batches(len(data), BATCH_SIZE, seed), strict=False):
        batch = data.select(indices)
        images = enlarged(batch.normalised())
        said = None if teacher is None else say(teacher, images)
        start = time.process_time()
        if schedule is not None:
            schedule.update((step - 1) / steps)
        loss = step_loss(model.train(), images, batch, said, criterion, share_of(setting))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
        optimizer.step()
        scheduler.step()
        seconds += time.process_time() - start
        if step in evaluate_at:
            curve.append([step, *map(rounded, evaluate(Detector(model), validation))])
        on_step()
    return curve, seconds


def say(teacher: nn.Module, images: Tensor) -> Tap:
    """Return the tap that has seen a teacher run."""
    with torch.no_grad(), Tap(teacher.eval()) as tap:
        teacher(pixel_values=images)
    return tap


def step_loss(
    model: nn.Module,
    images: Tensor,
    batch: ShapeImages,
    said: Tap | None,
    criterion: dkl.DETRDistillationLoss,
    share: float,
) -> Tensor:
    """Return the model's own loss, and what the terms add to it."""
    if said is None:
        return model(pixel_values=images, labels=labels_of(batch.targets)).loss
    with Tap(model) as tap:
        own = model(pixel_values=images, labels=labels_of(batch.targets)).loss
    group = said.query_group(share=share) if "group" in criterion.needs else None
    terms = criterion(tap.output(group=group), said.output(), batch.targets)
    return own + sum(terms.values())


def share_of(setting: Setting) -> float:
    """Return how many of the teacher's queries a setting sends."""
    if setting.change not in (None, send_best_queries) or setting.begin not in (None, begin_with_decoder):
        msg = (
            "`setting` must send all queries of the teacher or the surest, and begin at random or with its decoder: no "
            "other change is made for these models"
        )
        raise ValueError(msg)
    return 1.0 if setting.change is None else SHARE


def train_student(run: Run, cache: Path, on_step: Callable[[], None]) -> Row:
    """Train one student, and return what came out."""
    setting, world = SETTINGS[run.setting], WORLDS[run.world]
    torch.manual_seed(run.seed)
    model = build(world.family, world.student)
    teacher = ready_teacher(run.world, setting.teacher, cache) if setting.needs_teacher else None
    if setting.begin is begin_with_decoder:
        parts = dict(model.named_modules())
        dkl.inherit_weights(model, teacher, [part for part in DECODER if part in parts])
    curve, seconds = train(model, (run.world, run.steps, run.seed), setting, teacher, on_step)
    test_ap, test_ap50 = evaluate(Detector(model), held_out_images(run.world, TEST))
    return {
        **run._asdict(),
        "ap": curve[-1][1],
        "ap50": curve[-1][2],
        "test_ap": rounded(test_ap),
        "test_ap50": rounded(test_ap50),
        "seconds": rounded(seconds),
        "curve": curve,
        "gradients": {},
        "teacher": teacher_facts(run.world, setting.teacher, cache) if teacher else None,
    }


def train_teacher(which: TeacherOf, cache: Path, on_step: Callable[[], None]) -> Row:
    """Train a teacher on the labels of its world, and keep it."""
    world, name = which
    recipe = WORLDS[world].teachers[name]
    torch.manual_seed(recipe.seed)
    model = build(WORLDS[world].family, recipe.model)
    curve, seconds = train(model, (world, recipe.steps, recipe.seed), SETTINGS["alone"], None, on_step)
    test_ap, _ = evaluate(Detector(model), held_out_images(world, TEST))
    facts: Row = {"ap": curve[-1][1], "test_ap": rounded(test_ap), "seconds": rounded(seconds)}
    keep_teacher(which, cache, model, facts)
    return {**which._asdict(), **facts}


def ready_teacher(world: str, teacher: str, cache: Path) -> nn.Module:
    """Load a teacher."""
    model = build(WORLDS[world].family, WORLDS[world].teachers[teacher].model)
    model.load_state_dict(torch.load(teacher_file(world, teacher, cache))["weights"])
    return model.eval().requires_grad_(False)
