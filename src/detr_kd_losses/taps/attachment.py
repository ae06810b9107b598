"""A teacher that runs whenever a student trains: two hooks that no copy of the student has."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary, ref

from torch import nn

from detr_kd_losses.taps.find import validate_no_replica

__all__ = ["attach", "images_and_masks"]

MASKS = ("mask", "pixel_mask")  # arguments that a teacher needs beside the images


_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)
_STATE = "__getstate__"  # what pickle and copy ask a module for, before its class

_attached: WeakKeyDictionary[nn.Module, Callable[[], None]] = WeakKeyDictionary()


def attach(module: nn.Module, before: Callable[..., Any], after: Callable[..., Any]) -> Callable[[], None]:
    """Call `before` and `after` around each forward pass of a module; copies and pickles of it are without.

    A second pair replaces the first. Hooks of others stay what they were: their handles still remove them.

    Args:
        module: The module.
        before: Called with the module, its arguments and its keyword arguments.
        after: Called with those and with what the module answers; None if it has raised.

    Returns:
        A function that takes both off.
    """
    _attached.get(module, lambda: None)()

    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        validate_no_replica(module)
        before(module, args, kwargs)

    handles = [
        module.register_forward_pre_hook(begin, with_kwargs=True),
        module.register_forward_hook(after, with_kwargs=True, always_call=True),
    ]
    own = {handle.id for handle in handles}

    def state_without(module: nn.Module) -> dict[str, Any]:
        state = getattr(type(module), _STATE, vars)(module)
        hooks = {name: OrderedDict((key, state[name][key]) for key in state[name] if key not in own) for name in _HOOKS}
        return {name: value for name, value in state.items() if name != _STATE} | hooks

    vars(module)[_STATE] = MethodType(state_without, module)
    reference = ref(module)  # what is attached must not keep the module alive

    def detach() -> None:
        for handle in handles:
            handle.remove()
        known = reference()
        if known is not None and _attached.get(known) is detach:
            del _attached[known], vars(known)[_STATE]

    _attached[module] = detach
    return detach


def images_and_masks(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return what a teacher is to see of a call of the student: the images, which come first, and their masks.

    Not the targets, which models with denoising take as well.
    """
    parameters = inspect.signature(model.forward).parameters.items()
    names = [name for name, parameter in parameters if parameter.kind < 2]  # positional ones
    masks = {name: kwargs[name] for name in MASKS if name in kwargs}
    masks |= {name: value for name, value in zip(names, args, strict=False) if name in MASKS}
    if args:
        return args[0], masks
    if names and names[0] in kwargs:
        return kwargs[names[0]], masks
    msg = f"the images must be the first argument of the student's forward, {names[:1]}, got {sorted(kwargs)}"
    raise TypeError(msg)
