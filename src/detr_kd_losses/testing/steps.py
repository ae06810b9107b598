"""A step of distillation: what a student and its teacher say about the same images, and the targets of these.

Tests, benchmarks and trials of a criterion take it from here. Numbers come from a seed alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from detr_kd_losses.outputs import BoxDistributions, DetectorOutput, Predictions, Targets
from detr_kd_losses.testing import strategies

__all__ = ["CriterionInputs", "make_output", "make_step"]


class CriterionInputs(NamedTuple):
    """The arguments of a criterion."""

    student: DetectorOutput
    teacher: DetectorOutput
    targets: Targets


def make_output(
    *,
    stages: int = 2,
    images: int = 2,
    queries: int = 5,
    classes: int = 3,
    activation: str = "sigmoid",
    group: int | None = None,
    channels: int = 4,
    height: int = 3,
    width: int = 4,
    levels: int | None = None,
    padded: bool = True,
    bins: int | None = None,
    mask_size: tuple[int, int] | None = None,
    box_kind: str = "generic",
    logit_kind: str = "generic",
    logit_shift: float = 0.0,
    dtype: torch.dtype = torch.float32,
    requires_grad: bool = False,
    seed: int = 0,
) -> DetectorOutput:
    """All that a detector may say about a batch.

    Args:
        stages: L.
        images: B.
        queries: N.
        classes: C.
        activation: A ``"softmax"`` head has one channel more, "no object".
        group: Number of the teacher's queries that a student predicts for; None: no group.
        channels: D.
        height: H of the first level.
        width: W of the first level.
        levels: Number of levels, each half as large as the one before; None: one map, not in a list.
        padded: Whether images are smaller than the map.
        bins: R + 1, of box distributions; None: none.
        mask_size: H and W of masks; None: none.
        box_kind: See :func:`strategies.make_boxes`.
        logit_kind: See :func:`strategies.make_logits`.
        logit_shift: Added to all logits: below 0 most classes are improbable, as a trained detector has them.
        dtype: Of all floating tensors.
        requires_grad: Whether these ask for a gradient.
        seed: Of the numbers.

    Examples:
        >>> output = make_output(queries=7, group=9, levels=2)
        >>> output.boxes.shape, [tuple(level.shape) for level in output.features]
        (torch.Size([2, 2, 7, 4]), [(2, 4, 3, 4), (2, 4, 2, 2)])
    """

    def finished(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(dtype).requires_grad_(requires_grad)

    def predictions(queries: int, seed: int) -> Predictions:
        logits, boxes = strategies.make_predictions(
            stages=stages,
            images=images,
            queries=queries,
            classes=classes + (activation == "softmax"),
            box_kind=box_kind,
            logit_kind=logit_kind,
            seed=seed,
        )
        return Predictions(finished(logits + logit_shift), finished(boxes))

    pyramid = strategies.make_feature_pyramid(
        images=images, channels=channels, height=height, width=width, levels=levels or 1, padded=padded, seed=seed
    )
    features, masks = [finished(level) for level in pyramid.levels], pyramid.padding_masks
    logits, boxes = predictions(queries, seed)
    distributions, lead = None, (stages, images, queries)
    if bins is not None:
        numbers = strategies.make_logits((*lead, 4 * bins), kind=logit_kind, seed=seed + 4)
        references = strategies.make_boxes(lead, kind=box_kind, seed=seed + 5).to(dtype)
        distributions = BoxDistributions(finished(numbers), references, torch.linspace(-4, 4, bins, dtype=dtype), 4.0)
    return DetectorOutput(
        logits,
        boxes,
        queries=finished(strategies.make_logits((stages, images, queries, channels), seed=seed)),
        features=features[0] if levels is None else features,
        padding_mask=None if not padded else masks[0] if levels is None else masks,
        group=None if group is None else predictions(group, seed + 1),
        distributions=distributions,
        masks=None if mask_size is None else finished(strategies.make_logits((*lead, *mask_size), seed=seed + 6)),
    )


def make_step(
    *,
    students: int = 5,
    teachers: int = 6,
    images: int = 2,
    classes: int = 3,
    targets: int = 3,
    counts: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32,
    requires_grad: bool = False,
    seed: int = 0,
    teacher_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> CriterionInputs:
    """A student with a group for all the teacher's queries, a teacher, and padded targets.

    Args:
        students: N.
        teachers: M.
        images: B.
        classes: C.
        targets: T.
        counts: The number of valid targets of each image; None: any.
        dtype: Of all floating tensors.
        requires_grad: Whether the student's tensors ask for a gradient.
        seed: Of the numbers.
        teacher_options: Those options of :func:`make_output` in which the teacher differs from the student.
        **options: Options of :func:`make_output` for both.

    Examples:
        >>> student, teacher, targets = make_step(teacher_options={"stages": 6}, counts=[3, 0])
        >>> student.logits.shape, teacher.logits.shape, targets.mask.sum(-1)
        (torch.Size([2, 2, 5, 3]), torch.Size([6, 2, 6, 3]), tensor([3, 0]))
    """
    common = {"images": images, "classes": classes, "dtype": dtype, **options}
    student = make_output(queries=students, group=teachers, requires_grad=requires_grad, seed=seed, **common)
    teacher = make_output(queries=teachers, seed=seed + 10, **(common | dict(teacher_options or {})))
    truth = strategies.make_targets(
        images=images, targets=targets, classes=classes, box_kind=options.get("box_kind", "generic"), seed=seed + 20
    )
    mask = truth.mask if counts is None else torch.arange(targets) < torch.tensor(counts).unsqueeze(-1)
    return CriterionInputs(student, teacher, truth._replace(boxes=truth.boxes.to(dtype), mask=mask))
