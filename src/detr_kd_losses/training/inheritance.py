"""A student that begins with what its teacher has learnt in the parts that both have alike."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from detr_kd_losses.stages import select_stages

__all__ = ["Inheritance", "inherit_weights"]


class Inheritance(NamedTuple):
    """Which tensors of a student are those of its teacher now.

    Attributes:
        inherited: Name of the teacher's tensor by name of the student's.
        left: Names of the student's tensors that none of the teacher's fits: as they were.

    Examples:
        >>> Inheritance({"head.weight": "head.weight"}, ("head.bias",)).left
        ('head.bias',)
    """

    inherited: dict[str, str]
    left: tuple[str, ...]


@torch.no_grad()
def inherit_weights(student: nn.Module, teacher: nn.Module, paths: Iterable[str]) -> Inheritance:
    """Copy to a student, before its training, what its teacher has learnt in parts that both have.

    A decoder that is distilled by its features alone learns from nothing to read features that are the teacher's soon;
    one that begins as the teacher's can read them already. A tensor is copied where the teacher has one of the same
    name and shape. Of lists of layers that differ in length, layer `k` of the student has the teacher's layer that
    teaches it (:func:`select_stages`, ``"even"``). What layers of the student share is that of the last of them. Other
    tensors, such as heads of other classes, are left alone.

    Args:
        student: The student, not wrapped; it is changed in place.
        teacher: The teacher, not wrapped.
        paths: Modules, parameters or buffers by their dotted names in the student, such as ``"transformer.decoder"``,
            ``"class_embed"`` and ``"bbox_embed"``; ``""`` is all of it.

    Returns:
        An :class:`Inheritance`, to be looked at once.

    Raises:
        ValueError: If no part is named, the student has none of such a name, or nothing of it fits.
        TypeError: If a model is no `nn.Module`, or `paths` is one name.

    Examples:
        >>> def decoder(layers):
        ...     return nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(2, 2) for _ in range(layers))})
        >>> student, teacher = decoder(3), decoder(6)
        >>> found = inherit_weights(student, teacher, ["layers"])
        >>> found.inherited["layers.0.weight"], found.left
        ('layers.1.weight', ())
        >>> bool((student["layers"][2].weight == teacher["layers"][5].weight).all())
        True

    References:
        Kang et al., "Instance-Conditional Knowledge Distillation for Object Detection", NeurIPS 2021, arXiv:2110.12724,
        and Yang et al., "Focal and Global Knowledge Distillation for Detectors", CVPR 2022, arXiv:2111.11837, let a
        student inherit neck and heads.
    """
    for name, model in (("student", student), ("teacher", teacher)):
        if not isinstance(model, nn.Module):
            msg = f"`{name}` must be a torch.nn.Module, got {type(model).__name__}"
            raise TypeError(msg)
    if isinstance(paths, str):
        msg = f"`paths` must be several names, got {paths!r}; write [{paths!r}]"
        raise TypeError(msg)
    paths = list(paths)
    if not paths:
        msg = "`paths` must name at least one part of the student, got none"
        raise ValueError(msg)
    own, others = _tensors(student), _tensors(teacher)
    inherited: dict[str, str] = {}
    left: dict[str, None] = {}
    for path in paths:
        names = [name for name in own if not path or name == path or name.startswith(f"{path}.")]
        if not names and path not in dict(student.named_modules(remove_duplicate=False)):
            parts = ", ".join(name for name, _ in student.named_children())
            msg = f"`paths` must name parts of the student, which has {parts}, got {path!r}"
            raise ValueError(msg)
        sources = {name: _name_in_teacher(name, student, teacher) for name in names}
        fitting = {name: other for name, other in sources.items() if _fits(own[name], others.get(other))}
        if names and not fitting:
            msg = f"`paths` must name parts that the teacher has, too, with tensors of the same shapes, got {path!r}"
            raise ValueError(msg)
        inherited |= fitting
        left |= dict.fromkeys(name for name in names if name not in fitting)
    for name, other in inherited.items():
        own[name].copy_(others[other])
    return Inheritance(inherited, tuple(left))


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint has of a model, sharing its memory."""
    return {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def _fits(own: Tensor, other: Tensor | None) -> bool:
    return other is not None and own.shape == other.shape


def _name_in_teacher(name: str, student: nn.Module, teacher: nn.Module) -> str:
    """The name of the tensor that a student's tensor may inherit, if the teacher has it."""
    own: nn.Module | None = student
    other: nn.Module | None = teacher
    source = []
    for part in name.split("."):
        theirs = part
        if isinstance(own, nn.ModuleList) and isinstance(other, nn.ModuleList) and len(own) != len(other) > 0:
            theirs = str(int(select_stages(torch.arange(len(other)), len(own))[int(part)]))
        own, other = _child(own, part), _child(other, theirs)
        source.append(theirs)
    return ".".join(source)


def _child(module: nn.Module | None, name: str) -> nn.Module | None:
    child = getattr(module, name, None)
    return child if isinstance(child, nn.Module) else None
