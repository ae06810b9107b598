"""Distil any detector whose `forward` answers {'pred_logits', 'pred_boxes', 'aux_outputs'}, in its own engine.

The repositories of DETR and of many of its heirs share that convention, and a criterion whose terms are weighted by its
`weight_dict`. Three lines go after the models are built:

    attach_teacher(student, teacher)
    criterion = DistillationCriterion(criterion, dkl.DETRDistillationLoss())
    learn_projections(optimizer, criterion.distillation)  # before the scheduler; only if it has parameters

The model stays what it was, and so do its checkpoints, its evaluation, and whatever else is in its outputs.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import detr_kd_losses as dkl
from detr_convention.projections import learn_projections  # noqa: F401 - the third of the three lines
from detr_kd_losses.training.teacher import FrozenTeacher

KEY = "distillation"  # of the outputs; the original criterion never sees it
MASKS = ("mask", "pixel_mask")  # arguments that a teacher needs beside the images

QueryGroup = dict[str, Tensor]


class Reader:
    """Reads logits and boxes of all decoder layers; all that the logits loss needs, from every such repository.

    `aux_outputs` are the earlier layers, without denoising queries and encoder outputs, which have keys of their own.
    Subclass it to read features and queries as well. A reader is made for one forward pass and entered around it; the
    hooks that it needs are there no longer.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def query_group(self) -> QueryGroup | None:
        """Return the queries of the forward pass, if this reader knows them."""
        return None

    def output(self, outputs: Mapping[str, Any], group: QueryGroup | None = None) -> dkl.DetectorOutput:  # noqa: ARG002
        """Return what the model has said in the forward pass, and for the queries of a teacher."""
        layers = [*outputs.get("aux_outputs", ()), outputs]
        return dkl.DetectorOutput(
            logits=torch.stack([layer["pred_logits"] for layer in layers]),
            boxes=torch.stack([layer["pred_boxes"] for layer in layers]),
        )


class DetrReader(Reader):
    """Reads facebookresearch/detr in full: its encoded image, its decoder outputs, and a second run of its decoder."""

    def __enter__(self) -> DetrReader:
        transformer = self.model.transformer
        self._hooks = [
            transformer.register_forward_hook(self._record_transformer),
            transformer.decoder.register_forward_hook(self._record_decoder, with_kwargs=True),
        ]
        return self

    def _record_transformer(self, _: nn.Module, __: Any, output: tuple[Tensor, Tensor]) -> None:
        self._queries, self._features = output

    def _record_decoder(self, _: nn.Module, arguments: tuple, options: dict[str, Any], __: Tensor) -> None:
        self._arguments, self._options = arguments, options

    def query_group(self) -> QueryGroup:
        """Return the position of each query (M, B, D); their content is zero."""
        return {"query_pos": self._options["query_pos"].detach()}

    def output(self, outputs: Mapping[str, Any], group: QueryGroup | None = None) -> dkl.DetectorOutput:
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
                f"{position.shape[-1]}; map them with a learned nn.Linear, or leave QueryGroupTerm out and call "
                "attach_teacher(..., query_group=False)"
            )
            raise ValueError(msg)
        _, memory = self._arguments
        # Not through hooks: whoever records the decoder wants the model's own pass.
        states = self.model.transformer.decoder.forward(
            torch.zeros_like(position), memory, **{**self._options, "query_pos": position}
        )
        states = states.transpose(1, 2)  # (L, M, B, D) -> (L, B, M, D)
        group_boxes = self.model.bbox_embed(states).sigmoid()
        return output._replace(group=dkl.Predictions(self.model.class_embed(states), group_boxes))


class Attachment:
    """Two hooks around the forward pass of a student, which run its teacher while it trains.

    They know no model but the one that calls them, and keep nothing of a batch: a deep copy of the student, as averages
    of weights make, is a student of the same teacher, and runs it when and only when it trains itself. What is pickled
    is the student without the teacher.
    """

    def __init__(
        self, teacher: FrozenTeacher, reader: type[Reader], *, query_group: bool, teacher_options: Mapping[str, Any]
    ) -> None:
        self.teacher: FrozenTeacher | None = teacher
        self.reader, self.query_group, self.teacher_options = reader, query_group, dict(teacher_options)
        self.handles: list[torch.utils.hooks.RemovableHandle] = []
        self._reading: list[Reader | None] = []  # of the forward passes that are under way

    def remove(self) -> None:
        """Detach the teacher."""
        for handle in self.handles:
            handle.remove()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "teacher": None, "handles": [], "_reading": []}

    def __deepcopy__(self, memo: dict[int, Any]) -> Attachment:
        # Without handles, which are those of another model: `detach_teacher` detaches a copy.
        copy = Attachment(self.teacher, self.reader, query_group=self.query_group, teacher_options=self.teacher_options)
        return memo.setdefault(id(self), copy)

    def before(self, student: nn.Module, _: tuple, __: dict[str, Any]) -> None:
        """Begin to read the student."""
        reads = self.teacher is not None and student.training
        self._reading.append(self.reader(student).__enter__() if reads else None)

    def after(self, student: nn.Module, arguments: tuple, options: dict[str, Any], outputs: Any) -> None:
        """Run the teacher, and put what both say into the outputs."""
        reader = self._reading.pop() if self._reading else None
        if reader is None:
            return
        reader.__exit__()
        if outputs is None:  # the forward pass has raised
            return
        said = predictions_of(outputs)
        images, masks = images_of(student, arguments, options)
        self.teacher.to(next(student.parameters()).device)  # it cannot see where a NestedTensor is
        with self.reader(self.teacher.module) as teacher_reader:
            teacher_said = predictions_of(self.teacher(images, **masks, **self.teacher_options))
        teacher_output = teacher_reader.output(teacher_said)
        group = teacher_reader.query_group() if self.query_group else None
        student_output = reader.output(said, group)
        if len(teacher_output.logits) == 1 < len(student_output.logits):
            warnings.warn(
                f"the teacher shows 1 decoder layer and the student {len(student_output.logits)}, which all learn from "
                "it: RT-DETRv2, D-FINE and DEIM answer 'aux_outputs' in training mode alone",
                stacklevel=2,
            )
        said[KEY] = (student_output, teacher_output)


