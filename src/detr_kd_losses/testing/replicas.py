"""Replicas of a distributed run without processes: one thread each, and sums of tensors between them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["run_replicas"]

Answer = TypeVar("Answer")

# A replica that makes fewer calls than the others would keep them waiting for ever.
_TIMEOUT_SECONDS = 10.0


def run_replicas(replicas: Sequence[Callable[[], Answer]]) -> list[Answer]:
    """Call each function as one rank of a distributed run.

    While they run, `torch.distributed` says that it is initialised with as many ranks as there are functions, and
    `torch.distributed.all_reduce` adds (or averages) over them. Code that reached for another collective, or imported
    `all_reduce` by name, would need real processes.

    Args:
        replicas: What each rank does; all must make the same calls of `all_reduce`.

    Returns:
        Their answers, by rank.

    Raises:
        threading.BrokenBarrierError: If some ranks wait for a call that the others never make.

    Examples:
        >>> def rank(number):
        ...     count = torch.tensor(number)
        ...     torch.distributed.all_reduce(count)
        ...     return count.item()
        >>> run_replicas([lambda: rank(1.0), lambda: rank(4.0)])
        [5.0, 5.0]
    """
    size = len(replicas)
    barrier = threading.Barrier(size, timeout=_TIMEOUT_SECONDS)
    rank = threading.local()
    sent: list[Tensor] = [torch.empty(0)] * size

    def all_reduce(tensor: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False) -> None:  # noqa: ARG001
        sent[rank.number] = tensor.detach().clone()
        barrier.wait()
        total = torch.stack(sent).sum(0)
        barrier.wait()
        tensor.data.copy_(total / size if op == dist.ReduceOp.AVG else total)

    def run(number: int) -> Answer:
        rank.number = number
        try:
            return replicas[number]()
        except BaseException:
            barrier.abort()
            raise

    pretend: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "get_world_size": lambda group=None: size,  # noqa: ARG005
        "get_rank": lambda group=None: rank.number,  # noqa: ARG005
        "all_reduce": all_reduce,
    }
    with mock.patch.multiple(dist, **pretend), ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(run, number) for number in range(size)]
    # An error is the cause, and a barrier that it broke the consequence.
    errors = [error for error in (future.exception() for future in futures) if error is not None]
    for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        if isinstance(error, threading.BrokenBarrierError):
            msg = "some ranks wait for a call of all_reduce that the others never make"
            raise threading.BrokenBarrierError(msg) from error
        raise error
    return [future.result() for future in futures]
