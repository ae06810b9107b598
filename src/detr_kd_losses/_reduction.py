"""Sums, and the normalisers that divide them: counts over a batch, shared by all replicas of a distributed run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

__all__: list[str] = []

# What replicas send to each other: so many numbers at a time (L layers need 2 L at most), in a dtype of exact counts.
_PACKET = 64
_PACKET_DTYPE = torch.float64


def masked_sum(values: Tensor, mask: Tensor, dims: int) -> Tensor:
    """Sum of `values` where `mask`, over the last `dims` dimensions (all of them if there are fewer)."""
    return sum_last(torch.where(mask, values, 0.0), dims)


def sum_last(values: Tensor, dims: int) -> Tensor:
    """Sum over the last `dims` dimensions (all of them if there are fewer); an empty sum is 0 with a graph."""
    return values.sum(dim=tuple(range(-min(dims, values.ndim), 0)))


def replica_means(*counts: Tensor, sync: bool, at_least: Sequence[float] | None = None) -> list[Tensor]:
    """`counts` averaged over replicas, if they are to be shared; the sum of each is `at_least` that, or 1.

    Dividing a local sum by the mean count, then averaging gradients over replicas as DistributedDataParallel does,
    gives the gradients of one process on the joined batch. Without gradients there is nothing to be averaged, and a
    replica may validate alone.

    All counts of a call travel in one packet, which has one dtype and one length on every replica, whatever the replica
    has to count: a collective of another size or dtype than its partner's hangs, or adds what does not belong together.
    """
    floors = [1.0] * len(counts) if at_least is None else at_least
    if not shares_counts(sync=sync):
        return [count.clamp(min=floor) for count, floor in zip(counts, floors, strict=True)]
    flat = [count.detach().flatten().to(_PACKET_DTYPE) for count in counts]
    length = sum(part.numel() for part in flat)
    packet = F.pad(torch.cat(flat), (0, -length % _PACKET if length else _PACKET))
    dist.all_reduce(packet)
    totals = torch.split(packet[:length], [count.numel() for count in counts])
    means = [total.clamp(min=floor) / dist.get_world_size() for total, floor in zip(totals, floors, strict=True)]
    return [mean.reshape(count.shape).to(count.dtype) for mean, count in zip(means, counts, strict=True)]


def share_nothing(like: Tensor, *, sync: bool) -> None:
    """Take the part of a replica that counts nothing in the call of :func:`replica_means` that the others make."""
    if shares_counts(sync=sync):
        dist.all_reduce(torch.zeros(_PACKET, dtype=_PACKET_DTYPE, device=like.device))


def shares_counts(*, sync: bool) -> bool:
    """Whether counts are shared: where it is asked for, by several replicas, in a step with gradients."""
    return sync and torch.is_grad_enabled() and dist.is_available() and dist.is_initialized()


def replica_weight(weight: Tensor, *, sync: bool) -> Tensor:
    """A sum of weights, averaged over replicas as counts are; however small it is, and 1 where there is no weight."""
    (total,) = replica_means(weight, sync=sync, at_least=[0.0])
    return torch.where(total > 0, total, 1.0)


def replica_sum(values: Tensor, *, sync: bool) -> Tensor:
    """`values` added over the replicas where counts are shared; what the others make of them reaches the gradient."""
    if not shares_counts(sync=sync):
        return values
    added: Tensor = _ReplicaSum.apply(values)  # type: ignore[no-untyped-call]
    return added


class _ReplicaSum(torch.autograd.Function):
    """A sum over replicas, whose gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:  # noqa: ARG004
        return _added_up(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # noqa: ARG004
        return _added_up(grad)


def _added_up(values: Tensor) -> Tensor:
    total = values.detach().to(_PACKET_DTYPE, copy=True)
    dist.all_reduce(total)
    return total.to(values.dtype)
