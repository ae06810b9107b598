"""Read everything that distillation needs from a detector of transformers, without a change to its code.

    with torch.no_grad(), Tap(teacher) as teacher_tap:
        teacher(pixel_values=images)
    with Tap(student) as student_tap:
        loss = student(pixel_values=images, labels=labels).loss
    teacher_output = teacher_tap.output()
    student_output = student_tap.output(group=teacher_tap.query_group())

A `Tap` records the call of the decoder. What the decoder is given holds the queries, the feature maps and the padding
mask; what it answers gives the predictions of every layer. A second call, with the teacher's queries in place of the
model's own, is the extra query group: it equals a concatenation under a block mask, for a group of any size. What the
layers have projected of the memory does not depend on the queries; the second call takes it from the first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import detr_kd_losses as dkl
from hf_transformers.classes import check_apart, check_classes
from hf_transformers.families import DecoderCall, Predictions, box_distributions, family_of

QueryGroup = dict[str, Tensor]
"""The queries of a model: the arguments of its decoder that make them up, each (B, M, ...)."""

CONTENT = ("inputs_embeds", "object_queries_position_embeddings")
"""The arguments with D channels; the others are anchors or reference points, which fit every width."""


class Tap:
    """Records the call of a model's decoder while it is entered.

    Args:
        model: A `...ForObjectDetection` model, not wrapped (`accelerator.unwrap_model` before).
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.family = family_of(model)
        self.call: DecoderCall | None = None
        self._map_size: tuple[int, int] | None = None
        self._hooks: list[Any] = []

    def __enter__(self) -> Tap:
        core = self.model.model
        layer_outputs: list[Tensor] = []
        projections: dict[nn.Module, list[Tensor]] = {}

        def record_layer(_: nn.Module, __: Any, output: Any) -> None:
            layer_outputs.append(output[0] if isinstance(output, tuple) else output)

        def record_projection(module: nn.Module, _: Any, output: Tensor) -> None:
            # A teacher, which runs without gradients, must hold nothing for a replay that never comes. Compiled code
            # would be compiled again for every tap. In another tap's replay there is nothing: the module saw no cell.
            if not torch.compiler.is_compiling() and output.requires_grad and output.numel():
                projections.setdefault(module, []).append(output)

        def record_call(_: nn.Module, __: Any, arguments: dict[str, Any], output: Any) -> None:
            # What a layer calls twice may have seen two things.
            once = {module: outputs[0] for module, outputs in projections.items() if len(outputs) == 1}
            self.call = DecoderCall(dict(arguments), output, list(layer_outputs), once)
            layer_outputs.clear()
            projections.clear()

        def record_map_size(_: nn.Module, __: Any, feature_map: Tensor) -> None:
            self._map_size = tuple(feature_map.shape[-2:])

        self._hooks = [layer.register_forward_hook(record_layer) for layer in core.decoder.layers]
        self._hooks += [module.register_forward_hook(record_projection) for module in self._memory_projections()]
        self._hooks.append(core.decoder.register_forward_hook(record_call, with_kwargs=True))
        if hasattr(core, "input_projection"):
            # DETR, Conditional DETR and DAB-DETR give their one map to the decoder flattened.
            self._hooks.append(core.input_projection.register_forward_hook(record_map_size))
        self._decoder_training = core.decoder.training
        core.decoder.training |= self.family.predicts_in_training
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self.model.model.decoder.training = self._decoder_training

    def output(
        self,
        *,
        group: QueryGroup | None = None,
        group_index: Tensor | None = None,
        levels: Sequence[int] | None = None,
    ) -> dkl.DetectorOutput:
        """Return what the model has said about the batch, layer by layer.

        Args:
            group: Queries of a teacher, to be sent through this model's decoder as well.
            group_index: Which of the teacher's queries these are (B, K). None: all of them.
            levels: Which feature levels to keep, where teacher and student have different ones. None: all.
        """
        own = _select_queries(self.family.predict(self.model, self._recorded()), self._own_queries())
        replayed = None if group is None else self.replay(group)
        features, padding_mask = self.features()
        keep = range(len(features)) if levels is None else levels
        return dkl.DetectorOutput(
            logits=own.logits,
            boxes=own.boxes,
            queries=own.queries,
            features=[features[level] for level in keep],
            padding_mask=None if padding_mask is None else [padding_mask[level] for level in keep],
            group=None if replayed is None else dkl.Predictions(replayed.logits, replayed.boxes),
            group_index=None if replayed is None else group_index,
            distributions=box_distributions(self.model, self._recorded(), self._own_queries()),
        )

    def query_group(self, index: Tensor | None = None) -> QueryGroup:
        """Return the model's own queries, for the decoder of another model; or those of `index` (B, K) alone."""
        arguments, own = self._recorded().arguments, self._own_queries()
        group = {name: arguments[name][:, own].detach() for name in self.family.query_arguments}
        if index is None:
            return group
        images = torch.arange(len(index), device=index.device).unsqueeze(-1)
        return {name: queries.expand(len(index), *queries.shape[1:])[images, index] for name, queries in group.items()}

    def replay(self, group: QueryGroup) -> Predictions:
        """Run the decoder once more on the same image, with other queries in place of the model's own.

        Where gradients were recorded, the memory is not projected once more.
        """
        arguments = self._recorded().arguments
        if self._hooks:
            msg = "`replay` and `output(group=...)` must be called after the `with Tap(model)` block"
            raise RuntimeError(msg)
        check_group(group, {name: arguments[name] for name in self.family.query_arguments})
        without_denoising = {"encoder_attention_mask": None} if self.family.mask_argument is None else {}
        with Tap(self.model) as tap, _single_group(self.model), _answering(self._recorded().projections):
            self.model.model.decoder(**{**arguments, **without_denoising, **group})
        return self.family.predict(self.model, tap._recorded())

    def features(self) -> tuple[list[Tensor], list[Tensor] | None]:
        """Return the maps (B, D, H, W) that the decoder attends to, and their valid cells (B, H, W) if it is told."""
        arguments = self._recorded().arguments
        sizes = [tuple(size) for size in arguments.get("spatial_shapes_list") or [self._map_size]]
        cells = [height * width for height, width in sizes]
        maps = [
            level.transpose(1, 2).unflatten(2, size)
            for level, size in zip(arguments["encoder_hidden_states"].split(cells, 1), sizes, strict=True)
        ]
        valid = arguments.get(self.family.mask_argument) if self.family.mask_argument else None
        if valid is None:
            return maps, None
        masks = valid.bool().split(cells, 1)
        return maps, [mask.unflatten(1, size) for mask, size in zip(masks, sizes, strict=True)]

    def _recorded(self) -> DecoderCall:
        if self.call is None:
            msg = "the model must be called inside `with Tap(model)` first: no call of its decoder was recorded"
            raise RuntimeError(msg)
        return self.call

    def _memory_projections(self) -> list[nn.Module]:
        """Those of all layers but checkpointed ones, which run again in the backward pass, where no hook answers."""
        return [
            layer.get_submodule(name)
            for layer in self.model.model.decoder.layers
            if not getattr(layer, "gradient_checkpointing", False)
            for name in self.family.memory_projections
        ]

    def _own_queries(self) -> slice:
        """Where the model's own queries are, without those of denoising and the copies of group DETR."""
        config = self.model.config
        count = config.two_stage_num_proposals if getattr(config, "two_stage", False) else config.num_queries
        return slice(-count, None) if self.family.own_queries == "last" else slice(0, count)


