"""A `transformers.Trainer` whose checkpoints restore the model that was saved."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer


class RestoringTrainer(Trainer):
    """Resumes with every tensor of the saved model, or raises.

    transformers 5 saves the weights of many detectors under the names that older versions gave them. `from_pretrained`
    translates them back. The Trainer does not, when it resumes or loads the best model: it leaves such weights as they
    are, with a warning in the log (huggingface/transformers#43701, #48805, #49022).
    """

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        restore(self.model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        restore(self.model, self.state.best_model_checkpoint)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Do not warn of what `restore` mends or refuses."""


def restore(model: nn.Module, folder: str | Path) -> None:
    """Give a model of transformers all weights that `save_pretrained` has written, or raise."""
    saved, report = type(model).from_pretrained(
        folder,
        config=copy.deepcopy(model.config),
        dtype=torch.promote_types(model.dtype, torch.float32),  # all that may be in the file
        output_loading_info=True,
    )
    missing, unexpected = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    if missing or unexpected:
        msg = (
            f"the checkpoint {folder} must hold this {type(model).__name__} as a whole: {len(missing)} of its tensors "
            f"are missing {missing[:2]}, {len(unexpected)} are of another model {unexpected[:2]}; resume with a model "
            "of the same configuration, such as from_pretrained of that folder"
        )
        raise ValueError(msg)
    model.load_state_dict(saved.state_dict())


def without_last_group(trainer: Trainer, load: Any) -> None:
    """Load a state of optimizer and scheduler that does not know the last group of parameters, which starts anew."""
    group = trainer.optimizer.param_groups.pop()
    load()
    trainer.optimizer.param_groups.append(group)
    scheduler = trainer.lr_scheduler
    if len(scheduler.base_lrs) < len(trainer.optimizer.param_groups):
        progress = scheduler.get_last_lr()[0] / scheduler.base_lrs[0] if scheduler.base_lrs[0] else 1.0
        group["lr"] = group["initial_lr"] * progress
        scheduler.base_lrs.append(group["initial_lr"])
        scheduler._last_lr.append(group["lr"])
