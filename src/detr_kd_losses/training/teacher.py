"""A teacher that stays as it is: frozen, in evaluation mode, and no part of whatever holds it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["FrozenTeacher"]


class FrozenTeacher:
    """Holds a model for distillation: frozen, in evaluation mode, without gradients.

    As this is no `nn.Module`, a Module that keeps it as an attribute does not own it: the teacher is in none of its
    ``state_dict()``, ``parameters()`` and ``modules()``, hence in no checkpoint, optimizer or DistributedDataParallel;
    ``train()`` and ``requires_grad_()`` do not reach it; and a deep copy, as averages of weights make, shares it.
    ``to()`` does not reach it either, so at each call it moves to the device of what it is called with. A pickle is
    without it, since some trainers write models as a whole into their checkpoints.

    Outputs are made under `torch.no_grad`, not under `torch.inference_mode`, whose tensors no loss may save for its
    backward pass.

    Args:
        module: The teacher. It is frozen and put into evaluation mode in place.

    Raises:
        TypeError: If `module` is not an `nn.Module`.

    Examples:
        >>> class Student(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.head = nn.Linear(2, 2)
        ...         self.teacher = FrozenTeacher(nn.Linear(2, 2))
        >>> student = Student().train()
        >>> sorted(student.state_dict())
        ['head.bias', 'head.weight']
        >>> output = student.teacher(torch.rand(3, 2))
        >>> output.requires_grad, output.is_inference()
        (False, False)
    """

    def __init__(self, module: nn.Module) -> None:
        if not isinstance(module, nn.Module):
            msg = f"`module` must be a torch.nn.Module, got {type(module).__name__}"
            raise TypeError(msg)
        self.module = module.eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the teacher.

        Args:
            *args: Arguments of the teacher.
            **kwargs: Keyword arguments of the teacher. It moves to the device of the first tensor among all arguments,
                or in one, such as a ``NestedTensor`` with its `tensors`.
        """
        if any(part.training for part in self.module.modules()):  # train() was called on it, or on a part of it
            self.module.eval()
        device, current = _device((args, kwargs)), _device(list(self.module.parameters()))
        if device is not None and current is not None and device != current:
            self.module.to(device)
        return self.module(*args, **kwargs)

    def to(self, *args: Any, **kwargs: Any) -> FrozenTeacher:
        """Move or cast the teacher, as `nn.Module.to`."""
        self.module.to(*args, **kwargs)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenTeacher:
        """Share the teacher: it never changes."""
        return self

    def __copy__(self) -> FrozenTeacher:
        """Share the teacher."""
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Leave the teacher out."""
        return {}

    def __getattr__(self, name: str) -> Any:
        """Say what is missing of one that was read from a pickle."""
        if name == "module":
            msg = "this FrozenTeacher was pickled, without its teacher: make a new one, FrozenTeacher(module)"
            raise AttributeError(msg)
        msg = f"{type(self).__name__!r} object has no attribute {name!r}"
        raise AttributeError(msg)

    def __repr__(self) -> str:
        """Show the module."""
        return f"{type(self).__name__}({vars(self).get('module')!r})"


def _device(values: object) -> torch.device | None:
    """Device of the first tensor in nested tuples, lists, mappings, and in what holds `tensors`."""
    if isinstance(values, Tensor):
        return values.device
    if isinstance(getattr(values, "tensors", None), Tensor):
        return _device(values.tensors)  # type: ignore[attr-defined]
    if isinstance(values, Mapping):
        values = list(values.values())
    if isinstance(values, list | tuple):
        return next((device for value in values if (device := _device(value)) is not None), None)
    return None
