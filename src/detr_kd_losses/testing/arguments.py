"""Arguments with named axes, so that one law serves every function.

A :class:`Signature` says what each argument's dimensions are, in the letters of the glossary: L decoder layers, B
images, N student queries, M teacher queries, T targets, C classes, D channels; here also X coordinates, H and W cells.
:class:`Arguments` are tensors in that order, and know how to be permuted, padded, joined and cut along a letter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

__all__ = ["Arguments", "Signature", "Terms"]

Terms = dict[str, Tensor]


@dataclass(frozen=True)
class Signature:
    """Names and axes of a function's tensor arguments.

    Args:
        axes: By argument, in the order of the call, one letter per dimension.
        student: The arguments that have a gradient.
        partner_axis: The axis that entries of ``assignment`` point into.
        keywords: The arguments that are passed by name, and may be left out.

    Examples:
        >>> Signature({"logits": "LBNC"}, student=("logits",)).without("L").axes
        {'logits': 'BNC'}
    """

    axes: Mapping[str, str]
    student: Sequence[str] = ()
    partner_axis: str = ""
    keywords: Sequence[str] = ()

    def without(self, axis: str) -> Signature:
        """The signature of one slice along `axis`."""
        return replace(self, axes={name: axes.replace(axis, "") for name, axes in self.axes.items()})


@dataclass(frozen=True, eq=False)
class Arguments:
    """The arguments of one call.

    Args:
        signature: What they are.
        tensors: By name; a keyword may be missing.

    Examples:
        >>> signature = Signature({"boxes": "BNX", "assignment": "BN"}, partner_axis="N")
        >>> pairs = Arguments(signature, {"boxes": torch.rand(1, 2, 4), "assignment": torch.tensor([[0, -1]])})
        >>> pairs.permuted("N").tensors["assignment"].tolist()
        [[-1, 1]]
    """

    signature: Signature
    tensors: Mapping[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        """The argument of that name."""
        return self.tensors[name]

    def size(self, axis: str) -> int:
        """Number of entries along `axis`."""
        return next(self[name].shape[position] for name, position in self._having(axis))

    def having(self, axis: str) -> list[str]:
        """Names of the arguments that have `axis`."""
        return [name for name, _ in self._having(axis)]

    def _having(self, axis: str) -> Iterable[tuple[str, int]]:
        axes = self.signature.axes
        return [(name, axes[name].index(axis)) for name in self.tensors if axis in axes[name]]

    def replaced(self, **tensors: Any) -> Arguments:
        """These arguments with some others in their place."""
        return replace(self, tensors={**self.tensors, **tensors})

    def without(self, name: str) -> Arguments:
        """These arguments but one."""
        return replace(self, tensors={other: tensor for other, tensor in self.tensors.items() if other != name})

    def cast(self, dtype: torch.dtype) -> Arguments:
        """These arguments with all floating ones in `dtype`."""
        floating = {name: tensor for name, tensor in self.tensors.items() if tensor.is_floating_point()}
        return self.replaced(**{name: tensor.to(dtype) for name, tensor in floating.items()})

    def taken(self, axis: str, indices: Sequence[int]) -> Arguments:
        """The entries `indices` along `axis`; the assignment is not renumbered."""
        index = torch.tensor(indices, dtype=torch.int64)
        return self.replaced(**{name: self[name].index_select(at, index) for name, at in self._having(axis)})

    def entry(self, axis: str, index: int) -> Arguments:
        """One entry along `axis`, without that dimension."""
        tensors = {**self.tensors, **{name: self[name].select(at, index) for name, at in self._having(axis)}}
        return Arguments(self.signature.without(axis), tensors)

    def permuted(self, axis: str) -> Arguments:
        """Entries along `axis` moved on by one, and the assignment after them."""
        size = self.size(axis)
        moved = self.taken(axis, torch.arange(size).roll(1).tolist())
        if axis != self.signature.partner_axis or "assignment" not in self.tensors:
            return moved
        partner = moved["assignment"]
        return moved.replaced(assignment=torch.where(partner < 0, partner, (partner + 1) % max(size, 1)))

    def padded(self, axis: str, fill: float, count: int = 2) -> Arguments:
        """`count` more entries along `axis` that take no part: no partner, no mask, any number.

        Args:
            axis: The letter.
            fill: What their floating numbers are.
            count: How many.
        """

        def pad(tensor: Tensor, at: int) -> Tensor:
            value = {torch.bool: False, torch.int64: -1}.get(tensor.dtype, fill)
            return torch.cat((tensor, tensor.new_full((*tensor.shape[:at], count, *tensor.shape[at + 1 :]), value)), at)

        return self.replaced(**{name: pad(self[name], at) for name, at in self._having(axis)})

    def joined(self) -> Arguments:
        """All images as one, with the queries and targets of all."""
        images = self.size("B")
        tensors = dict(self.tensors)
        if "assignment" in tensors:
            offset = torch.arange(images).unsqueeze(-1) * self.size(self.signature.partner_axis)
            assignment = self["assignment"]
            tensors["assignment"] = torch.where(assignment < 0, assignment, assignment + offset)
        joined = {name: tensors[name].flatten(at, at + 1).unsqueeze(at) for name, at in self._having("B")}
        return replace(self, tensors=tensors | joined)

    def call(self, function: Callable[..., Any], **options: Any) -> Any:
        """The function's answer."""
        keywords = self.signature.keywords
        positional = [self[name] for name in self.signature.axes if name in self.tensors and name not in keywords]
        return function(*positional, **{name: self[name] for name in keywords if name in self.tensors}, **options)

    def terms(self, loss: Callable[..., Any], **options: Any) -> Terms:
        """The loss's terms by name; a bare scalar is called ``loss``."""
        answer = self.call(loss, **options)
        return {"loss": answer} if isinstance(answer, Tensor) else dict(answer)

    def terms_and_gradients(self, loss: Callable[..., Any], **options: Any) -> tuple[Terms, Terms]:
        """The loss's terms, and the gradient of their sum for each student argument."""
        leaves = {name: self[name].detach().clone().requires_grad_() for name in self.signature.student}
        terms = self.replaced(**leaves).terms(loss, **options)
        total = torch.stack([term.double() for term in terms.values()]).sum()
        gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
        return terms, dict(zip(leaves, gradients, strict=True))
