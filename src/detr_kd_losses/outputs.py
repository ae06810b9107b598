"""The records that everything else takes: what a detector says of a batch, and what is true of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from detr_kd_losses._validation import (
    validate_boxes,
    validate_dtype,
    validate_predictions,
    validate_record,
    validate_same_device,
    validate_same_shape,
    validate_targets_shape,
)

__all__ = ["BoxDistributions", "DetectorOutput", "Predictions", "Targets", "pad_targets"]

Record = TypeVar("Record", bound="Predictions | BoxDistributions | DetectorOutput | Targets")


class Predictions(NamedTuple):
    """Classes and boxes of some queries.

    Attributes:
        logits: (L, B, N, C), raw. A softmax head has "no object" as its last channel.
        boxes: (L, B, N, 4), cxcywh in [0, 1].

    Examples:
        >>> Predictions(torch.zeros(6, 2, 300, 80), torch.rand(6, 2, 300, 4))
        Predictions(logits=(6, 2, 300, 80) float32 cpu, boxes=(6, 2, 300, 4) float32 cpu)
    """

    logits: Tensor
    boxes: Tensor

    def to(self, device: torch.device | str) -> Predictions:
        """The same on `device`."""
        return _moved(self, device)

    def __repr__(self) -> str:
        """Show names, shapes, dtypes and devices, no numbers."""
        return _described(self)


class BoxDistributions(NamedTuple):
    """Where a head of D-FINE's kind expects the edges of each box, and what its numbers are about.

    Attributes:
        logits: (L, B, N, 4 (R + 1)), raw, edges left, top, right, bottom: a softmax over the bins of each edge.
        references: (L, B, N, 4), cxcywh in [0, 1]: the boxes whose edges are moved, the same in all layers of D-FINE.
        bins: (R + 1,), ascending: the model's weighting function.
        scale: The model's ``reg_scale``: bin `W` is `W / scale` widths away from the edge of the reference.

    Examples:
        >>> BoxDistributions(torch.zeros(6, 2, 300, 132), torch.rand(6, 2, 300, 4), torch.linspace(-4, 4, 33), 4.0)
        BoxDistributions(logits=(6, 2, 300, 132) float32 cpu, references=(6, 2, 300, 4) float32 cpu, \
bins=(33,) float32 cpu, scale=4.0)
    """

    logits: Tensor
    references: Tensor
    bins: Tensor
    scale: Tensor | float

    def to(self, device: torch.device | str) -> BoxDistributions:
        """The same on `device`."""
        return _moved(self, device)

    def __repr__(self) -> str:
        """Show names, shapes, dtypes and devices, no numbers but a scale that is one."""
        return _described(self)


class DetectorOutput(NamedTuple):
    """What a detector says about a batch, decoder layer by decoder layer.

    Attributes:
        logits: (L, B, N, C), raw. A softmax head has "no object" as its last channel.
        boxes: (L, B, N, 4), cxcywh in [0, 1].
        queries: (L, B, N, D), the decoder's outputs; needed of a teacher for the feature loss.
        features: (B, D, H, W) or a sequence of levels, for the feature loss.
        padding_mask: (B, H, W) bool, True = a valid cell, or one per level of `features`. None: all valid.
        group: A student's predictions for the M queries of the teacher, an extra group of its decoder; of a teacher,
            predictions for other queries that the student's group has, too.
        group_index: (B, K) int64, which K of the teacher's queries a student's `group` has (:func:`best_queries`).
            None: all of them, in order.
        query_mask: (B, M) bool of a teacher, True = a query, False = padding, where images have different numbers of
            queries. Padding teaches nothing. None: all are queries.
        distributions: Those of the edges of the boxes, for the loss of box distributions.
        masks: (L, B, N, H, W), raw, for the loss of masks.

    Examples:
        >>> output = DetectorOutput(torch.zeros(6, 2, 300, 80), torch.rand(6, 2, 300, 4))
        >>> output.features is None
        True
        >>> output
        DetectorOutput(logits=(6, 2, 300, 80) float32 cpu, boxes=(6, 2, 300, 4) float32 cpu)
    """

    logits: Tensor
    boxes: Tensor
    queries: Tensor | None = None
    features: Tensor | Sequence[Tensor] | None = None
    padding_mask: Tensor | Sequence[Tensor] | None = None
    group: Predictions | None = None
    group_index: Tensor | None = None
    query_mask: Tensor | None = None
    distributions: BoxDistributions | None = None
    masks: Tensor | None = None

    def to(self, device: torch.device | str) -> DetectorOutput:
        """The same on `device`."""
        return _moved(self, device)

    def __repr__(self) -> str:
        """Show names, shapes, dtypes and devices, no numbers."""
        return _described(self)


class Targets(NamedTuple):
    """Ground truths of a batch, padded to the same number.

    Attributes:
        labels: (B, T) int64, in the student's classes.
        boxes: (B, T, 4), cxcywh in [0, 1].
        mask: (B, T) bool, True = a target, False = padding.

    Examples:
        >>> Targets(torch.tensor([[1]]), torch.rand(1, 1, 4), torch.tensor([[True]]))
        Targets(labels=(1, 1) int64 cpu, boxes=(1, 1, 4) float32 cpu, mask=(1, 1) bool cpu)
    """

    labels: Tensor
    boxes: Tensor
    mask: Tensor

    def to(self, device: torch.device | str) -> Targets:
        """The same on `device`."""
        return _moved(self, device)

    def __repr__(self) -> str:
        """Show names, shapes, dtypes and devices, no numbers."""
        return _described(self)


def pad_targets(targets: Iterable[Mapping[str, Tensor]]) -> Targets:
    """Pad the targets of each image to the largest number in the batch.

    Args:
        targets: For each image a mapping with ``"labels"`` (T_i,) int64 (or ``"class_labels"``, as transformers calls
            them) and ``"boxes"`` (T_i, 4) cxcywh in [0, 1].

    Returns:
        :class:`Targets` with T = max T_i, boxes in the widest of their dtypes.

    Raises:
        ValueError: If there is no image, labels are missing or told twice with different values, labels and boxes of
            an image differ in number, or images are on different devices.
        TypeError: If an image is no mapping, or a dtype does not fit.

    Examples:
        >>> images = [{"labels": torch.tensor([3]), "boxes": torch.rand(1, 4)},
        ...           {"labels": torch.tensor([], dtype=torch.int64), "boxes": torch.rand(0, 4)}]
        >>> pad_targets(images).mask.tolist()
        [[True], [False]]
    """
    labels, boxes = [], []
    for index, image in enumerate(targets):
        if not isinstance(image, Mapping):
            msg = f"`targets[{index}]` must be a mapping with 'labels' and 'boxes', got {type(image).__name__}"
            raise TypeError(msg)
        keys = [name for name in ("labels", "class_labels") if name in image]
        key = keys[0] if keys else None
        if key is None or "boxes" not in image:
            msg = f"`targets[{index}]` must have 'labels' (or 'class_labels') and 'boxes', got {sorted(image)}"
            raise ValueError(msg)
        validate_dtype(f"targets[{index}][{key!r}]", image[key], torch.int64)
        validate_boxes(f"targets[{index}]['boxes']", image["boxes"])
        validate_same_shape(f"targets[{index}][{key!r}]", image[key].shape, "boxes", image["boxes"].shape[:-1], "(T,)")
        if len(keys) == 2 and not torch.equal(*(image[name].cpu() for name in keys)):
            msg = f"`targets[{index}]` must have 'labels' or 'class_labels', got both, with different values"
            raise ValueError(msg)
        labels.append(image[key])
        boxes.append(image["boxes"])
        for field, tensor in ((key, labels[-1]), ("boxes", boxes[-1])):
            validate_same_device("targets[0]['boxes']", boxes[0], **{f"targets[{index}][{field!r}]": tensor})
    if not labels:
        msg = "`targets` must have at least one image, got none"
        raise ValueError(msg)
    pad = nn.utils.rnn.pad_sequence
    valid = [torch.ones_like(image, dtype=torch.bool) for image in labels]
    # One image may be in another precision, an empty one for instance: the widest counts, not the first.
    dtype = reduce(torch.promote_types, (image.dtype for image in boxes))
    boxes = [image.to(dtype) for image in boxes]
    return Targets(pad(labels, batch_first=True), pad(boxes, batch_first=True), pad(valid, batch_first=True))


def with_stages(name: str, output: DetectorOutput) -> DetectorOutput:
    """`output`, validated, with a dimension of decoder layers; (B, N, ...) counts as one layer."""
    validate_record(name, output, DetectorOutput, "DetectorOutput(outputs['pred_logits'], outputs['pred_boxes'])")
    if output.group is not None:
        validate_record(f"{name}.group", output.group, Predictions, "Predictions(logits, boxes)")
        validate_predictions(f"{name}.group.", *output.group)
    if output.group_index is not None:
        _validate_group_index(name, output)
    if output.distributions is not None:
        remedy = "BoxDistributions(logits, references, bins, scale)"
        validate_record(f"{name}.distributions", output.distributions, BoxDistributions, remedy)
    validate_predictions(f"{name}.", output.logits, output.boxes)
    if output.logits.ndim == 3:
        queries = None if output.queries is None else output.queries.unsqueeze(0)
        group = None if output.group is None else Predictions(*(tensor.unsqueeze(0) for tensor in output.group))
        logits, boxes = output.logits.unsqueeze(0), output.boxes.unsqueeze(0)
        # In full: the compiler of PyTorch 2.6 cannot trace `_replace`.
        said = output.features, output.padding_mask, group, output.group_index, output.query_mask
        masks = None if output.masks is None else output.masks.unsqueeze(0)
        output = DetectorOutput(logits, boxes, queries, *said, _with_stage(output.distributions), masks)
    if output.logits.ndim != 4:
        msg = f"`{name}.logits` must have shape (L, B, N, C) or (B, N, C), got {tuple(output.logits.shape)}"
        raise ValueError(msg)
    return output


def _with_stage(distributions: BoxDistributions | None) -> BoxDistributions | None:
    """Distributions of one layer, with its dimension."""
    if distributions is None:
        return None
    logits, references, bins, scale = distributions
    return BoxDistributions(logits.unsqueeze(0), references.unsqueeze(0), bins, scale)


def _validate_group_index(name: str, output: DetectorOutput) -> None:
    """Raise unless `group_index` (B, K) is of a group (..., B, K, C)."""
    index, group = output.group_index, output.group
    if index is None or group is None:
        msg = f"`{name}.group` must be given where `{name}.group_index` is, got None"
        raise ValueError(msg)
    validate_dtype(f"{name}.group_index", index, torch.int64)
    shape = group.logits.shape[-3:-1]
    validate_same_shape(f"{name}.group_index", index.shape, f"{name}.group.logits", shape, "(B, K)")
    validate_same_device(f"{name}.logits", output.logits, **{f"{name}.group_index": index})


def validate_step(student: DetectorOutput, teacher: DetectorOutput, targets: Targets) -> None:
    """Raise unless the outputs, with stages, and the targets are of the same images and on the same device."""
    validate_record("targets", targets, Targets, "pad_targets(targets)")
    validate_same_shape(
        "student.logits", student.logits.shape[1:2], "teacher.logits", teacher.logits.shape[1:2], "(B,)"
    )
    validate_same_device("student.logits", student.logits, **{"teacher.logits": teacher.logits})
    batch = student.logits.shape[1:2]
    validate_targets_shape(*targets, batch_shape=batch, like=student.logits, like_name="student.logits")


def _each(function: Callable[[Tensor], Any], value: Any) -> Any:
    """Apply `function` to a field: a tensor, levels of tensors, a record, or None."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Predictions | BoxDistributions | DetectorOutput | Targets):
        return type(value)(*(_each(function, field) for field in value))
    return [_each(function, level) for level in value] if isinstance(value, list | tuple) else value


def _moved(record: Record, device: torch.device | str) -> Record:
    moved: Record = _each(lambda tensor: tensor.to(device), record)
    return moved


def _described(record: Predictions | BoxDistributions | DetectorOutput | Targets) -> str:
    fields = ((name, value) for name, value in zip(record._fields, record, strict=True) if value is not None)
    shown = (f"{name}={_shown(value)}" for name, value in fields)
    return f"{type(record).__name__}({', '.join(shown)})"


def _shown(value: object) -> str:
    """Shape, dtype and device of a tensor, of each of several levels, or of what a record holds."""
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')} {value.device}"
    if isinstance(value, list):
        return f"[{', '.join(map(_shown, value))}]"
    return repr(value) if isinstance(value, Predictions | BoxDistributions | float) else type(value).__name__
