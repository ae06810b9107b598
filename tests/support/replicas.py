"""Two gloo processes that do what a test asks for, and never longer than a test may take."""

from __future__ import annotations

import multiprocessing
import socket
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

WORLD_SIZE = 2
# A replica that waits for a collective gives up first, and says so.
COLLECTIVE_SECONDS = 20
ANSWER_SECONDS = 50


def _serve(rank: int, port: int, jobs: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=WORLD_SIZE,
        timeout=timedelta(seconds=COLLECTIVE_SECONDS),
    )
    while True:
        function, arguments = jobs.recv()
        try:
            jobs.send((function(rank, *arguments), None))
        except Exception:
            jobs.send((None, traceback.format_exc()))


class Replicas:
    """Processes that stay for several tests; after a failure others take their place."""

    def __init__(self) -> None:
        self._processes: list[Any] = []
        self._jobs: list[Connection] = []

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """``function(rank, *arguments)`` of every rank. Tensors travel as they are; a graph does not."""
        if not self._processes:
            self._start()
        for jobs in self._jobs:
            jobs.send((function, arguments))
        answers, errors = [], []
        for rank, jobs in enumerate(self._jobs):
            if jobs.poll(ANSWER_SECONDS if not errors else 1):
                answer, error = jobs.recv()
            else:
                answer, error = None, "no answer: it waits for a collective that the others do not make"
            answers.append(answer)
            if error is not None:
                errors.append(f"rank {rank}: {error}")
        if errors:
            self.stop()
            raise AssertionError("\n".join(errors))
        return answers

    def stop(self) -> None:
        """End the processes, whatever they wait for."""
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._jobs = [], []

    def _start(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        context = multiprocessing.get_context("spawn")
        for rank in range(WORLD_SIZE):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, port, there), daemon=True)
            process.start()
            self._processes.append(process)
            self._jobs.append(here)


def replicas() -> Iterator[Replicas]:
    """Body of a fixture of one module."""
    pool = Replicas()
    yield pool
    pool.stop()
