"""The records of a tap: how a decoder is described, one call of it, and what it said."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from detr_kd_losses.heads import Activation
from detr_kd_losses.outputs import BoxDistributions

__all__ = ["Call", "Description", "Layers", "QueryGroup"]

QUERY_ROLES = ("content", "position", "reference")
"""What the queries of a decoder may consist of; the first two have D channels."""

Unit = Literal["logit", "box"]


class QueryGroup(NamedTuple):
    """Queries of a decoder, for another one to answer; a decoder has some of the three parts.

    Attributes:
        content: (B, M, D), what goes into the first layer.
        position: (B, M, D), added to the content.
        reference: (B, M, 4) boxes or (B, M, 2) points that the first layer refines.
        unit: Whether `reference` is in [0, 1] (``"box"``) or before the sigmoid (``"logit"``).
        selected: (B, M) int64, which of a model's queries these are. None: all of them, in order.

    Examples:
        >>> QueryGroup(torch.zeros(2, 300, 256), reference=torch.zeros(2, 300, 4)).shapes
        {'content': (2, 300, 256), 'reference': (2, 300, 4)}
    """

    content: Tensor | None = None
    position: Tensor | None = None
    reference: Tensor | None = None
    unit: Unit = "logit"
    selected: Tensor | None = None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each part that there is."""
        return {role: tuple(part.shape) for role, part in self.parts.items()}

    @property
    def parts(self) -> dict[str, Tensor]:
        """Each part that there is."""
        parts = zip(QUERY_ROLES, (self.content, self.position, self.reference), strict=True)
        return {role: part for role, part in parts if part is not None}

    def map(self, function: Callable[[Tensor], Tensor]) -> QueryGroup:
        """The group whose parts are what a function makes of these, a slice or a copy for instance."""
        parts = {role: function(part) for role, part in self.parts.items()}
        return QueryGroup(**parts, unit=self.unit, selected=self.selected)


class Layers(NamedTuple):
    """What a decoder said about all of its queries, layer by layer.

    Attributes:
        logits: (L, B, N, C), raw.
        boxes: (L, B, N, 4), cxcywh in [0, 1].
        queries: (L, B, N, D), the outputs of the layers as the heads take them. None: layers differ in width.
        distributions: Those of the edges, where the head has them.
    """

    logits: Tensor
    boxes: Tensor
    queries: Tensor | None
    distributions: BoxDistributions | None = None


class Call(NamedTuple):
    """One call of a decoder.

    Attributes:
        decoder: The decoder.
        ancestors: The modules that hold it, from the nearest to the model.
        description: How it is read.
        roles: The name of the argument in each role of `description.arguments` that the decoder has.
        arguments: Its arguments by name.
        output: Its answer.
        layer_outputs: The raw answer of each of its layers.
        projections: Answers of `description.memory_projections`, for a second call.
        outer_arguments: Arguments by name of the module that holds the decoder.
        watched: The answer of `description.watch`.
        autocast: Whether the call was under autocast, with its type of device and its dtype.
    """

    decoder: nn.Module
    ancestors: tuple[nn.Module, ...]
    description: Description
    roles: Mapping[str, str]
    arguments: dict[str, Any]
    output: Any
    layer_outputs: list[Tensor]
    projections: dict[nn.Module, Tensor]
    outer_arguments: dict[str, Any]
    watched: Any
    autocast: tuple[bool, str, torch.dtype]

    def argument(self, role: str) -> Any:
        """The argument in a role; None where there is none."""
        return self.arguments.get(self.roles[role]) if role in self.roles else None

    def find(self, attribute: str) -> Any:
        """An attribute, such as a head, of the nearest module around the decoder that has it."""
        for module in self.ancestors:
            if getattr(module, attribute, None) is not None:
                return getattr(module, attribute)
        kinds = [type(module).__name__ for module in self.ancestors]
        msg = f"the {self.description.name} decoder must be in a module with `{attribute}`, it is in {kinds}"
        raise AttributeError(msg)


def map_sizes(call: Call) -> list[tuple[int, int]]:
    """Height and width of each level, from the argument in the role ``"shapes"``."""
    shapes = call.argument("shapes")
    pairs = shapes.tolist() if isinstance(shapes, Tensor) else shapes
    return [(int(height), int(width)) for height, width in pairs]


def num_queries(call: Call) -> int:
    """How many queries the model has of its own, from an attribute of that name around the decoder."""
    return int(call.find("num_queries"))


class Description(NamedTuple):
    """How to read a decoder: what its arguments are, and how its answer becomes predictions.

    Most models are recognised by the names of the decoder's arguments. For a model of one's own, write one of these and
    give it to :class:`Tap`; the decoder must have its layers in `layers`.

    Attributes:
        name: Of the family, for messages.
        arguments: For each role the names that the argument may have. Roles: the parts of the queries (``"content"``,
            ``"position"``, ``"reference"``), ``"memory"`` and its ``"shapes"``, ``"padding"``. A decoder of the family
            has an argument of each, those of `optional` apart.
        predict: From a call to what the decoder said; it applies the heads where the decoder does not.
        path: Of the decoder in the model, such as ``"transformer.decoder"``. None: found by `arguments`.
        optional: Roles that a decoder need not have.
        attributes: What a decoder of the family has beside `layers`, where arguments do not tell.
        activation: Of the class head.
        unit: Of the reference: ``"box"`` in [0, 1], ``"logit"`` before the sigmoid.
        batch_first: Whether queries and memory are (B, N, D), not (N, B, D).
        true_is_padding: Whether True in the argument ``"padding"`` is a cell without image.
        own_queries: Where a model in training has its own: after the denoising queries (``"last"``), or before the
            copies of group DETR (``"first"``).
        own_count: How many queries of its own the model has.
        without: Arguments that only concern other queries: None when queries are replayed, and if the first is None
            there are no others.
        training_flag: Whether the decoder predicts after every layer only where its own `training` is set, which it
            uses for nothing else.
        grouped: Path in a layer of the module that splits queries into groups while its own `training` is set.
        memory_projections: Paths in a layer of modules that see the memory and no queries.
        sizes: Height and width of each level of the memory.
        watch: Path, beside the decoder, of a module whose answer `sizes` needs.

    Examples:
        >>> def predict(call):  # a decoder that answers states (L, B, N, D), with one head for all layers
        ...     return Layers(call.find("classes")(call.output), call.find("boxes")(call.output).sigmoid(), call.output)
        >>> mine = Description("mine", {"content": ("queries",), "memory": ("image",)}, predict, path="decoder")
        >>> mine.activation, mine.batch_first
        ('sigmoid', True)
    """

    name: str
    arguments: Mapping[str, tuple[str, ...]]
    predict: Callable[[Call], Layers]
    path: str | None = None
    optional: tuple[str, ...] = ()
    attributes: tuple[str, ...] = ()
    activation: Activation = "sigmoid"
    unit: Unit = "logit"
    batch_first: bool = True
    true_is_padding: bool = True
    own_queries: Literal["first", "last"] = "last"
    own_count: Callable[[Call], int] = num_queries
    without: tuple[str, ...] = ()
    training_flag: bool = False
    grouped: str | None = None
    memory_projections: tuple[str, ...] = ()
    sizes: Callable[[Call], list[tuple[int, int]]] = map_sizes
    watch: str | None = None
