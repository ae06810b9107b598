"""Learn what is outside the model: the projections of a distillation, in an engine that knows nothing of them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from detr_kd_losses._validation import validate_positive

__all__ = ["learn_projections"]

PROJECTIONS = "distillation_projections"  # of the optimizer's state


def learn_projections(
    optimizer: torch.optim.Optimizer, distillation: nn.Module, *others: nn.Module, max_norm: float | None = 0.1
) -> None:
    """Let an optimizer learn the projections of a distillation, which are outside the model.

    Call it before the scheduler is made. They become a parameter group of the optimizer, so that a `GradScaler` treats
    them as all others; their gradients are clipped by a norm of their own when it steps, since engines clip those of
    the model. They are saved with the optimizer's state and restored with it.

    With several processes, call it after `init_process_group`, in all of them: they begin with the same values, and
    their gradients are averaged in each backward pass, before anything can overflow or skip a step.

    Args:
        optimizer: The optimizer of the student.
        distillation: A :class:`DETRDistillationLoss`, called once in each step.
        *others: Modules that are learned with it, such as a :class:`QueryProjection`.
        max_norm: To which the norm of all their gradients together is clipped. None: not at all.

    Raises:
        ValueError: If `max_norm` is not positive: projections would learn nothing.

    Examples:
        >>> student, projection = nn.Linear(2, 2), nn.Linear(4, 2)
        >>> optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        >>> learn_projections(optimizer, projection)
        >>> len(optimizer.param_groups)
        2
    """
    if max_norm is not None:
        validate_positive("max_norm", max_norm)
    modules = nn.ModuleList([distillation, *others])
    parameters = list(modules.parameters())
    if not parameters:
        return
    optimizer.add_param_group({"params": parameters})
    if _world_size() > 1:
        for parameter in parameters:
            dist.broadcast(parameter.data, src=0)
    distillation.register_forward_hook(_TakesPart(parameters))
    average = _GradientAverage(parameters)
    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(average)  # type: ignore[no-untyped-call]
    if max_norm is not None:

        def clip(*_: Any) -> None:
            nn.utils.clip_grad_norm_(parameters, max_norm)

        optimizer.register_step_pre_hook(clip)
    _save_with(optimizer, modules, parameters)


def _save_with(optimizer: torch.optim.Optimizer, modules: nn.ModuleList, parameters: Sequence[nn.Parameter]) -> None:
    """Let the state of an optimizer hold that of `modules`, whose parameters are its last group."""
    position = len(optimizer.param_groups) - 1

    def save(_: Any, state: dict[str, Any]) -> dict[str, Any]:
        return {**state, PROJECTIONS: modules.state_dict()}

    def restore(_: Any, state: dict[str, Any]) -> dict[str, Any]:
        groups = state["param_groups"]
        if PROJECTIONS in state:
            _load_projections(modules, state[PROJECTIONS])
        elif len(groups) == len(optimizer.param_groups):
            msg = (
                f"the state of the optimizer must have {PROJECTIONS!r}, as that of a run with projections, got "
                f"{sorted(state)}: its moments are of projections that are not there"
            )
            raise ValueError(msg)
        elif len(groups) == len(optimizer.param_groups) - 1:
            warnings.warn(
                "the checkpoint is of a run without projections: they start anew. A scheduler that is loaded from it "
                "and has a rate for each group, such as LambdaLR, needs theirs: `scheduler.base_lrs.append(...)`",
                stacklevel=2,
            )
            known = sum(len(group["params"]) for group in groups)
            new = optimizer.param_groups[position] | {"params": list(range(known, known + len(parameters)))}
            new["lr"] = new.get("initial_lr", new["lr"]) * _progress(groups[0])
            state = {**state, "param_groups": [*groups[:position], new, *groups[position:]]}
        return state

    optimizer.register_state_dict_post_hook(save)
    optimizer.register_load_state_dict_pre_hook(restore)


def _load_projections(modules: nn.ModuleList, state: dict[str, Tensor]) -> None:
    given, own = (
        {name: tuple(tensor.shape) for name, tensor in part.items()} for part in (state, modules.state_dict())
    )
    other = sorted(name for name in given.keys() | own.keys() if given.get(name) != own.get(name))
    if other:
        msg = (
            f"the projections in the checkpoint must be of the same student, teacher and terms, got {other[0]!r} of "
            f"shape {given.get(other[0])} in place of {own.get(other[0])}; to go on with others, load the student and "
            "leave the optimizer as it is"
        )
        raise ValueError(msg)
    modules.load_state_dict(state)


def _progress(group: dict[str, Any]) -> float:
    """What a scheduler has left of the learning rate of a group."""
    return float(group["lr"] / group["initial_lr"]) if group.get("initial_lr") else 1.0


class _TakesPart:
    """Lets every parameter have a gradient in every backward pass, 0 where no term uses it: averages wait for all."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = parameters

    def __call__(self, _: nn.Module, __: Any, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        nothing = torch.stack([parameter.flatten()[:0].sum() for parameter in self.parameters]).sum()
        return {name: loss + nothing for name, loss in losses.items()}


class _GradientAverage:
    """Averages gradients over the processes as soon as all have theirs.

    That is in the backward pass, which no process skips, and before the student's gradients, whose averages
    DistributedDataParallel takes: all that uses them runs after the student, so its backward pass comes first.
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
            gradients: list[Tensor] = [parameter.grad for parameter in learned]  # type: ignore[misc]
            average = torch.cat([gradient.flatten() for gradient in gradients]) / _world_size()
            dist.all_reduce(average)
            for gradient, part in zip(gradients, torch.split(average, [one.numel() for one in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