def attach_teacher(
    student: nn.Module,
    teacher: nn.Module,
    *,
    reader: type[Reader] = Reader,
    query_group: bool = True,
    teacher_options: Mapping[str, Any] | None = None,
) -> Attachment:
    """From now on, run the teacher with the student in training, and put what both say into the outputs.

    A student has one teacher: a second call replaces the first.

    Args:
        student: The model, before it is wrapped in DistributedDataParallel.
        teacher: A trained model; it is frozen, and no part of the student.
        reader: What to read of both.
        query_group: Whether the teacher's queries run through the student's decoder, where the reader can.
        teacher_options: Keyword arguments that the teacher is called with beside the images, such as DN-DETR's
            `dict(dn_args=0)`.

    Returns:
        Something whose `remove()` detaches the teacher.
    """
    if not set(student.parameters()).isdisjoint(teacher.parameters()):
        msg = (
            "`teacher` must be another model than the student, with parameters of its own, since it is frozen; "
            "copy.deepcopy makes one"
        )
        raise ValueError(msg)
    detach_teacher(student)
    attachment = Attachment(
        FrozenTeacher(teacher), reader, query_group=query_group, teacher_options=teacher_options or {}
    )
    attachment.handles = [
        student.register_forward_pre_hook(attachment.before, with_kwargs=True),
        student.register_forward_hook(attachment.after, with_kwargs=True, always_call=True),
    ]
    return attachment


def detach_teacher(student: nn.Module) -> None:
    """Undo `attach_teacher`, for a copy of a student as well; nothing where there is no teacher."""
    for hooks in (student._forward_pre_hooks, student._forward_hooks):
        for key, hook in list(hooks.items()):
            if isinstance(getattr(hook, "__self__", None), Attachment):
                del hooks[key]


def images_of(student: nn.Module, arguments: tuple, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return what the teacher is to see of a call of the student: the images, which come first, and their masks.

    Not the targets, which models with denoising take as well.
    """
    names = [
        name for name, parameter in inspect.signature(student.forward).parameters.items() if parameter.kind < 2
    ]  # positional ones
    masks = {name: options[name] for name in MASKS if name in options}
    masks |= {name: value for name, value in zip(names, arguments, strict=False) if name in MASKS}
    if arguments:
        return arguments[0], masks
    if names and names[0] in options:
        return options[names[0]], masks
    msg = f"the images must be the first argument of the student's forward, {names[:1]}, got {sorted(options)}"
    raise TypeError(msg)


def predictions_of(outputs: Any) -> MutableMapping[str, Any]:
    """Return the dict of predictions, which DN-DETR answers in a tuple with other things."""
    first = outputs[0] if isinstance(outputs, tuple | list) and outputs else outputs
    if not isinstance(first, MutableMapping) or "pred_logits" not in first:
        shown = sorted(first) if isinstance(first, Mapping) else type(first).__name__
        msg = f"`outputs` must be a dict with 'pred_logits' and 'pred_boxes', or begin with one, got {shown}"
        raise TypeError(msg)
    return first


class DistillationCriterion(nn.Module):
    """Adds the distillation terms to those of a criterion, and their weights, all 1, to its `weight_dict`.

    The terms have their own weights; where the engine reads `weight_dict`, its entries may be changed on top. Whatever
    else an engine asks of it is the original criterion's.
    """

    def __init__(self, criterion: nn.Module, distillation: dkl.DETRDistillationLoss) -> None:
        super().__init__()
        self.criterion = criterion
        self.distillation = distillation
        self.weight_dict = {**criterion.weight_dict, **dict.fromkeys(distillation.names, 1.0)}

    def forward(
        self, outputs: Any, targets: Sequence[Mapping[str, Tensor]], *arguments: Any, **options: Any
    ) -> dict[str, Tensor]:
        """Return the terms of the criterion, and in training those of the distillation.

        What an engine passes beside outputs and targets, such as the epoch, is for the criterion.
        """
        said = predictions_of(outputs)
        plain: Any = {key: value for key, value in said.items() if key != KEY}
        plain = plain if said is outputs else (plain, *outputs[1:])
        losses = self.criterion(plain, targets, *arguments, **options)
        if KEY in said:
            student_output, teacher_output = said[KEY]
            padded = dkl.pad_targets(targets).to(student_output.logits.device)
            losses = {**losses, **self.distillation(student_output, teacher_output, padded)}
        elif self.training:
            msg = f"`outputs` must have {KEY!r} in training: call attach_teacher(student, teacher) first"
            raise ValueError(msg)
        return losses

    def __getattr__(self, name: str) -> Any:
        """Answer for the original criterion, whose attributes some engines look at."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "criterion":
                raise
            return getattr(self.criterion, name)
