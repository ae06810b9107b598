"""Sums, and the normalisers that divide them: counts over a batch, shared by all replicas of a distributed run."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__: list[str] = []


def masked_sum(values: Tensor, mask: Tensor, dims: int) -> Tensor:
    """Sum of `values` where `mask`, over the last `dims` dimensions (all of them if there are fewer)."""
    return sum_last(torch.where(mask, values, 0.0), dims)


def sum_last(values: Tensor, dims: int) -> Tensor:
    """Sum over the last `dims` dimensions (all of them if there are fewer); an empty sum is 0 with a graph."""
    return values.sum(dim=tuple(range(-min(dims, values.ndim), 0)))


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


def replica_weight(weight: Tensor, *, sync: bool) -> Tensor:
    """A sum of weights, averaged over the replicas likewise; however small it is, and 1 where there is no weight."""
    total = replica_mean(weight, sync=sync, at_least=0.0)
    return torch.where(total > 0, total, 1.0)


def replica_sum(values: Tensor, *, sync: bool) -> Tensor:
    """`values` added over the replicas likewise; what the others make of them reaches the gradient, too."""
    if not (sync and dist.is_available() and dist.is_initialized()):
        return values
    added: Tensor = _ReplicaSum.apply(values)  # type: ignore[no-untyped-call]
    return added


class _ReplicaSum(torch.autograd.Function):
    """A sum over replicas, whose gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:  # noqa: ARG004
        total = values.detach().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # noqa: ARG004
        total = grad.clone()
        dist.all_reduce(total)
        return total
