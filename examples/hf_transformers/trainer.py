"""A `transformers.Trainer` whose model learns from a teacher beside its own loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast
from torch import Tensor, nn
from transformers import Trainer

import detr_kd_losses as dkl
from detr_kd_losses.training.teacher import FrozenTeacher
from hf_transformers.adapter import QueryProjection, Tap, distillation_loss

DISTILLATION_FILE = "distillation.pt"


class DistillationTrainer(Trainer):
    """Adds the terms of a `DETRDistillationLoss` to the loss of the model, in training alone.

    Everything else is the Trainer's: gradient accumulation, mixed precision, several processes, evaluation. What is
    saved is the student; the learned projections lie beside the optimizer's state, for resuming.

    Args:
        teacher: A trained detector of transformers, of the same kind as the model, of any size.
        distillation: The loss; None: `distillation_loss(model, teacher)`.
        schedule: Factor of the distillation terms at a progress in [0, 1] of the training; where it is 0 the teacher
            does not run.
        group_share: How many of the teacher's queries run through the student's decoder, the surest first; 1: all.
        student_levels: Feature levels of the student to distil, where teacher and student have different ones.
        teacher_levels: Those of the teacher that correspond.
        **options: Those of `transformers.Trainer`.
    """

    def __init__(
        self,
        *,
        teacher: nn.Module,
        distillation: dkl.DETRDistillationLoss | None = None,
        schedule: Callable[[float], float] = lambda progress: 1.0,  # noqa: ARG005
        group_share: float = 1.0,
        student_levels: Sequence[int] | None = None,
        teacher_levels: Sequence[int] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if teacher is self.model:
            msg = "`teacher` must be another model than the student, since it is frozen; copy.deepcopy makes one"
            raise ValueError(msg)
        if self.args.n_gpu > 1:
            msg = f"a process must use one GPU, got {self.args.n_gpu}; start with torchrun or set CUDA_VISIBLE_DEVICES"
            raise ValueError(msg)
        self.teacher = FrozenTeacher(teacher).to(self.args.device)
        self.levels = (student_levels, teacher_levels)
        self.schedule = schedule
        self.group_share = group_share
        num_levels = None if student_levels is None else len(student_levels)
        self.distillation = distillation or distillation_loss(self.model, teacher, num_levels=num_levels)
        self.query_projection = QueryProjection(self.model, teacher)
        # Learned with the student, and not a part of it.
        self.projections = nn.ModuleList([self.distillation, self.query_projection]).to(self.args.device)
        for parameter in self.projections.parameters():
            parameter.data = broadcast(parameter.data)  # every process starts from the same values
        self._terms: dict[str, Tensor] = {}
        self._steps = 0
        self._optimizer_has_stepped = False

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the model's own loss, plus the distillation terms while it trains."""
        factor = self.schedule(self.state.global_step / self.state.max_steps) if model.training else 0.0
        if factor == 0:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not inputs.get("labels"):
            msg = (
                "`inputs` must have 'labels', one dict of 'class_labels' and 'boxes' for each image, got "
                f"{sorted(inputs)}; let the data collator keep them, with remove_unused_columns=False"
            )
            raise ValueError(msg)
        targets = dkl.pad_targets(inputs["labels"])
        with Tap(self.accelerator.unwrap_model(model)) as student_tap:
            loss, outputs = super().compute_loss(model, dict(inputs), True, num_items_in_batch)
        terms = self.distillation_terms(student_tap, inputs, targets)
        loss = loss + factor * torch.stack(list(terms.values())).sum()
        return (loss, outputs) if return_outputs else loss

    def distillation_terms(
        self, student_tap: Tap, inputs: Mapping[str, Any], targets: dkl.Targets
    ) -> dict[str, Tensor]:
        """Run the teacher on the batch, its queries through the student's decoder, and the losses."""
        student_levels, teacher_levels = self.levels
        with self.accelerator.autocast():
            with Tap(self.teacher.module) as teacher_tap:
                self.teacher(**{name: inputs[name] for name in ("pixel_values", "pixel_mask") if name in inputs})
            teacher_output = teacher_tap.output(levels=teacher_levels)
            group, index = None, None
            if "group" in self.distillation.needs:
                if self.group_share < 1:
                    head = {"activation": teacher_tap.family.activation}
                    index = dkl.best_queries(teacher_output.logits[-1], self.group_share, **head)
                group = self.query_projection(teacher_tap.query_group(index))
            student_output = student_tap.output(group=group, group_index=index, levels=student_levels)
            check_levels(student_output, teacher_output)
            terms = self.distillation(student_output, teacher_output, targets)
        for name, term in terms.items():
            self._terms[name] = self._terms.get(name, 0) + term.detach()
        self._steps += 1
        return terms

    def training_step(self, *arguments: Any, **options: Any) -> Tensor:
        """Treat the gradients of the projections as the Trainer and DistributedDataParallel treat the student's."""
        if self._optimizer_has_stepped:
            self.projections.zero_grad()
        loss = super().training_step(*arguments, **options)
        for parameter in self.projections.parameters():
            if parameter.grad is not None:
                parameter.grad = self.accelerator.reduce(parameter.grad, reduction="mean")
        self._optimizer_has_stepped = self.accelerator.sync_gradients  # it does so right after the last micro-batch
        return loss

    def create_optimizer(self, *arguments: Any, **options: Any) -> torch.optim.Optimizer:
        """Let the optimizer learn the projections as well."""
        optimizer = super().create_optimizer(*arguments, **options)
        known = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        new = [parameter for parameter in self.projections.parameters() if parameter not in known]
        if new:
            optimizer.add_param_group({"params": new, "weight_decay": self.args.weight_decay})
        return optimizer

    def log(self, logs: dict[str, float], *arguments: Any, **options: Any) -> None:
        """Add to the training logs the mean of each distillation term since the last ones."""
        if "loss" in logs and self._steps:
            means = self.accelerator.reduce(torch.stack(list(self._terms.values())) / self._steps, reduction="mean")
            logs |= dict(zip(self._terms, means.tolist(), strict=True))
            self._terms, self._steps = {}, 0
        super().log(logs, *arguments, **options)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            torch.save(self.projections.state_dict(), Path(output_dir) / DISTILLATION_FILE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            state = torch.load(Path(checkpoint) / DISTILLATION_FILE, map_location=self.args.device, weights_only=True)
            self.projections.load_state_dict(state)


def check_levels(student: dkl.DetectorOutput, teacher: dkl.DetectorOutput) -> None:
    """Raise, with the remedy, unless student and teacher have the same number of feature levels."""
    if len(student.features) != len(teacher.features):
        sizes = [[tuple(level.shape[-2:]) for level in output.features] for output in (student, teacher)]
        msg = (
            f"student and teacher must have as many feature levels, got maps of {sizes[0]} and {sizes[1]} cells; "
            "choose those that correspond with student_levels and teacher_levels, or give a `distillation` "
            "without FeatureTerm"
        )
        raise ValueError(msg)
