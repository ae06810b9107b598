"""Read everything that distillation needs from a detector, without a change to its code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from detr_kd_losses.heads import Activation
from detr_kd_losses.outputs import BoxDistributions, DetectorOutput, Predictions
from detr_kd_losses.taps.find import find_decoder, unwrap
from detr_kd_losses.taps.queries import arguments_of, take_queries
from detr_kd_losses.taps.record import QUERY_ROLES, Call, Description, Layers, QueryGroup
from detr_kd_losses.taps.recorder import Recorder
from detr_kd_losses.weights import best_queries

__all__ = ["Tap"]


class Tap:
    """Records the call of a model's decoder while it is entered.

    What the decoder is given holds the queries, the feature maps and the padding; what it answers gives the predictions
    of every layer. A second call, with other queries in place of the model's own, is an extra query group: it equals a
    concatenation under a block mask, for a group of any size, and takes what the layers have projected of the memory
    from the first call, with its gradients.

    Denoising queries, copies of group DETR and proposals of the encoder are left out. A model in evaluation mode whose
    decoder predicts after its last layer alone is read at all layers, at any image size, and answers as ever. Nothing
    stays on the model: all hooks are gone when the block is left.

    Args:
        model: A detector. One in DistributedDataParallel is unwrapped.
        description: How to read it. None: a family that is known, by the names of the arguments of its decoder, or by
            ``config.model_type`` if it is of transformers.

    Raises:
        ValueError: If the decoder is not found.
        RuntimeError: If the model is compiled as a whole, where no hook sees the decoder.

    Examples:
        >>> class Decoder(nn.Module):  # is handed its heads, as that of RT-DETR
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layers = nn.ModuleList([nn.Linear(8, 8)])
        ...     def forward(self, target, ref_points_unact, memory, spatial_shapes, bbox_head, score_head):
        ...         states = self.layers[0](target)
        ...         return bbox_head(states).sigmoid().unsqueeze(0), score_head(states).unsqueeze(0)
        >>> class Detector(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.decoder, self.boxes, self.classes = Decoder(), nn.Linear(8, 4), nn.Linear(8, 3)
        ...     def forward(self, images):
        ...         cells = images.flatten(2).transpose(1, 2)
        ...         return self.decoder(cells[:, :6], cells[:, :6, :4], cells, [(5, 5)], self.boxes, self.classes)
        >>> student, teacher, images = Detector(), Detector(), torch.randn(2, 8, 5, 5)
        >>> with torch.no_grad(), Tap(teacher) as teacher_tap:
        ...     answer = teacher(images)
        >>> with Tap(student) as student_tap:
        ...     answer = student(images)
        >>> output = student_tap.output(group=teacher_tap.query_group())
        >>> output.logits.shape, output.group.logits.shape
        (torch.Size([1, 2, 6, 3]), torch.Size([1, 2, 6, 3]))
    """

    def __init__(self, model: nn.Module, description: Description | None = None) -> None:
        self.model = unwrap(model)
        self.found = find_decoder(self.model, description)
        self.call: Call | None = None
        self._entered = ExitStack()
        self._inside = False

    @property
    def description(self) -> Description:
        """How the model is read."""
        return self.found.description

    @property
    def activation(self) -> Activation:
        """Of the class head, as :class:`DETRDistillationLoss` takes it."""
        return self.description.activation

    def __enter__(self) -> Tap:
        """Hang the hooks on the decoder."""
        found = self.found
        decoder, ancestors = found.decoder(self.model), found.ancestors(self.model)
        _refuse_compiled([decoder, *ancestors])
        recorder = Recorder(decoder, ancestors, found, self._keep)
        for hook in recorder.hooks():
            self._entered.callback(hook.remove)
        self._entered.enter_context(set_attribute("training", decoder.training, [decoder]))  # whatever happens
        of_one_size = [module for module in self.model.modules() if getattr(module, "eval_spatial_size", None)]
        self._entered.enter_context(set_attribute("eval_spatial_size", None, of_one_size))
        self._inside = True
        return self

    def __exit__(self, *_: object) -> None:
        """Take the hooks off."""
        self._inside = False
        self._entered.close()

    def output(self, group: QueryGroup | None = None, *, levels: Sequence[int] | None = None) -> DetectorOutput:
        """Return what the model has said about the batch, layer by layer.

        Args:
            group: Queries of another model, to be sent through this model's decoder as well.
            levels: Which feature levels to keep, where teacher and student have different ones. None: all.

        Returns:
            A :class:`DetectorOutput`, with a `group` if one was given.

        Raises:
            RuntimeError: If no call was recorded.
            ValueError: If `group` does not fit the decoder, or a level does not exist.
        """
        call = self._recorded()
        own = _select(self.description.predict(call), self._own_queries())
        replayed = None if group is None else self.replay(group)
        features, padding_mask = self.features(levels)
        return DetectorOutput(
            logits=own.logits,
            boxes=own.boxes,
            queries=own.queries,
            features=features,
            padding_mask=padding_mask,
            group=None if replayed is None else Predictions(replayed.logits, replayed.boxes),
            group_index=None if group is None else group.selected,
            distributions=own.distributions,
        )

    def query_group(self, index: Tensor | None = None, *, share: float = 1.0) -> QueryGroup:
        """Return the model's own queries, for the decoder of another model.

        Args:
            index: (B, K), which of them. None: all, or the surest.
            share: How many of them in (0, 1], the surest in the last layer first (:func:`best_queries`).

        Returns:
            A :class:`QueryGroup` without gradients.

        Raises:
            RuntimeError: If no call was recorded.
            ValueError: If `share` is not in (0, 1].
        """
        call, own = self._recorded(), self._own_queries()
        if index is None and share != 1.0:
            logits = self.description.predict(call).logits[-1][:, own]
            index = best_queries(logits, share, activation=self.activation)
        return take_queries(call, own, index)

    def replay(self, group: QueryGroup) -> Layers:
        """Run the decoder once more on the same images, with other queries in place of the model's own.

        Where gradients were recorded, the memory is not projected once more.

        Args:
            group: The queries, of any number, of the same kind and width.

        Returns:
            What the decoder says about them, as :class:`Layers`.

        Raises:
            RuntimeError: If no call was recorded, or inside the block.
            ValueError: If `group` does not fit the decoder.
        """
        call = self._recorded()
        if self._inside:
            msg = "`replay` and `output(group=...)` must be called after the `with Tap(model)` block"
            raise RuntimeError(msg)
        others = {name: None for name in self.description.without if name in call.arguments}
        arguments = {**call.arguments, **others, **arguments_of(group, call)}
        enabled, device, dtype = call.autocast
        with ExitStack() as around:
            tap = around.enter_context(Tap(self.model, self.description))
            around.enter_context(torch.autocast(device, dtype, enabled=enabled))
            around.enter_context(set_attribute("training", False, self._grouping(call)))
            around.enter_context(_answering(call.projections))
            call.decoder(**arguments)
        return self.description.predict(tap._recorded())

    def features(self, levels: Sequence[int] | None = None) -> tuple[list[Tensor], list[Tensor] | None]:
        """Return the maps that the decoder attends to.

        Args:
            levels: Which of them. None: all.

        Returns:
            Maps (B, D, H, W), and their valid cells (B, H, W) if the decoder is told of padding.

        Raises:
            RuntimeError: If no call was recorded.
            ValueError: If a level does not exist.
        """
        call = self._recorded()
        sizes = self.description.sizes(call)
        wanted = list(range(len(sizes)) if levels is None else levels)
        if not set(wanted) <= set(range(len(sizes))):
            msg = f"`levels` must be of the {len(sizes)} feature levels of {type(self.model).__name__}, got {wanted}"
            raise ValueError(msg)
        memory, padding = call.argument("memory"), call.argument("padding")
        memory = memory if self.description.batch_first else memory.transpose(0, 1)
        cells = [height * width for height, width in sizes]
        maps = [
            level.transpose(1, 2).unflatten(2, size) for level, size in zip(memory.split(cells, 1), sizes, strict=True)
        ]
        features = [maps[level] for level in wanted]
        if padding is None:
            return features, None
        valid = ~padding.bool() if self.description.true_is_padding else padding.bool()
        masks = [mask.unflatten(1, size) for mask, size in zip(valid.split(cells, 1), sizes, strict=True)]
        return features, [masks[level] for level in wanted]

    def _keep(self, call: Call) -> None:
        self.call = call

    def _recorded(self) -> Call:
        if self.call is None:
            msg = (
                "the model must be called inside `with Tap(model)` first: no call of its decoder was recorded, as of a "
                "model that torch.compile has compiled as a whole"
            )
            raise RuntimeError(msg)
        return self.call

    def _grouping(self, call: Call) -> list[nn.Module]:
        """Modules that would split the queries of a replay into groups."""
        path = self.description.grouped
        return [] if path is None else [layer.get_submodule(path) for layer in call.decoder.layers]  # type: ignore[union-attr]

    def _own_queries(self) -> slice:
        """Where the model's own queries are, without those of denoising and the copies of group DETR."""
        call = self._recorded()
        masks = [name for name in self.description.without if call.arguments.get(name) is not None]
        if self.description.own_queries == "last" and not masks:
            return slice(None)
        parts = (call.argument(role) for role in QUERY_ROLES)
        dimension = 1 if self.description.batch_first else 0
        total = next(part.shape[dimension] for part in parts if part is not None)
        count = min(self.description.own_count(call), total)
        return slice(total - count, None) if self.description.own_queries == "last" else slice(0, count)


def _select(layers: Layers, own: slice) -> Layers:
    queries = None if layers.queries is None else layers.queries[:, :, own]
    distributions = layers.distributions
    if distributions is not None:
        logits, references, bins, scale = distributions
        distributions = BoxDistributions(logits[:, :, own], references[:, :, own], bins, scale)
    return Layers(layers.logits[:, :, own], layers.boxes[:, :, own], queries, distributions)


def _refuse_compiled(modules: Sequence[nn.Module]) -> None:
    """Raise where code was compiled around the decoder: it was traced without hooks and looks for none later."""
    for module in modules:
        if getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod"):
            msg = (
                f"a tap needs the modules around the decoder uncompiled, got a compiled {_kind(module)}; "
                "compile what is inside them instead, such as backbone and encoder: `model.backbone.compile()`"
            )
            raise RuntimeError(msg)


def _kind(module: nn.Module) -> str:
    return type(getattr(module, "_orig_mod", module)).__name__


@contextmanager
def set_attribute(name: str, value: Any, modules: Sequence[nn.Module]) -> Iterator[None]:
    """Let an attribute of each module itself, not of its children, be `value` for a while."""
    before = [getattr(module, name) for module in modules]
    for module in modules:
        setattr(module, name, value)
    try:
        yield
    finally:
        for module, former in zip(modules, before, strict=True):
            setattr(module, name, former)


@contextmanager
def _answering(known: Mapping[nn.Module, Tensor]) -> Iterator[None]:
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
