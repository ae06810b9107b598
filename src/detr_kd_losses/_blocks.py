"""How much is computed at a time, where temporaries of a whole batch would take longer to allocate than to fill."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__: list[str] = []

# Entries of a batch of costs that are built and solved at a time. Building a cost takes about ten temporaries of its
# size: few problems at a time keep them in the cache. Solving more at a time keeps more threads busy.
COSTS_BUILT = 2**18
COSTS_SOLVED = 2**24
# Entries of feature maps that are compared at a time, 1 MiB in float32, and multiplied with queries at a time, 2 MiB.
FEATURES_COMPARED = 2**18
FEATURES_MULTIPLIED = 2**19
CELLS_MULTIPLIED = 128  # at least
# Entries that are compared, and compared again in the backward pass, at a time: on a CPU 1 MiB in float32, on a GPU 16
# MiB. Of less than that no more than a share at a time, and a block at least.
RECOMPUTED = 2**18
RECOMPUTED_ON_GPU = 2**22
RECOMPUTED_SHARE = 8
RECOMPUTED_AT_LEAST = 2**12
CACHE_LINE = 32  # entries in half precision
# Rows of a form that are multiplied at a time: fewer leave out more of the lower triangle, more make better products.
FORM_ROWS = 64


def in_blocks(tensor: Tensor) -> bool:
    """Whether to take `tensor` a block at a time: on a CPU, whose caches are small.

    A GPU takes all at once and is idle with less; a compiler fuses the temporaries away.
    """
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def slices(stop: int, size: int, start: int = 0) -> list[slice]:
    """Consecutive slices of at most `size` (at least 1) from `start` to `stop`; an empty one if there is nothing."""
    size = max(1, size)
    return [slice(first, min(first + size, stop)) for first in range(start, max(start + 1, stop), size)]


def recompute(function: Callable[..., Tensor], *tensors: Tensor | None) -> Tensor:
    """``function(*tensors)``, which keeps nothing for the backward pass but `tensors`, and is called again there."""
    # A compiler chooses itself what to keep, and transforms of torch.func, which forbid hooks, keep everything.
    if torch.compiler.is_compiling() or not torch._C._autograd._saved_tensors_hooks_is_enabled():  # type: ignore[attr-defined]
        return function(*tensors)
    result: Tensor = _Recomputed.apply(function, *tensors)  # type: ignore[no-untyped-call]
    return result


class _Recomputed(torch.autograd.Function):
    """What PyTorch's own checkpoint does, which loads the compiler at its first call, a second and 70 MB."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], *tensors: Tensor | None) -> Tensor:
        ctx.function = function
        # Autograd refuses to save what was made in inference mode.
        ctx.unsaved = [tensor if tensor is not None and tensor.is_inference() else None for tensor in tensors]
        ctx.save_for_backward(
            *(tensor if other is None else None for tensor, other in zip(tensors, ctx.unsaved, strict=True))
        )
        return function(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        again = torch.is_grad_enabled()  # the gradient is to be differentiated, too
        inputs = [
            tensor if other is None else other.clone()
            for tensor, other in zip(ctx.saved_tensors, ctx.unsaved, strict=True)
        ]
        needed = [place for place, need in enumerate(ctx.needs_input_grad[1:]) if need]
        for place in needed:
            inputs[place] = inputs[place] if again else inputs[place].detach().requires_grad_()
        with torch.enable_grad():
            result = ctx.function(*inputs)
        gradients: list[Tensor | None] = [None] * len(inputs)
        found = torch.autograd.grad(result, [inputs[place] for place in needed], grad, create_graph=again)
        for place, gradient in zip(needed, found, strict=True):
            gradients[place] = gradient
        return None, *gradients


def recompute_queries(
    function: Callable[..., Tensor], assignment: Tensor, students: Sequence[Tensor], teachers: Sequence[Tensor]
) -> Tensor:
    """What `function` says of each student query (..., B, N), a few at a time: see :func:`recompute`.

    Args:
        function: Of a part of the queries of some images of one layer: their `assignment`, `students`, and all
            `teachers` of these images.
        assignment: (L, B, N) or (B, N).
        students: Tensors (L, B, N, ...) or (B, N, ...), the largest first.
        teachers: Tensors (L, B, M, ...) or (B, M, ...).
    """
    most = _recomputed_at_once(students[0])
    if torch.compiler.is_compiling() or most >= students[0].numel():
        return recompute(function, assignment, *students, *teachers)
    per_query = students[0].numel() // assignment.numel()
    queries = assignment.shape[-1]
    images, some = max(1, most // (queries * per_query)), max(1, most // per_query)
    parts = []
    for layer in zip(*(_layers(tensor, assignment) for tensor in (assignment, *students, *teachers)), strict=True):
        for block in zip(*(torch.split(tensor, images) for tensor in layer), strict=True):
            cut = (torch.split(tensor, some if images == 1 else queries, 1) for tensor in block[: 1 + len(students)])
            parts += [recompute(function, *part, *block[1 + len(students) :]) for part in zip(*cut, strict=True)]
    return torch.cat([part.flatten() for part in parts]).reshape(assignment.shape)


def cut_features(features: Tensor, dim: int) -> list[Tensor]:
    """Parts of features (B, D, cells) along `dim`, 1 or 2, to be computed again one by one; one if they are small."""
    length = features.shape[dim]
    some = max(1, _recomputed_at_once(features) * length // max(1, features.numel()))
    if features.stride(dim) == 1:
        # What is inner in memory comes in whole cache lines.
        some = max(some, min(CACHE_LINE, length // RECOMPUTED_SHARE))
    whole = torch.compiler.is_compiling() or some >= length
    return [features] if whole else list(torch.split(features, some, dim))


def recompute_features(
    function: Callable[..., Tensor], parts: Sequence[Tensor], *others: Tensor | None, dim: int
) -> list[Tensor]:
    """What `function` says of each part of features (B, D, cells): see :func:`recompute`.

    Args:
        function: Of a part of the features and of the others.
        parts: From :func:`cut_features`.
        others: What can be broadcast to the features; what has one entry along `dim` is given whole.
        dim: Where they were cut.
    """
    if len(parts) == 1:
        return [recompute(function, *parts, *others)]
    sizes = [part.shape[dim] for part in parts]
    cut = (
        [tensor] * len(parts) if tensor is None or tensor.shape[dim] == 1 else torch.split(tensor, sizes, dim)
        for tensor in others
    )
    return [recompute(function, *part) for part in zip(parts, *cut, strict=True)]


def _layers(tensor: Tensor, assignment: Tensor) -> Sequence[Tensor]:
    return tensor.unbind(0) if assignment.ndim > 2 else (tensor,)


def _recomputed_at_once(tensor: Tensor) -> int:
    most = RECOMPUTED if in_blocks(tensor) else RECOMPUTED_ON_GPU
    return max(RECOMPUTED_AT_LEAST, min(most, tensor.numel() // RECOMPUTED_SHARE))
