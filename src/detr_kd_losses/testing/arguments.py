"""Arguments with named axes, so that one law serves every function.

A :class:`Signature` says what each argument's dimensions are, in the letters of the glossary: L decoder layers, B
images, N student queries, M teacher queries, T targets, C classes, D channels; here also X coordinates, H and W cells.
:class:`Arguments` are tensors in that order, and know how to be permuted, padded, joined and cut along a letter. They
remember how they were made, so that a failure can say it in code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any, ParamSpec

import torch
from torch import Tensor

from detr_kd_losses.testing.requirements import Terms
from detr_kd_losses.testing.subject import MissingError, Subject, terms_of

__all__ = ["Arguments", "Signature", "remember_call"]

P = ParamSpec("P")


@dataclass(frozen=True)
class Signature:
    """Names and axes of a function's tensor arguments; printed, the call that a function must accept.

    Args:
        axes: By argument, in the order of the call, one letter per dimension.
        student: The arguments that have a gradient.
        partner_axis: The axis that entries of ``assignment`` point into.
        keywords: The arguments that are passed by name, and may be left out.
        returns: What the function returns, in words.
        twin: The student's arguments that make it equal to the teacher; None: there is no teacher to equal.
        pack: Turns the tensors into what is passed by position; None: the tensors are passed themselves.
        packed: What `pack` makes, as the parameters of a function.

    Examples:
        >>> signature = Signature({"logits": "LBNC", "positive": "LBN"}, student=("logits",), keywords=("positive",))
        >>> print(signature)
        (logits (L, B, N, C), *, positive (L, B, N))
        >>> signature.without("L").axes
        {'logits': 'BNC', 'positive': 'BN'}
    """

    axes: Mapping[str, str]
    student: Sequence[str] = ()
    partner_axis: str = ""
    keywords: Sequence[str] = ()
    returns: str = ""
    twin: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] | None = None
    pack: Callable[[Mapping[str, Any]], Sequence[Any]] | None = None
    packed: Sequence[str] = ()

    def without(self, axis: str) -> Signature:
        """The signature of one slice along `axis`."""
        return replace(self, axes={name: axes.replace(axis, "") for name, axes in self.axes.items()})

    def without_argument(self, name: str) -> Signature:
        """The signature without one argument."""
        return replace(self, axes={other: axes for other, axes in self.axes.items() if other != name})

    @property
    def by_position(self) -> list[str]:
        """What is passed by position."""
        return list(self.packed) if self.pack else [name for name in self.axes if name not in self.keywords]

    @property
    def by_keyword(self) -> list[str]:
        """What is passed by name."""
        return [] if self.pack else [name for name in self.axes if name in self.keywords]

    def require_accepted(self, subject: Subject, needs: Iterable[str]) -> None:
        """Raise :class:`MissingError` unless the function takes this call, and the keywords in `needs` with it."""
        subject.require_call(len(self.by_position), self.by_keyword, str(self))
        subject.require_keywords([name for name in needs if self.pack is None or name not in self.axes])

    def __str__(self) -> str:
        """The call that a function must accept."""

        def shown(name: str) -> str:
            # An argument of `packed` is not a tensor, and says what it is itself.
            return f"{name} ({', '.join(self.axes[name].replace('X', '4'))})" if name in self.axes else name

        keywords = ["*", *map(shown, self.by_keyword)] if self.by_keyword else []
        returns = f" -> {self.returns}" if self.returns else ""
        return f"({', '.join([*map(shown, self.by_position), *keywords])}){returns}"


@dataclass(frozen=True, eq=False, repr=False)
class Arguments:
    """The arguments of one call.

    Args:
        signature: What they are.
        tensors: By name; a keyword may be missing.
        steps: How they were made, in code: a call and the methods after it.

    Examples:
        >>> signature = Signature({"boxes": "BNX", "assignment": "BN"}, partner_axis="N")
        >>> pairs = Arguments(signature, {"boxes": torch.rand(1, 2, 4), "assignment": torch.tensor([[0, -1]])})
        >>> pairs.permuted("N").tensors["assignment"].tolist()
        [[-1, 1]]
        >>> pairs.permuted("N").padded("B", float("nan"))
        Arguments(...).permuted('N').padded('B', float('nan'))
    """

    signature: Signature
    tensors: Mapping[str, Tensor]
    steps: tuple[str, ...] = ("Arguments(...)",)

    def __repr__(self) -> str:
        """How they were made."""
        return "".join(self.steps)

    def __getitem__(self, name: str) -> Tensor:
        """The argument of that name."""
        if name not in self.signature.axes:
            msg = f"needs an argument {name}, and there is none in {self.signature}"
            raise MissingError(msg)
        return self.tensors[name]

    def size(self, axis: str) -> int:
        """Number of entries along `axis`."""
        return next(self[name].shape[position] for name, position in self._having(axis))

    def having(self, axis: str) -> list[str]:
        """Names of the arguments that have `axis`."""
        return [name for name, _ in self._having(axis)]

    def _having(self, axis: str) -> Sequence[tuple[str, int]]:
        axes = self.signature.axes
        if not any(axis in letters for letters in axes.values()):
            msg = f"needs an argument with the axis {axis}, and there is none in {self.signature}"
            raise MissingError(msg)
        return [(name, axes[name].index(axis)) for name in self.tensors if axis in axes[name]]

    def _with(self, tensors: Mapping[str, Any], step: str = "", signature: Signature | None = None) -> Arguments:
        """These arguments with some others in their place, made by one more step."""
        steps = (*self.steps, step) if step else self.steps
        return Arguments(signature or self.signature, {**self.tensors, **tensors}, steps)

    def replaced(self, **tensors: Any) -> Arguments:
        """These arguments with some others in their place."""
        return self._with(tensors, f".replaced({', '.join(f'{name}=...' for name in tensors)})")

    def without(self, *names: str) -> Arguments:
        """These arguments but some, which the signature then lacks, too."""
        signature = self.signature
        for name in names:
            signature = signature.without_argument(name)
        tensors = {name: tensor for name, tensor in self.tensors.items() if name not in names}
        step = f".without({', '.join(map(repr, names))})"
        return Arguments(signature, tensors, (*self.steps, step) if names else self.steps)

    def fitting(self, subject: Subject) -> Arguments:
        """These arguments but the keywords that the function does not accept: they may be left out."""
        given = [name for name in self.signature.by_keyword if name in self.tensors]
        return self.without(*(name for name in given if not subject.accepts(name)))

    def cast(self, dtype: torch.dtype) -> Arguments:
        """These arguments with all floating ones in `dtype`."""
        floating = {name: tensor for name, tensor in self.tensors.items() if tensor.is_floating_point()}
        return self._with({name: tensor.to(dtype) for name, tensor in floating.items()}, f".cast({dtype})")

    def taken(self, axis: str, indices: Sequence[int]) -> Arguments:
        """The entries `indices` along `axis`; the assignment is not renumbered."""
        return self._with(self._taken(axis, indices), f".taken({axis!r}, {list(indices)})")

    def _taken(self, axis: str, indices: Sequence[int]) -> Terms:
        index = torch.tensor(indices, dtype=torch.int64)
        return {name: self[name].index_select(at, index) for name, at in self._having(axis)}

    def entry(self, axis: str, index: int) -> Arguments:
        """One entry along `axis`, without that dimension."""
        entries = {name: self[name].select(at, index) for name, at in self._having(axis)}
        return self._with(entries, f".entry({axis!r}, {index})", self.signature.without(axis))

    def permuted(self, axis: str) -> Arguments:
        """Entries along `axis` moved on by one, and the assignment after them."""
        size = self.size(axis)
        moved = self._taken(axis, torch.arange(size).roll(1).tolist())
        if axis == self.signature.partner_axis and "assignment" in self.tensors:
            partner = moved.get("assignment", self.tensors["assignment"])
            moved["assignment"] = torch.where(partner < 0, partner, (partner + 1) % max(size, 1))
        return self._with(moved, f".permuted({axis!r})")

    def padded(self, axis: str, fill: float, count: int = 2) -> Arguments:
        """`count` more entries along `axis` that take no part: no partner, no mask, any number.

        Args:
            axis: The letter.
            fill: What their floating numbers are.
            count: How many.

        Returns:
            Arguments of that many more entries.
        """

        def pad(tensor: Tensor, at: int) -> Tensor:
            value = {torch.bool: False, torch.int64: -1}.get(tensor.dtype, fill)
            return torch.cat((tensor, tensor.new_full((*tensor.shape[:at], count, *tensor.shape[at + 1 :]), value)), at)

        number = repr(fill) if -1e300 < fill < 1e300 else f"float('{fill}')"
        return self._with(
            {name: pad(self[name], at) for name, at in self._having(axis)}, f".padded({axis!r}, {number})"
        )

    def joined(self) -> Arguments:
        """All images as one, with the queries and targets of all."""
        images = self.size("B")
        tensors = dict(self.tensors)
        if "assignment" in tensors:
            offset = torch.arange(images).unsqueeze(-1) * self.size(self.signature.partner_axis)
            assignment = self["assignment"]
            tensors["assignment"] = torch.where(assignment < 0, assignment, assignment + offset)
        joined = {name: tensors[name].flatten(at, at + 1).unsqueeze(at) for name, at in self._having("B")}
        return self._with(tensors | joined, ".joined()")

    def unpaired(self) -> Arguments:
        """No query has a partner."""
        return self._with({"assignment": torch.full_like(self["assignment"], -1)}, ".unpaired()")

    def at_teacher(self) -> Arguments:
        """The student says what the teacher says."""
        if self.signature.twin is None:
            msg = "needs a signature that says how a student equals its teacher (`twin`)"
            raise MissingError(msg)
        return self._with(self.signature.twin(self.tensors), ".at_teacher()")

    def in_graph(self, tensors: Mapping[str, Tensor]) -> Arguments:
        """The same numbers, as tensors that have a gradient."""
        return self._with(tensors)

    def call(self, function: Callable[..., Any], **options: Any) -> Any:
        """The function's answer; a :class:`Subject` remembers the call."""
        args, keywords = self._passed()
        if isinstance(function, Subject):
            return function.answer(self, args, keywords, options)
        return function(*args, **keywords, **options)

    def _passed(self) -> tuple[Sequence[Any], dict[str, Tensor]]:
        if self.signature.pack is not None:
            return self.signature.pack(self.tensors), {}
        by_position, by_keyword = self.signature.by_position, self.signature.by_keyword
        given = [self.tensors[name] for name in by_position if name in self.tensors]
        return given, {name: self.tensors[name] for name in by_keyword if name in self.tensors}

    @property
    def made_by(self) -> str:
        """The call that made them, before any other step."""
        return self.steps[0]

    def describe(self, name: str, options: Mapping[str, Any]) -> str:
        """The call of the function `name` in code, and the shapes that it passes."""
        more = "".join(f", {option}={value!r}" for option, value in options.items())
        shapes = ", ".join(f"{argument} {_shape(tensor)}" for argument, tensor in self.tensors.items())
        return f"arguments{''.join(self.steps[1:])}.call({name}{more}): {shapes}"

    def terms(self, loss: Callable[..., Any], **options: Any) -> Terms:
        """The loss's terms by name; a bare scalar is called ``loss``."""
        return terms_of(self.call(loss, **options))

    def terms_and_gradients(self, loss: Callable[..., Any], **options: Any) -> tuple[Terms, Terms]:
        """The loss's terms, and the gradient of their sum for each student argument."""
        leaves = {name: self[name].detach().clone().requires_grad_() for name in self.signature.student}
        terms = self.in_graph(leaves).terms(loss, **options)
        total = torch.stack([term.double() for term in terms.values()]).sum()
        gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
        return terms, dict(zip(leaves, gradients, strict=True))


def _shape(tensor: Tensor | Sequence[Tensor]) -> str:
    if isinstance(tensor, Tensor):
        return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
    return f"[{', '.join(map(_shape, tensor))}]"


def remember_call(make: Callable[P, Arguments]) -> Callable[P, Arguments]:
    """Decorate a function that makes arguments, so that they know the call that made them."""

    @wraps(make)
    def made(*args: P.args, **options: P.kwargs) -> Arguments:
        given = [*map(repr, args), *(f"{name}={value!r}" for name, value in options.items())]
        return replace(make(*args, **options), steps=(f"{make.__name__}({', '.join(given)})",))

    return made
