"""pydfine's Trainer with a teacher."""

from dfine.train import Trainer, build_lr_scheduler
from torch import nn

from detr_kd_losses.taps import DistillationCriterion


def distil(trainer: Trainer, teacher: nn.Module, **options) -> Trainer:
    """Give a trainer that was just made a teacher; then `trainer.fit(loader)` as ever."""
    trainer.criterion = DistillationCriterion(trainer.criterion, trainer.module, teacher.to(trainer.device), **options)
    trainer.criterion.learn(trainer.optimizer)
    trainer.lr_scheduler = build_lr_scheduler(trainer.optimizer, trainer.cfg)  # which must know the projections
    return trainer
