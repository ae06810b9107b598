"""The hooks of a tap: what they note of one call of a decoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from detr_kd_losses.taps.find import Found, bind, validate_no_replica
from detr_kd_losses.taps.record import Call

__all__ = ["Recorder"]


class Recorder:
    """Notes what happens inside a decoder, and makes a :class:`Call` of it when the decoder answers.

    Args:
        decoder: The decoder.
        ancestors: The modules around it.
        found: How it is read.
        keep: What is given the call.
    """

    def __init__(
        self, decoder: nn.Module, ancestors: tuple[nn.Module, ...], found: Found, keep: Callable[[Call], None]
    ) -> None:
        self.decoder, self.ancestors, self.found, self.keep = decoder, ancestors, found, keep
        self.layers = list(dict.fromkeys(decoder.get_submodule("layers").children()))  # some repositories share them
        self.was_training = decoder.training
        self._begin()

    def _begin(self) -> None:
        self.states: list[Tensor] = []
        self.projections: dict[nn.Module, list[Tensor]] = {}
        self.outer: dict[str, Any] = {}
        self.watched: Any = None

    def hooks(self) -> list[RemovableHandle]:
        """Hang all hooks, and return their handles."""
        outer, watch = self.ancestors[0], self.found.description.watch
        hooks = [layer.register_forward_hook(self._record_state) for layer in self.layers]
        hooks += [module.register_forward_hook(self._record_projection) for module in self._memory_projections()]
        hooks.append(outer.register_forward_pre_hook(self._record_outer, with_kwargs=True))
        if watch is not None and hasattr(outer, watch):
            hooks.append(outer.get_submodule(watch).register_forward_hook(self._record_watched))
        if self.found.description.training_flag:
            hooks.append(self.decoder.register_forward_pre_hook(self._let_all_layers_answer))
        hooks.append(self.decoder.register_forward_hook(self._record_call, with_kwargs=True))
        return hooks

    def _memory_projections(self) -> list[nn.Module]:
        """Those of all layers but checkpointed ones, which run again in the backward pass, where no hook answers."""
        names = self.found.description.memory_projections
        return [
            module
            for layer in self.layers
            if not getattr(layer, "gradient_checkpointing", False)
            for name, module in layer.named_modules()
            if name in names
        ]

    def _let_all_layers_answer(self, *_: Any) -> None:
        # No sooner: a FrozenTeacher puts all that is in training mode back into evaluation mode when it is called.
        self.was_training, self.decoder.training = self.decoder.training, True

    def _record_state(self, _: nn.Module, __: Any, output: Any) -> None:
        self.states.append(output[0] if isinstance(output, tuple) else output)

    def _record_projection(self, module: nn.Module, _: Any, output: Tensor) -> None:
        # A teacher, which runs without gradients, must hold nothing for a replay that never comes. Compiled code
        # would be compiled again for every tap. In another tap's replay there is nothing: the module saw no cell.
        if not torch.compiler.is_compiling() and output.requires_grad and output.numel():
            self.projections.setdefault(module, []).append(output)

    def _record_outer(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.outer = bind(module.forward, args, kwargs)

    def _record_watched(self, _: nn.Module, __: Any, output: Any) -> None:
        self.watched = output

    def _record_call(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
        validate_no_replica(decoder)
        arguments = bind(self.decoder.forward, args, kwargs)
        # What a layer calls twice may have seen two things.
        once = {module: outputs[0] for module, outputs in self.projections.items() if len(outputs) == 1}
        self.keep(
            Call(
                self.decoder,
                self.ancestors,
                self.found.description,
                self.found.roles,
                arguments,
                output,
                self.states,
                once,
                self.outer,
                self.watched,
                _autocast(arguments),
            )
        )
        self._begin()
        answers_all = self.was_training or not self.found.description.training_flag
        self.decoder.training = self.was_training
        return None if answers_all else _last_alone(self.decoder, output)


def _autocast(arguments: Mapping[str, Any]) -> tuple[bool, str, torch.dtype]:
    device = next(value.device.type for value in arguments.values() if isinstance(value, Tensor))
    if not torch.amp.is_autocast_available(device):
        return False, "cpu", torch.bfloat16
    return torch.is_autocast_enabled(device), device, torch.get_autocast_dtype(device)


def _last_alone(decoder: nn.Module, output: Any) -> Any:
    """What a decoder in evaluation mode answers: of all layers, that which it stops at. None: no change."""
    if not isinstance(output, tuple):
        return None
    layers = len(decoder.layers)  # type: ignore[arg-type]
    last = getattr(decoder, "eval_idx", layers - 1)
    return tuple(
        part[last : last + 1] if isinstance(part, Tensor) and part.ndim == 4 and len(part) == layers else part
        for part in output
    )