class QueryProjection(nn.Module):
    """Learned maps of a teacher's queries to the width of a student; anchors and reference points stay.

    Without parameters where both have the same width.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__()
        student_channels, teacher_channels = query_channels(student), query_channels(teacher)
        names = family_of(teacher).query_arguments if student_channels != teacher_channels else ()
        # No bias: the content of DETR's queries is zero, and stays it.
        self.maps = nn.ModuleDict(
            {name: nn.Linear(teacher_channels, student_channels, bias=False) for name in names if name in CONTENT}
        )
        for linear in self.maps.values():
            nn.init.orthogonal_(linear.weight)

    def forward(self, group: QueryGroup) -> QueryGroup:
        """Map each (B, M, D_teacher) to (B, M, D_student)."""
        return {name: self.maps[name](tensor) if name in self.maps else tensor for name, tensor in group.items()}


def distillation_loss(
    student: nn.Module,
    teacher: nn.Module,
    *,
    num_levels: int | None = None,
    terms: Sequence[dkl.Term] | None = None,
    **options: Any,
) -> dkl.DETRDistillationLoss:
    """Return a `DETRDistillationLoss` for two models: heads and widths as configured, the other options as given.

    Args:
        student: The student.
        teacher: The teacher.
        num_levels: Number of feature levels that are distilled. None: all of the student's.
        terms: Terms of the loss. None: those of its default, with a projection of the features where it takes one.
        **options: Those of `DETRDistillationLoss`. Without `class_map`, the classes of both must be the same, by number
            and, where the configurations have them, by name; `match_classes` makes a map by names.
    """
    check_apart(student, teacher)
    if options.get("class_map") is None:
        check_classes(student, teacher)
    defaults: dict[str, Any] = {
        "student_activation": family_of(student).activation,
        "teacher_activation": family_of(teacher).activation,
    }
    if terms is None:
        channels = feature_channels(student, teacher, num_levels)
        terms = [dkl.LogitsTerm(), dkl.FeatureTerm(*channels), dkl.QueryGroupTerm()]
    return dkl.DETRDistillationLoss(terms, **(defaults | options))


def feature_channels(student: nn.Module, teacher: nn.Module, num_levels: int | None = None) -> list[Any]:
    """Return the channels of each level of student and teacher, as `FeatureTerm` takes them; None where they agree."""
    if query_channels(student) == query_channels(teacher):
        return [None, None]
    num_levels = num_levels or getattr(student.config, "num_feature_levels", 1)
    return [[query_channels(model)] * num_levels for model in (student, teacher)]


def query_channels(model: nn.Module) -> int:
    """Return D, the width of a model's queries and of the features that they attend to."""
    config = model.config
    return config.hidden_size if config.model_type == "dab-detr" else config.d_model


