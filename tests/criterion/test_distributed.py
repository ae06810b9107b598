"""Two gloo processes, half of the batch each, have the gradients of one process on the whole batch."""

from __future__ import annotations

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.testing import assert_close

import detr_kd_losses as dkl

from support.steps import leaves, make_output, make_targets

WORLD_SIZE = 2
STUDENT_HEADS = {"sigmoid": 5, "softmax": 6}


def half(value, rank):
    """One image of a batch of two; the batch is dimension 1 behind decoder layers, else dimension 0."""
    if value is None:
        return None
    if isinstance(value, list):
        return [half(level, rank) for level in value]
    if isinstance(value, dkl.Predictions):
        return dkl.Predictions(*(half(tensor, rank) for tensor in value))
    return value[:, rank : rank + 1] if value.ndim == 4 and value.shape[1] == WORLD_SIZE else value[rank : rank + 1]


def batch(head, counts):
    """Student, teacher and targets, so many objects an image, with a padded image."""
    student = make_output(0, 3, 7, group=9, channels=STUDENT_HEADS[head], requires_grad=True)
    masks = [torch.ones(2, *level.shape[-2:]).bool() for level in student.features]
    masks[0][0, :, 5:] = False
    return student, make_output(1, 3, 9)._replace(padding_mask=masks), make_targets(counts)


def gradients(student, teacher, targets, preset, head):
    criterion = dkl.DETRDistillationLoss(preset, student_activation=head)
    return torch.autograd.grad(sum(criterion(student, teacher, targets).values()), leaves(student))


def run_replica(rank, port, preset, head, counts, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD_SIZE)
    student, teacher, targets = batch(head, counts)
    mine = [type(output)(*(half(field, rank) for field in output)) for output in (student, teacher)]
    mine_targets = dkl.Targets(*(field[rank : rank + 1] for field in targets))
    results[rank] = [g.numpy() for g in gradients(*mine, mine_targets, preset, head)]
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("preset", "head", "counts"),
    # The last has fewer targets than there are processes.
    [("official", "sigmoid", (3, 1)), ("paper", "softmax", (3, 1)), ("paper", "sigmoid", (0, 1))],
)
def test_gradients_do_not_depend_on_the_number_of_processes(preset, head, counts):
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(run_replica, args=(port, preset, head, counts, results), nprocs=WORLD_SIZE)
        replicas = [[torch.from_numpy(g) for g in results[rank]] for rank in range(WORLD_SIZE)]
    joined = gradients(*batch(head, counts), preset, head)
    for whole, *parts in zip(joined, *replicas, strict=True):
        # DistributedDataParallel averages gradients; here each replica has the gradient of its own images.
        dimension = 1 if whole.ndim == 4 and whole.shape[1] == WORLD_SIZE else 0
        assert_close(torch.cat(parts, dim=dimension) / WORLD_SIZE, whole)
