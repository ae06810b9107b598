"""How much is computed at a time, where temporaries of a whole batch would take longer to allocate than to fill."""

from __future__ import annotations

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
# Entries of what pairs say that are compared at a time: on a CPU 1 MiB in float32, on a GPU 16 MiB.
PAIRS_COMPARED = 2**18
PAIRS_COMPARED_ON_GPU = 2**22
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


def blocks_of_images(*tensors: Tensor, stages: bool, entries: int | None = None) -> list[tuple[Tensor, ...]]:
    """Tensors (L, B, ...), or without `stages` (B, ...), cut alike into blocks of images of one layer.

    As many images as have enough of the `entries` in all; None: of those of the first tensor. Views, whose gradients
    are joined once. All at once where there is nothing, or where a compiler fuses the temporaries away.
    """
    first = tensors[0]
    entries = first.numel() if entries is None else entries
    if torch.compiler.is_compiling() or not entries or not first.numel():
        return [tensors]
    most = PAIRS_COMPARED if in_blocks(first) else PAIRS_COMPARED_ON_GPU
    images = max(1, most * first.shape[int(stages)] * (len(first) if stages else 1) // entries)
    layers = [tensor.unbind(0) if stages else (tensor,) for tensor in tensors]
    cut = [[block for layer in each for block in torch.split(layer, images)] for each in layers]
    return list(zip(*cut, strict=True))
