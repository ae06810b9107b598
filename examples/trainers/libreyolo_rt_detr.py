"""LibreYOLO's RT-DETR with a teacher."""

from libreyolo.models.rtdetr.model import LibreRTDETR
from libreyolo.models.rtdetr.trainer import RTDETRTrainer
from torch import nn, optim

from detr_kd_losses.taps import DistillationCriterion


class DistillingTrainer(RTDETRTrainer):
    """DistillingTrainer.teacher = LibreRTDETR(size="x").model; then LibreRTDETR(size="r18").train(data=...)."""

    teacher: nn.Module

    def _setup_optimizer(self) -> optim.Optimizer:
        optimizer = super()._setup_optimizer()
        self.criterion = DistillationCriterion(self.criterion, self.model, self.teacher)
        self.criterion.learn(optimizer)
        return optimizer


LibreRTDETR._get_trainer_class = classmethod(lambda _: DistillingTrainer)
