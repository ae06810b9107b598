"""A `transformers.Trainer` whose model learns from a teacher beside its own loss."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast
from torch import Tensor, nn

import detr_kd_losses as dkl
from detr_kd_losses.taps import QueryProjection, Tap, distillation_loss
from detr_kd_losses.taps.agreement import validate_apart, validate_classes, validate_heads
from detr_kd_losses.training.teacher import FrozenTeacher
from hf_transformers.checkpoints import RestoringTrainer, without_last_group

DISTILLATION_FILE = "distillation.pt"


class DistillationTrainer(RestoringTrainer):
    """Adds the terms of a `DETRDistillationLoss` to the loss of the model, in training alone.

    Everything else is the Trainer's: gradient accumulation, mixed precision, several processes, evaluation. What is
    saved is the student; the learned projections lie beside the optimizer's state, for resuming.

    Args:
        teacher: A trained detector of transformers, of the same kind as the model, of any size.
        distillation: The loss; None: `distillation_loss(model, teacher)`.
        schedule: What the weights of the terms follow, as `dkl.WeightSchedule` takes it; None: they are constant. In a
            step in which all are 0 the teacher does not run.
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
        schedule: Callable[[float], float] | Mapping[str, Callable[[float], float]] | None = None,
        group_share: float = 1.0,
        student_levels: Sequence[int] | None = None,
        teacher_levels: Sequence[int] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        validate_apart(self.model, teacher)
        if self.args.n_gpu > 1:
            msg = f"a process must use one GPU, got {self.args.n_gpu}; start with torchrun or set CUDA_VISIBLE_DEVICES"
            raise ValueError(msg)
        self.teacher = FrozenTeacher(teacher).to(self.args.device)
        self.levels = (student_levels, teacher_levels)
        self.group_share = group_share
        num_levels = None if student_levels is None else len(student_levels)
        self.distillation = distillation or distillation_loss(self.model, teacher, levels=num_levels)
        self.schedule = None if schedule is None else dkl.WeightSchedule(self.distillation, schedule)
        validate_heads(self.distillation, self.model, teacher)
        if self.distillation.class_map is None:
            validate_classes(self.model, teacher)
        self.query_projection = QueryProjection(self.model, teacher)
        # Learned with the student, and not a part of it.
        self.projections = nn.ModuleList([self.distillation, self.query_projection]).to(self.args.device)
        for parameter in self.projections.parameters():
            parameter.data = broadcast(parameter.data)  # every process starts from the same values
        # The losses of detectors divide by the objects of their own micro-batch, whatever number they are given.
        self.model_accepts_loss_kwargs = False
        self._terms: dict[str, list[Tensor]] = {}  # since the last logs
        self._means: dict[str, float] = {}
        self._optimizer_has_stepped = True

    def train(self, *arguments: Any, **options: Any) -> Any:
        """Train, and leave the weights of the terms as they were, for whoever goes on with the same criterion."""
        try:
            return super().train(*arguments, **options)
        finally:
            if self.schedule is not None:
                self.schedule.restore()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the model's own loss, plus the distillation terms while it trains."""
        if model.training and self.schedule is not None:
            self.schedule.update(self.state.global_step / self.state.max_steps)
        if not model.training or all(term.weight == 0 for term in self.distillation.terms.values()):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not inputs.get("labels"):
            msg = (
                "`inputs` must have 'labels', one dict of 'class_labels' and 'boxes' for each image, got "
                f"{sorted(inputs)}; let the data collator keep them, with remove_unused_columns=False"
            )
            raise ValueError(msg)
        targets = dkl.pad_targets(inputs["labels"]).to(self.args.device)
        with Tap(self.accelerator.unwrap_model(model)) as student_tap:
            loss, outputs = super().compute_loss(model, dict(inputs), True, num_items_in_batch)
        terms = self.distillation_terms(student_tap, inputs, targets)
        loss = loss + torch.stack(list(terms.values())).sum() / self._undivided_micro_batches()
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
            group = None
            if "group" in self.distillation.needs:
                group = self.query_projection(teacher_tap.query_group(share=self.group_share))
            student_output = student_tap.output(group=group, levels=student_levels)
            check_levels(student_output, teacher_output)
            terms = self.distillation(student_output, teacher_output, targets)
        for name, term in terms.items():
            self._terms.setdefault(name, []).append(term.detach())
        return terms

    def _undivided_micro_batches(self) -> int:
        """By what to divide a mean over a micro-batch, where the Trainer leaves that to the loss."""
        left = getattr(self, "loss_is_scaled_for_ga", None)
        left = self.compute_loss_func is not None if left is None else left
        return getattr(self, "current_gradient_accumulation_steps", 1) if left else 1

    def training_step(self, *arguments: Any, **options: Any) -> Tensor:
        """Treat the gradients of the projections as the Trainer and DistributedDataParallel treat the student's."""
        if self._optimizer_has_stepped:
            self.projections.zero_grad()
        loss = super().training_step(*arguments, **options)
        self._optimizer_has_stepped = self.accelerator.sync_gradients  # it does so right after the last micro-batch
        if self.accelerator.sync_gradients and self.accelerator.num_processes > 1:
            average_gradients(list(self.projections.parameters()), self.accelerator.reduce)
        return loss

    def create_optimizer(self, *arguments: Any, **options: Any) -> torch.optim.Optimizer:
        """Let the optimizer learn the projections as well."""
        optimizer = super().create_optimizer(*arguments, **options)
        self._optimizer_has_stepped = True  # what another run has left is not of this one
        known = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        new = [parameter for parameter in self.projections.parameters() if parameter not in known]
        if new:
            optimizer.add_param_group({"params": new, "weight_decay": self.args.weight_decay})
        return optimizer

    def _maybe_log_save_evaluate(self, *arguments: Any, **options: Any) -> None:
        """Average the terms where all processes come by, which cannot be said of `log`."""
        if self.control.should_log:
            names = self.distillation.names
            sums = [sum(self._terms.get(name, []), torch.zeros((), device=self.args.device)) for name in names]
            counts = torch.tensor([len(self._terms.get(name, [])) for name in names], device=self.args.device)
            sums, counts = self.accelerator.reduce(torch.stack([torch.stack(sums), counts]).float(), reduction="sum")
            means = zip(names, (sums / counts).tolist(), counts.tolist(), strict=True)
            self._means = {name: mean for name, mean, count in means if count}
            self._terms = {}
        super()._maybe_log_save_evaluate(*arguments, **options)

    def log(self, logs: dict[str, float], *arguments: Any, **options: Any) -> None:
        """Add to the training logs the mean of each distillation term since the last ones."""
        if "loss" in logs:
            logs |= self._means
            self._means = {}
        super().log(logs, *arguments, **options)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            torch.save(self.projections.state_dict(), Path(output_dir) / DISTILLATION_FILE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        load = super()._load_optimizer_and_scheduler
        if checkpoint is None:
            return
        if self._load_projections(checkpoint) or not list(self.projections.parameters()):
            load(checkpoint)
        else:
            warnings.warn(
                f"{checkpoint} has no {DISTILLATION_FILE}, as of a run without a teacher or with save_only_model: the "
                "student goes on, the projections of features and queries start anew",
                stacklevel=2,
            )
            without_last_group(self, lambda: load(checkpoint))

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._load_projections(self.state.best_model_checkpoint)

    def _load_projections(self, checkpoint: str) -> bool:
        """Load the projections of a checkpoint, and return whether it has any."""
        path = Path(checkpoint) / DISTILLATION_FILE
        if not path.exists():
            return False
        try:
            self.projections.load_state_dict(torch.load(path, map_location=self.args.device, weights_only=True))
        except RuntimeError as error:
            msg = (
                f"{path} must hold the projections of this student and teacher; to go on with another teacher, load "
                f"the student with from_pretrained({checkpoint!r}) and start a new run"
            )
            raise ValueError(msg) from error
        return True


def average_gradients(parameters: list[nn.Parameter], reduce: Callable[..., Tensor]) -> None:
    """Average gradients over the processes, also where some or all have none: in one reduction, which all take part in.

    A parameter that has a gradient nowhere is left without.
    """
    if not parameters:
        return
    here = [0.0 if parameter.grad is None else 1.0 for parameter in parameters]
    gradients = [torch.zeros_like(one) if one.grad is None else one.grad for one in parameters]
    flat = torch.cat([*(gradient.flatten().float() for gradient in gradients), gradients[0].new_tensor(here).float()])
    *averages, somewhere = reduce(flat, reduction="mean").split([*(one.numel() for one in parameters), len(parameters)])
    for parameter, average, given in zip(parameters, averages, somewhere.tolist(), strict=True):
        parameter.grad = average.view_as(parameter).to(parameter.dtype) if given else None


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
