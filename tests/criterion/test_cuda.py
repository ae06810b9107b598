"""On a GPU: the numbers of the CPU, no synchronisation between the outputs and the gradients, one CUDA graph."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from torch.testing import assert_close
from torch.utils._pytree import tree_map_only

import detr_kd_losses as dkl

from support.steps import leaves, make_output, make_targets

pytestmark = pytest.mark.skipif(
    find_spec("triton") is None or not torch.cuda.is_available(), reason="needs Triton and a CUDA device"
)


def move(value, device):
    def moved(tensor):
        return tensor.detach().to(device).requires_grad_(tensor.requires_grad)

    return tree_map_only(torch.Tensor, moved, value)


@pytest.fixture(params=["official", "paper"])
def step(request):
    """Criterion, and a step's inputs on the GPU."""
    inputs = make_output(0, 3, 70, group=90, requires_grad=True), make_output(1, 6, 90), make_targets((9, 0), 12)
    criterion = dkl.DETRDistillationLoss(request.param, class_map=[0, 1, 2, 3, 4]).cuda()
    return criterion, [move(value, "cuda") for value in inputs]


def losses_and_gradients(criterion, student, teacher, targets):
    losses = criterion(student, teacher, targets)
    return losses, torch.autograd.grad(sum(losses.values()), leaves(student))


def test_equals_the_cpu(step):
    criterion, inputs = step
    on_gpu = losses_and_gradients(criterion, *inputs)
    on_cpu = losses_and_gradients(criterion.cpu(), *(move(value, "cpu") for value in inputs))
    assert_close(move(on_gpu, "cpu"), on_cpu, rtol=1e-4, atol=1e-5)


def test_nothing_waits_for_the_device(step):
    criterion, inputs = step
    losses_and_gradients(criterion, *inputs)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses_and_gradients(criterion, *inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_step_is_one_cuda_graph(step):
    criterion, inputs = step
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            losses_and_gradients(criterion, *inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = losses_and_gradients(criterion, *inputs)
    changed = move(make_output(7, 3, 70, group=90, requires_grad=True), "cuda")
    with torch.no_grad():
        for old, new in zip(leaves(inputs[0]), leaves(changed), strict=True):
            old.copy_(new)
    graph.replay()
    torch.cuda.synchronize()
    assert_close(captured, losses_and_gradients(criterion, *inputs))
