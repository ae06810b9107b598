"""Distil any detector whose `forward` answers {'pred_logits', 'pred_boxes', 'aux_outputs'}, in its own engine.

DETR, Deformable DETR, DAB-DETR, DN-DETR, DINO, RT-DETR and D-FINE repositories share that convention, and a criterion
whose terms are weighted by its `weight_dict`. Three lines go after the models are built:

    attach_teacher(student, teacher)
    criterion = DistillationCriterion(criterion, dkl.DETRDistillationLoss())
    learn_projections(optimizer, criterion.distillation)  # before the scheduler; only if it has parameters

The model stays what it was, and so do its checkpoints, its evaluation, and whatever else is in its outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import detr_kd_losses as dkl
from detr_kd_losses.training.teacher import FrozenTeacher

KEY = "distillation"  # of the outputs; the original criterion never sees it

QueryGroup = dict[str, Tensor]


class Reader:
    """Reads logits and boxes of all decoder layers; all that the logits loss needs, from every such repository.

    `aux_outputs` are the earlier layers, without denoising queries and encoder outputs, which have keys of their own.
    Subclass it to read features and queries as well.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def query_group(self) -> QueryGroup | None:
        """Return the queries of the last forward pass, if this reader knows them."""
        return None

    def output(self, outputs: dict[str, Any], group: QueryGroup | None = None) -> dkl.DetectorOutput:  # noqa: ARG002
        """Return what the model has said in the last forward pass, and for the queries of a teacher."""
        layers = [*outputs.get("aux_outputs", ()), outputs]
        return dkl.DetectorOutput(
            logits=torch.stack([layer["pred_logits"] for layer in layers]),
            boxes=torch.stack([layer["pred_boxes"] for layer in layers]),
        )


class DetrReader(Reader):
    """Reads facebookresearch/detr in full: its encoded image, its decoder outputs, and a second run of its decoder."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        model.transformer.register_forward_hook(self._record_transformer)
        model.transformer.decoder.register_forward_hook(self._record_decoder, with_kwargs=True)

    def _record_transformer(self, _: nn.Module, __: Any, output: tuple[Tensor, Tensor]) -> None:
        self._queries, self._features = output

    def _record_decoder(self, _: nn.Module, arguments: tuple, options: dict[str, Any], __: Tensor) -> None:
        self._arguments, self._options = arguments, options

    def query_group(self) -> QueryGroup:
        """Return the position of each query (M, B, D); their content is zero."""
        return {"query_pos": self._options["query_pos"].detach()}

    def output(self, outputs: dict[str, Any], group: QueryGroup | None = None) -> dkl.DetectorOutput:
        """Return predictions, decoder outputs, the encoded image, and the predictions for another model's queries."""
        padding = self._options["memory_key_padding_mask"]  # (B, H * W), True = padding
        output = (
            super()
            .output(outputs)
            ._replace(
                queries=self._queries,
                features=[self._features],
                padding_mask=[~padding.unflatten(1, self._features.shape[-2:])],
            )
        )
        if group is None:
            return output
        position = group["query_pos"]
        if position.shape[-1] != self.model.transformer.d_model:
            msg = (
                f"the queries of the teacher must have {self.model.transformer.d_model} channels as the student's, got "
                f"{position.shape[-1]}; map them with a learned nn.Linear, or leave QueryGroupTerm out"
            )
            raise ValueError(msg)
        _, memory = self._arguments
        # Not through hooks: the record is that of the model's own pass.
        states = self.model.transformer.decoder.forward(
            torch.zeros_like(position), memory, **{**self._options, "query_pos": position}
        )
        states = states.transpose(1, 2)  # (L, M, B, D) -> (L, B, M, D)
        group_boxes = self.model.bbox_embed(states).sigmoid()
        return output._replace(group=dkl.Predictions(self.model.class_embed(states), group_boxes))


def attach_teacher(
    student: nn.Module, teacher: nn.Module, *, reader: type[Reader] = Reader, query_group: bool = True
) -> torch.utils.hooks.RemovableHandle:
    """From now on, run the teacher with the student in training, and put what both say into the outputs.

    Args:
        student: The model, before it is wrapped in DistributedDataParallel.
        teacher: A trained model; it is frozen, and no part of the student.
        reader: What to read of both.
        query_group: Whether the teacher's queries run through the student's decoder, where the reader can.

    Returns:
        A handle whose `remove()` detaches the teacher.
    """
    if teacher is student:
        msg = "`teacher` must be another model than the student, since it is frozen; copy.deepcopy makes one"
        raise ValueError(msg)
    frozen = FrozenTeacher(teacher)
    student_reader, teacher_reader = reader(student), reader(teacher)

    def run_teacher(_: nn.Module, arguments: Sequence[Any], outputs: dict[str, Any]) -> dict[str, Any] | None:
        if not student.training:
            return None
        images = arguments[0]  # not the targets, which models with denoising take as well
        teacher_output = teacher_reader.output(frozen(images))
        group = teacher_reader.query_group() if query_group else None
        return {**outputs, KEY: (student_reader.output(outputs, group), teacher_output)}

    return student.register_forward_hook(run_teacher)


class DistillationCriterion(nn.Module):
    """Adds the distillation terms to those of a criterion, and their weights, all 1, to its `weight_dict`.

    The terms have their own weights; the entries of `weight_dict` may be changed on top.
    """

    def __init__(self, criterion: nn.Module, distillation: dkl.DETRDistillationLoss) -> None:
        super().__init__()
        self.criterion = criterion
        self.distillation = distillation
        self.weight_dict = {**criterion.weight_dict, **dict.fromkeys(distillation.names, 1.0)}

    def forward(self, outputs: dict[str, Any], targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return the terms of the criterion, and in training those of the distillation."""
        losses = self.criterion({key: value for key, value in outputs.items() if key != KEY}, targets)
        if KEY in outputs:
            student_output, teacher_output = outputs[KEY]
            losses = {**losses, **self.distillation(student_output, teacher_output, dkl.pad_targets(targets))}
        elif self.training:
            msg = f"`outputs` must have {KEY!r} in training: call attach_teacher(student, teacher) first"
            raise ValueError(msg)
        return losses


def learn_projections(optimizer: torch.optim.Optimizer, module: nn.Module) -> None:
    """Let the optimizer learn a module that is outside the model, with its gradients averaged over the processes."""
    parameters = list(module.parameters())
    if not parameters:
        return
    optimizer.add_param_group({"params": parameters})

    def average_gradients(*_: Any) -> None:
        if dist.is_available() and dist.is_initialized():
            for parameter in parameters:
                dist.all_reduce(parameter.grad)
                parameter.grad /= dist.get_world_size()

    optimizer.register_step_pre_hook(average_gradients)
