"""RF-DETR's training module with a teacher; everything else is as in RFDETR.train()."""

from rfdetr.config import ModelConfig, TrainConfig
from rfdetr.training import RFDETRModelModule
from torch import nn

from detr_kd_losses.taps import DistillationCriterion


class DistilledModule(RFDETRModelModule):
    """Learns from a teacher as well: any detector that a Tap reads and that takes a NestedTensor.

    All variants of RF-DETR have queries and features of the same width, so that there is nothing to project.
    """

    def __init__(self, model_config: ModelConfig, train_config: TrainConfig, teacher: nn.Module, **options) -> None:
        super().__init__(model_config, train_config)
        self.criterion = DistillationCriterion(self.criterion, self.model, teacher, **options)
