"""Sums, and the normalisers that divide them: counts over a batch, shared by all replicas of a distributed run."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from detr_kd_losses._checks import shared_precision

__all__: list[str] = []

# Of a feature map: 1 MiB in float32, which stay in the cache.
_ENTRIES_AT_ONCE = 2**18


def masked_sum(values: Tensor, mask: Tensor, dims: int) -> Tensor:
    """Sum of `values` where `mask`, over the last `dims` dimensions (all of them if there are fewer)."""
    return sum_last(torch.where(mask, values, 0.0), dims)


def sum_last(values: Tensor, dims: int) -> Tensor:
    """Sum over the last `dims` dimensions (all of them if there are fewer); an empty sum is 0 with a graph."""
    return values.sum(dim=tuple(range(-min(dims, values.ndim), 0)))


def channel_blocks(features: Tensor) -> list[slice]:
    """Consecutive channels of `features` (B, D, ...) to take at a time.

    On a CPU so few that they stay in the cache: temporaries of the size of a feature map take longer to allocate than
    to fill. A GPU takes all at once, a compiler fuses.
    """
    channels = features.shape[1]
    size = max(1, channels)
    if features.device.type == "cpu" and not torch.compiler.is_compiling():
        size = max(1, _ENTRIES_AT_ONCE * channels // max(1, features.numel()))
    return [slice(first, first + size) for first in range(0, channels, size)]


def squared_length(features: Tensor, origin: Tensor | None = None) -> Tensor:
    """Sum of squares over the channels of `features` (B, D, ...), less those of `origin`, at least in float32."""
    total = shared_precision(features[:, :0])[0].sum(1)
    for block in channel_blocks(features):
        if origin is None:
            (part,) = shared_precision(features[:, block])
        else:
            part, other = shared_precision(features[:, block], origin[:, block])
            part = part - other
        total = total + part.square().sum(1)
    return total


def replica_mean(count: Tensor, *, sync: bool, at_least: float = 1.0) -> Tensor:
    """`count` averaged over the replicas if `sync` and torch.distributed is initialised; their sum is `at_least` that.

    Dividing a local sum by the mean count, then averaging gradients over replicas as DistributedDataParallel does,
    gives the gradients of one process on the joined batch.
    """
    if not (sync and dist.is_available() and dist.is_initialized()):
        return count.clamp(min=at_least)
    total = count.detach().clone()
    dist.all_reduce(total)
    return total.clamp(min=at_least) / dist.get_world_size()
