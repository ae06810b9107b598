"""Learn what is outside the model: the projections of a distillation, in an engine that knows nothing of them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import detr_kd_losses as dkl

PROJECTIONS = "distillation_projections"  # of the optimizer's state


def learn_projections(optimizer: torch.optim.Optimizer, distillation: dkl.DETRDistillationLoss) -> None:
    """Let the optimizer learn the projections of a distillation, which are outside the model.

    With several processes, call it after `init_process_group`, in all of them: they begin with the same values, and
    the gradients are averaged in each backward pass, before anything can overflow or skip a step. The projections are
    saved with the optimizer's state, and restored with it.
    """
    parameters = list(distillation.parameters())
    if not parameters:
        return
    optimizer.add_param_group({"params": parameters})
    position = len(optimizer.param_groups) - 1
    if _world_size() > 1:
        for parameter in parameters:
            dist.broadcast(parameter.data, src=0)
    distillation.register_forward_hook(_take_part)
    average = _GradientAverage(parameters)
    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(average)

    def save(_: Any, state: dict[str, Any]) -> dict[str, Any]:
        return {**state, PROJECTIONS: distillation.state_dict()}

    def restore(_: Any, state: dict[str, Any]) -> dict[str, Any]:
        if PROJECTIONS in state:
            distillation.load_state_dict(state[PROJECTIONS])
        elif len(state["param_groups"]) == len(optimizer.param_groups) - 1:
            warnings.warn("the checkpoint is of a run without projections: they start anew", stacklevel=2)
            known = sum(len(group["params"]) for group in state["param_groups"])
            new = optimizer.param_groups[position] | {"params": list(range(known, known + len(parameters)))}
            groups = state["param_groups"]
            state = {**state, "param_groups": [*groups[:position], new, *groups[position:]]}
        return state

    optimizer.register_state_dict_post_hook(save)
    optimizer.register_load_state_dict_pre_hook(restore)


def _take_part(distillation: nn.Module, _: Any, losses: dict[str, Tensor]) -> dict[str, Tensor]:
    """Let every parameter have a gradient in every backward pass, 0 where no term uses it: averages wait for all."""
    nothing = sum(parameter.flatten()[:0].sum() for parameter in distillation.parameters())
    return {name: loss + nothing for name, loss in losses.items()}


class _GradientAverage:
    """Averages gradients over the processes as soon as all have theirs.

    That is in the backward pass, which no process skips, and before the student's gradients, whose averages
    DistributedDataParallel takes: the losses were computed after the student, so their backward pass comes first.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = parameters
        self.ready: set[nn.Parameter] = set()

    def __call__(self, parameter: nn.Parameter) -> None:
        self.ready.add(parameter)
        learned = [parameter for parameter in self.parameters if parameter.requires_grad]
        if not self.ready.issuperset(learned):
            return
        self.ready.clear()
        if _world_size() > 1:
            average = torch.cat([parameter.grad.flatten() for parameter in learned]) / _world_size()
            dist.all_reduce(average)
            for one, part in zip(learned, average.split([one.numel() for one in learned]), strict=True):
                one.grad.copy_(part.view_as(one))


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
