"""A teacher that runs whenever a student trains: two hooks that no copy of the student has."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

__all__ = ["attach", "images_and_masks"]

MASKS = ("mask", "pixel_mask")  # arguments that a teacher needs beside the images


class _Uncopied(OrderedDict[int, Any]):
    """Hooks of a module, or what is known of them, of which some are in no copy and in no pickle of the module."""

    def __init__(self, hooks: Mapping[int, Any]) -> None:
        super().__init__(hooks)
        self.own: set[int] = set()

    def _others(self) -> OrderedDict[int, Any]:
        return OrderedDict((key, hook) for key, hook in self.items() if key not in self.own)

    def __deepcopy__(self, memo: dict[int, Any]) -> OrderedDict[int, Any]:
        return OrderedDict(self._others())

    def __copy__(self) -> OrderedDict[int, Any]:
        return self._others()

    def __reduce__(self) -> tuple[Any, ...]:
        return OrderedDict, (list(self._others().items()),)


_DICTS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)


_attached: WeakKeyDictionary[nn.Module, Callable[[], None]] = WeakKeyDictionary()


def attach(module: nn.Module, before: Callable[..., Any], after: Callable[..., Any]) -> Callable[[], None]:
    """Call `before` and `after` around each forward pass of a module; copies and pickles of it are without.

    A second pair replaces the first.

    Args:
        module: The module.
        before: Called with the module, its arguments and its keyword arguments.
        after: Called with those and with what the module answers; None if it has raised.

    Returns:
        A function that takes both off.
    """
    _attached.pop(module, lambda: None)()
    former = {name: getattr(module, name) for name in _DICTS}
    dicts = {name: _Uncopied(hooks) for name, hooks in former.items()}
    vars(module).update(dicts)
    handles = [
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after, with_kwargs=True, always_call=True),
    ]
    for hooks in dicts.values():
        hooks.own |= {handle.id for handle in handles}

    def detach() -> None:
        for handle in handles:
            handle.remove()

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
