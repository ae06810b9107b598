"""Queries between models: taken from one, drawn at random, fitted to the width of another."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from detr_kd_losses._options import TypedCall
from detr_kd_losses.taps.find import find_decoder, query_channels, unwrap
from detr_kd_losses.taps.heads import inverse_sigmoid
from detr_kd_losses.taps.record import QUERY_ROLES, Call, QueryGroup

__all__ = ["QueryProjection", "random_queries"]


def take_queries(call: Call, own: slice, index: Tensor | None) -> QueryGroup:
    """The queries that a decoder was called with, batch first, those of `index` alone if it is given."""
    parts = {role: call.argument(role) for role in QUERY_ROLES}
    given = {role: part.detach() for role, part in parts.items() if part is not None}
    if not call.description.batch_first:
        given = {role: part.transpose(0, 1) for role, part in given.items()}
    given = {role: part[:, own] for role, part in given.items()}
    if index is not None:
        images = torch.arange(len(index), device=index.device).unsqueeze(-1)
        given = {role: part.expand(len(index), *part.shape[1:])[images, index] for role, part in given.items()}
    return QueryGroup(**given, unit=call.description.unit, selected=index)


def arguments_of(group: QueryGroup, call: Call) -> dict[str, Any]:
    """The arguments with which a decoder takes a group in place of its own queries; raise if it cannot."""
    own = {role: call.argument(role) for role in QUERY_ROLES if call.argument(role) is not None}
    parts, batch_first = group.parts, call.description.batch_first
    validate_group(parts, own, batch=call.argument("memory").shape[0 if batch_first else 1])
    if "reference" in parts and group.unit != call.description.unit:
        convert = torch.sigmoid if group.unit == "logit" else inverse_sigmoid
        parts["reference"] = convert(parts["reference"])
    return {call.roles[role]: part if batch_first else part.transpose(0, 1) for role, part in parts.items()}


def validate_group(parts: dict[str, Tensor], own: dict[str, Tensor], *, batch: int) -> None:
    """Raise, with the remedy, unless a decoder that takes queries like `own` can take a group of `parts`."""
    if parts.keys() != own.keys():
        msg = (
            f"`group` must have the parts {sorted(own)} that the decoder takes, got {sorted(parts)}: a query group "
            "needs a teacher with the same kind of queries; otherwise leave it out, and with it QueryGroupTerm"
        )
        raise ValueError(msg)
    for role, part in parts.items():
        if part.shape[-1] != own[role].shape[-1]:
            remedy = "leave QueryGroupTerm out" if role == "reference" else "map it with a QueryProjection"
            msg = (
                f"`group.{role}` must have {own[role].shape[-1]} channels as the decoder's own, got "
                f"{part.shape[-1]}; {remedy}"
            )
            raise ValueError(msg)
        if len(part) not in {batch, 1}:
            msg = f"`group.{role}` must be of the same batch, {batch} images, got {len(part)}"
            raise ValueError(msg)


class QueryProjection(TypedCall, nn.Module):
    """Learned maps of a teacher's queries to the width of a student; references stay.

    Without a bias, since the content of DETR's queries is zero, and stays it. Without parameters where both have the
    same width.

    Args:
        student: The student, or the width of its queries.
        teacher: The teacher, or the width of its queries.

    Examples:
        >>> projection = QueryProjection(student=128, teacher=256)
        >>> projection(QueryGroup(torch.zeros(2, 300, 256), reference=torch.zeros(2, 300, 4))).shapes
        {'content': (2, 300, 128), 'reference': (2, 300, 4)}
    """

    def __init__(self, student: nn.Module | int, teacher: nn.Module | int) -> None:
        super().__init__()
        widths = [model if isinstance(model, int) else query_channels(model) for model in (student, teacher)]
        parts = [role for role in QUERY_ROLES if role != "reference"]
        if isinstance(teacher, nn.Module):
            parts = [role for role in parts if role in find_decoder(unwrap(teacher)).roles]
        names = parts if widths[0] != widths[1] else []
        self.maps = nn.ModuleDict({name: nn.Linear(widths[1], widths[0], bias=False) for name in names})
        for linear in self.maps.values():
            nn.init.orthogonal_(linear.weight)  # type: ignore[arg-type]

    def forward(self, group: QueryGroup) -> QueryGroup:
        """Map each (B, M, D_teacher) to (B, M, D_student)."""
        if not self.maps:
            return group
        content, position = (
            self.maps[name](part) if name in self.maps and part is not None else part
            for name, part in (("content", group.content), ("position", group.position))
        )
        return QueryGroup(content, position, group.reference, group.unit, group.selected)


def random_queries(like: QueryGroup, count: int, *, generator: torch.Generator | None = None) -> QueryGroup:
    r"""Draw queries that no model has, to be sent through student and teacher alike.

    Content and position are normal, of the mean square of `like`; references are uniform: centres in (0, 1), sizes in
    (0, 1)\ :sup:`2`, so that small boxes are more frequent. Those of an image are those of all.

    Args:
        like: Queries of a model, for their kind, width and scale.
        count: M, how many.
        generator: Of random numbers on the device of `like`.

    Returns:
        A :class:`QueryGroup` of `count` queries for each image.

    Raises:
        ValueError: If `count` is not positive.

    Examples:
        >>> random_queries(QueryGroup(torch.randn(2, 300, 8), reference=torch.zeros(2, 300, 4)), 100).shapes
        {'content': (2, 100, 8), 'reference': (2, 100, 4)}

    References:
        Wang et al., "KD-DETR: Knowledge Distillation for Detection Transformer with Consistent Distillation Points
        Sampling", CVPR 2024, arXiv:2211.08071.
    """
    if count < 1:
        msg = f"`count` must be positive, got {count}"
        raise ValueError(msg)

    def drawn(part: Tensor, function: Any) -> Tensor:
        options = {"generator": generator, "device": part.device, "dtype": part.dtype}
        return function(1, count, part.shape[-1], **options).expand(len(part), -1, -1)  # type: ignore[no-any-return]

    def normal(part: Tensor | None) -> Tensor | None:
        return None if part is None else drawn(part, torch.randn) * part.square().mean().sqrt()

    reference = like.reference
    if reference is not None:
        uniform = drawn(reference, torch.rand)
        boxes = torch.cat([uniform[..., :2], uniform[..., 2:].square()], -1)
        reference = boxes if like.unit == "box" else inverse_sigmoid(boxes)
    return QueryGroup(normal(like.content), normal(like.position), reference, like.unit)
