"""Which module of a model is its decoder, and how it is read."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from torch import nn

from detr_kd_losses.taps.families import BY_ARGUMENTS, BY_MODEL_TYPE
from detr_kd_losses.taps.record import Description

__all__ = ["Found", "find_decoder", "query_channels", "unwrap", "validate_no_replica"]


class Found(NamedTuple):
    """The decoder of a model: where it is, how it is read, and the name of the argument in each role."""

    path: str
    description: Description
    roles: dict[str, str]

    def decoder(self, model: nn.Module) -> nn.Module:
        """The decoder."""
        return model.get_submodule(self.path)

    def ancestors(self, model: nn.Module) -> tuple[nn.Module, ...]:
        """The modules that hold it, from the nearest to the model."""
        names = self.path.split(".")[:-1]
        return tuple(model.get_submodule(".".join(names[:depth])) for depth in range(len(names), -1, -1))


_found: WeakKeyDictionary[nn.Module, Found] = WeakKeyDictionary()
"""What was found by looking through all modules, which takes a while. Holds no module: paths alone."""


def find_decoder(model: nn.Module, description: Description | None = None) -> Found:
    """Find the decoder of a model.

    Args:
        model: A detector, not wrapped.
        description: How to read it. None: a family of transformers by ``model.config.model_type``, or one whose
            decoder is told by the names of its arguments.

    Returns:
        A :class:`Found`.

    Raises:
        ValueError: If no decoder fits, or more than one.
    """
    if description is not None:
        return _by_description(model, description)
    if model not in _found:
        model_type = getattr(getattr(model, "config", None), "model_type", None)
        known = BY_MODEL_TYPE.get(model_type) if isinstance(model_type, str) else None
        _found[model] = _by_arguments(model) if known is None else _by_description(model, known)
    return _found[model]


def _by_description(model: nn.Module, description: Description) -> Found:
    if description.path is None:
        return _only(model, list(_fitting(model, [description])), [description])
    try:
        decoder = model.get_submodule(description.path)
    except AttributeError as error:
        msg = f"`model` must have its decoder at {description.path!r}, got {type(model).__name__}: {error}"
        raise ValueError(msg) from None
    roles = _roles(decoder, description)
    missing = [role for role in description.arguments if role not in roles and role not in description.optional]
    if missing or not hasattr(decoder, "layers"):
        names = {role: description.arguments[role] for role in missing}
        msg = (
            f"the decoder at {description.path!r} must have `layers` and an argument of each of {names}, got "
            f"{type(decoder).__name__}({', '.join(_parameters(decoder))})"
        )
        raise ValueError(msg)
    return Found(description.path, description, roles)


def _by_arguments(model: nn.Module) -> Found:
    return _only(model, list(_fitting(model, BY_ARGUMENTS)), BY_ARGUMENTS)


def _fitting(model: nn.Module, descriptions: Sequence[Description]) -> Iterator[Found]:
    for path, module in model.named_modules():
        if not path or not hasattr(module, "layers"):
            continue
        for description in descriptions:
            roles = _roles(module, description)
            required = set(description.arguments) - set(description.optional)
            if required <= roles.keys() and all(hasattr(module, name) for name in description.attributes):
                yield Found(path, description, roles)
                break  # the first that fits; the more special come first


def _only(model: nn.Module, fitting: Sequence[Found], descriptions: Sequence[Description]) -> Found:
    if len(fitting) == 1:
        return fitting[0]
    families = ", ".join(description.name for description in descriptions)
    if not fitting:
        msg = (
            f"`model` must have a decoder whose arguments are those of one of {families}; {type(model).__name__} has "
            "none: write a Description of it and give it to the Tap"
        )
    else:
        msg = (
            f"`model` must have one decoder, {type(model).__name__} has {[found.path for found in fitting]}; give the "
            "Tap the part that is meant, or a Description with its path"
        )
    raise ValueError(msg)


def _roles(module: nn.Module, description: Description) -> dict[str, str]:
    parameters = _parameters(module)
    named = {
        role: next((name for name in names if name in parameters), None)
        for role, names in description.arguments.items()
    }
    return {role: name for role, name in named.items() if name is not None}


def _parameters(module: nn.Module) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(module.forward).parameters


def bind(forward: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call by name, whether they were given by position or by name."""
    signature = inspect.signature(forward)
    bound = signature.bind(*args, **kwargs).arguments
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            bound |= bound.pop(name, {})
    return dict(bound)


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model in a DistributedDataParallel."""
    return model.get_submodule("module") if type(model).__name__ == "DistributedDataParallel" else model


def validate_no_replica(module: nn.Module) -> None:
    """Raise where DataParallel runs copies of a model in threads: their hooks would all write into one place."""
    if getattr(module, "_is_replica", False):
        msg = (
            f"{type(module).__name__} must not run in torch.nn.DataParallel, whose copies of it share their hooks; use "
            "DistributedDataParallel (torchrun), or show the process one GPU"
        )
        raise RuntimeError(msg)


def query_channels(model: nn.Module, description: Description | None = None) -> int:
    """Return D, the width of a model's queries and of the features that they attend to.

    Args:
        model: A detector.
        description: How to read it, as :class:`Tap` takes it.

    Returns:
        What the decoder, a module around it, or a configuration calls `hidden_dim`, `d_model` or `hidden_size`.

    Raises:
        ValueError: If none of them says it.
    """
    width = attribute_around(model, ("hidden_dim", "d_model", "hidden_size"), description)
    if width is None:
        name = type(model).__name__
        msg = f"the width of the queries of {name} must be in `hidden_dim` or `d_model` around its decoder"
        raise ValueError(msg)
    return width


def attribute_around(model: nn.Module, names: Sequence[str], description: Description | None = None) -> int | None:
    """Return the first number under one of `names` in a decoder, the modules around it, or their configurations."""
    model = unwrap(model)
    found = find_decoder(model, description)
    around = [found.decoder(model), *found.ancestors(model)]
    for holder in [*around, *(module.config for module in around if hasattr(module, "config"))]:
        for name in names:
            if isinstance(getattr(holder, name, None), int):
                return int(getattr(holder, name))
    return None