def check_group(group: QueryGroup, own: QueryGroup) -> None:
    """Raise, with the remedy, unless a decoder that takes queries like `own` can take `group`."""
    if group.keys() != own.keys():
        msg = (
            f"the queries of the teacher are {sorted(group)}, the student's decoder takes {sorted(own)}: the query "
            "group needs a teacher with the same kind of queries; otherwise leave `group` and QueryGroupTerm out"
        )
        raise ValueError(msg)
    for name, tensor in group.items():
        if tensor.shape[-1] != own[name].shape[-1]:
            remedy = "map it with a QueryProjection" if name in CONTENT else "leave QueryGroupTerm out"
            msg = (
                f"`{name}` of the teacher's queries must have {own[name].shape[-1]} channels as in the student, "
                f"got {tensor.shape[-1]}; {remedy}"
            )
            raise ValueError(msg)
        if len(tensor) != len(own[name]):
            msg = f"teacher and student must see the same batch, got {len(tensor)} and {len(own[name])} images"
            raise ValueError(msg)


def _select_queries(predictions: Predictions, own: slice) -> Predictions:
    return Predictions(*(tensor[:, :, own] for tensor in predictions))


@contextmanager
def _answering(known: dict[nn.Module, Tensor]) -> Iterator[None]:
    """Let modules answer what is known. No hook can keep them from running; they run on no cell, at no cost."""

    def give_nothing(_: nn.Module, arguments: tuple[Tensor]) -> Tensor:
        return arguments[0][:, :0]

    def answer(module: nn.Module, _: Any, output: Tensor) -> Tensor:
        return known[module].to(output.dtype)  # another one where only one of the two calls is under autocast

    hooks = [module.register_forward_pre_hook(give_nothing) for module in known]
    hooks += [module.register_forward_hook(answer) for module in known]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _single_group(model: nn.Module) -> Iterator[None]:
    """LW-DETR and RF-DETR split queries into the groups of group DETR where this flag is set; a teacher's are one."""
    modules = [layer.self_attn for layer in model.model.decoder.layers] if hasattr(model.config, "group_detr") else []
    flags = [module.training for module in modules]
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module, flag in zip(modules, flags, strict=True):
            module.training = flag
