"""Options of Modules: attributes that are validated whenever they are set, so that none is taken and then ignored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from typing import TYPE_CHECKING, Any, ClassVar, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor, nn

from detr_kd_losses._validation import validate_choice, validate_dtype, validate_not_negative, validate_type

__all__: list[str] = []

Rule = Callable[[str, Any], None]
Rules = Mapping[str, Rule]


def one_of(*choices: str | None) -> Rule:
    """The rule of an option that is one of `choices`."""
    return lambda name, value: validate_choice(name, value, choices)


def boolean(name: str, value: object) -> None:
    """The rule of an option that is on or off."""
    validate_type(name, value, bool, "True or False")


def text(name: str, value: object) -> None:
    """The rule of an option that is a string."""
    validate_type(name, value, str, "a string")


def class_map(name: str, value: object) -> None:
    """The rule of a class map: as far as it can be told without the numbers of classes."""
    if isinstance(value, Tensor):
        validate_dtype(name, value, torch.int64)
    elif value is not None:
        try:
            index = torch.as_tensor(value)
        except (RuntimeError, TypeError, ValueError):  # a dict, names of classes
            index = torch.zeros(1)
        wrong = index.dtype != torch.int64 or index.ndim != 1 or bool((index < -1).any())
        if wrong and index.numel():
            msg = f"`{name}` must be a sequence of class numbers, -1 = dropped, got {value!r}"
            raise ValueError(msg)


HEADS: Rules = {
    "student_activation": one_of("sigmoid", "softmax"),
    "teacher_activation": one_of("sigmoid", "softmax"),
    "class_map": class_map,
}
WEIGHTS: Rules = dict.fromkeys(("weight_class", "weight_bbox", "weight_giou"), validate_not_negative)


def validate_options(rules: Rules, **options: Any) -> None:
    """Raise unless each of the `options` keeps its rule."""
    for name, value in options.items():
        rules[name](name, value)


if TYPE_CHECKING:
    P = ParamSpec("P")
    R_co = TypeVar("R_co", covariant=True)

    class _HasForward(Protocol[P, R_co]):
        def forward(self, *args: P.args, **kwargs: P.kwargs) -> R_co: ...


class TypedCall:
    """Put before ``nn.Module``: a call has the types of `forward`. PyTorch's takes anything and returns Any."""

    if TYPE_CHECKING:

        def __call__(self: _HasForward[P, R_co], *args: P.args, **kwargs: P.kwargs) -> R_co: ...


class OptionModule(TypedCall, nn.Module):
    """A Module whose options are attributes, to be read and set at any time: in force at once, or an error at once.

    Attributes:
        rules: What raises for a wrong value of each option, by name.
    """

    rules: ClassVar[Rules] = {}

    def __init__(self, **options: Any) -> None:
        super().__init__()
        if "class_map" in options:
            # A buffer, so that it moves with the Module; not persistent, so that checkpoints stay as they are.
            self.register_buffer("class_map", None, persistent=False)
        for name, value in options.items():
            setattr(self, name, value)

    def __init_subclass__(cls) -> None:
        """Close the Module once it is made: its own ``__init__`` may set what it likes, whoever comes after may not."""
        init = cls.__init__

        @wraps(init)
        def init_and_close(self: OptionModule, *args: Any, **kwargs: Any) -> None:
            init(self, *args, **kwargs)
            if type(self) is cls:
                self.__dict__["_is_made"] = True

        cls.__init__ = init_and_close  # type: ignore[method-assign]

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an option, validated, or what every Module has."""
        if name in self.rules:
            self.rules[name](name, value)
            if name == "class_map" and value is not None:
                value = torch.as_tensor(value, dtype=torch.int64)
        elif "_is_made" in self.__dict__ and not (name.startswith("_") or hasattr(self, name)):
            parts = [path for path, part in self.named_modules() if name in getattr(part, "rules", ())]
            where = f"set that of {' or '.join(parts)}" if parts else f"it has {', '.join(self.rules)}"
            msg = f"`{type(self).__name__}` has no option `{name}`: {where}"
            raise AttributeError(msg)
        super().__setattr__(name, value)

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    @property
    def options(self) -> dict[str, Any]:
        """The options by name."""
        return {name: getattr(self, name) for name in self.rules}

    @property
    def call_options(self) -> dict[str, Any]:
        """The options of a call: in evaluation mode, in which a replica may be alone, counts are not shared."""
        options = self.options
        if "sync_normalizer" in options:
            options["sync_normalizer"] = self.sync_normalizer and self.training
        return options

    def extra_repr(self) -> str:
        """Show the options."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
