"""Pictures on an image: who learns from whom, and where the features count."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from torch import Tensor

from detr_kd_losses._validation import (
    validate_boxes,
    validate_count,
    validate_floating,
    validate_predictions,
)
from detr_kd_losses.boxes import box_cxcywh_to_xyxy
from detr_kd_losses.heads import Activation, log_scores, num_classes_of
from detr_kd_losses.outputs import DetectorOutput, Predictions
from detr_kd_losses.pairs import validate_assignment, validate_teacher_positive
from detr_kd_losses.plotting._style import COLOURS, DASHES, GREY, INK, axes_or_new
from detr_kd_losses.stages import select_stages

__all__ = ["plot_mask", "plot_matching"]

_OUTLINE = (patheffects.withStroke(linewidth=3, foreground="white"),)
# Two views of the image beside each other, and a margin for the labels on each side: in widths of the image.
_GAP, _MARGIN = 0.25, 0.62
_LABEL_STEP, _BADGE = 0.12, 0.025


def plot_matching(
    image: Tensor,
    student: DetectorOutput | Predictions,
    teacher: DetectorOutput | Predictions,
    assignment: Tensor,
    *,
    teacher_positive: Tensor | None = None,
    index: int = 0,
    stage: int = -1,
    max_links: int = 12,
    class_names: Sequence[str] | None = None,
    student_activation: Activation = "sigmoid",
    teacher_activation: Activation = "sigmoid",
    ax: Axes | None = None,
) -> Axes:
    """Draw which teacher query teaches which student query: the image twice, the student's boxes left, a link each.

    The links of the surest teacher queries are drawn, with a number on both boxes; the margins say query, class and
    score of each number, pairs on one line. Of all other pairs there are dots at the centres of their boxes.

    Args:
        image: (3, H, W), floating in [0, 1] or uint8.
        student: Its outputs of a batch; logits and boxes are drawn.
        teacher: Its outputs of the same images.
        assignment: (L, B, N) or (B, N) int64: the teacher query of each student query, -1 = none
            (:func:`match_teacher`).
        teacher_positive: (L, B, M) or (B, M) bool: draw links of these teacher queries alone.
        index: Which image of the batch.
        stage: Which decoder layer of the student; the teacher's is chosen as :func:`select_stages` with ``"even"``.
        max_links: How many links at most.
        class_names: Names of the classes; None: their numbers.
        student_activation: Head of the student.
        teacher_activation: Head of the teacher.
        ax: Where to draw.

    Returns:
        The Axes. Its lines with a label that begins with "link" are the links.

    Raises:
        ValueError: If shapes do not fit.
        TypeError: If a dtype does not fit.

    Examples:
        >>> from matplotlib.figure import Figure
        >>> student = Predictions(torch.randn(2, 1, 5, 3), torch.rand(2, 1, 5, 4))
        >>> teacher = Predictions(torch.randn(2, 1, 9, 3), torch.rand(2, 1, 9, 4))
        >>> assignment = dkl.match_teacher(*student, *teacher)
        >>> ax = plot_matching(torch.rand(3, 8, 8), student, teacher, assignment, max_links=4, ax=Figure().subplots())
        >>> sum(line.get_label().startswith("link") for line in ax.lines)
        4
    """
    validate_count("max_links", max_links)
    teacher = Predictions(*_stages_of(student, teacher.logits, teacher.boxes, dims=3))
    pairs = (
        _Side("student", student, index, stage, student_activation),
        _Side("teacher", teacher, index, stage, teacher_activation),
    )
    _validate_names(class_names, *pairs)
    validate_assignment("assignment", assignment, "student.logits", student.logits, teacher.logits.shape[-2])
    matched = _one(assignment, index, stage, 1)
    if teacher_positive is not None:
        (teacher_positive,) = _stages_of(student, teacher_positive, dims=2)
        validate_teacher_positive(teacher_positive, teacher.logits)
        positive = _one(teacher_positive, index, stage, 1)
        matched = matched.where((matched >= 0) & positive[matched.clamp(min=0)], -1)
    ax = axes_or_new(ax, figsize=(11, 4.2))
    shift = 1 + _GAP
    for left in (0.0, shift):
        _show(ax, image, left)
    queries = (matched >= 0).nonzero().flatten()
    surest = pairs[1].scores[matched[queries]].argsort(descending=True)[:max_links]
    linked = queries[surest]
    for left, side, some in ((0.0, pairs[0], queries), (shift, pairs[1], matched[queries])):
        ax.plot(left + side.boxes[some, 0], side.boxes[some, 1], ".", ms=3, color=GREY, label="pairs")
    links = list(zip(linked.tolist(), matched[linked].tolist(), strict=True))
    for number, (n, m) in enumerate(links):
        colour = _colour_of(number)
        (x, y), (other_x, other_y) = pairs[0].boxes[n, :2].tolist(), pairs[1].boxes[m, :2].tolist()
        ends = [x, shift + other_x], [y, other_y]
        dashes = DASHES[number // len(COLOURS) % len(DASHES)]
        label = f"link {n} - {m}"
        ax.plot(*ends, color=colour, ls=dashes, lw=1.2, marker="o", ms=3, path_effects=_OUTLINE, label=label)
    for side, left, which in ((pairs[0], 0.0, 0), (pairs[1], shift, 1)):
        ends_here = [link[which] for link in links]
        _number_boxes(ax, side.boxes[ends_here], left)
        _list_queries(ax, side, ends_here, left, class_names, to_the_left=which == 0)
    ax.set(xlim=(-_MARGIN, shift + 1 + _MARGIN), ylim=(1, 0))
    ax.set_title("student   …   learns from   …   teacher", fontsize=11, color=INK)
    return ax


class _Side:
    """What is drawn of the predictions of one detector: boxes (Q, 4), scores and classes (Q,)."""

    def __init__(
        self, name: str, output: DetectorOutput | Predictions, index: int, stage: int, activation: Activation
    ) -> None:
        validate_predictions(f"{name}.", output.logits, output.boxes)
        stages, images = output.boxes.shape[:-2].numel() // output.boxes.shape[-3], output.boxes.shape[-3]
        _validate_place("index", index, range(images))
        _validate_place("stage", stage, range(-stages, stages))
        self.boxes = _one(output.boxes, index, stage, 2).detach().float().cpu()
        logits = _one(output.logits, index, stage, 2).detach().float().cpu()
        self.num_classes = num_classes_of(logits, activation)
        scores = log_scores(logits, activation).log_p.exp()[:, : self.num_classes]
        self.scores, self.classes = scores.max(-1)


def _one(values: Tensor, index: int, stage: int, dims: int) -> Tensor:
    """The last `dims` dimensions of one stage and image of (L, B, ...) or (B, ...)."""
    values = values if values.ndim == dims + 2 else values.unsqueeze(0)
    return values[stage, index].cpu()


def _stages_of(student: DetectorOutput | Predictions, *values: Tensor, dims: int) -> list[Tensor]:
    """Of each of the teacher's `values` the layers that teach those of the student."""
    layers = len(student.boxes) if student.boxes.ndim == 4 else 1
    return [one if one.ndim == dims else select_stages(one, layers) for one in values]


def _validate_names(names: Sequence[str] | None, *sides: _Side) -> None:
    most = max(side.num_classes for side in sides)
    if names is not None and len(names) < most:
        msg = f"`class_names` must have a name for each of {most} classes, got {len(names)}"
        raise ValueError(msg)


def _validate_place(name: str, value: int, places: range) -> None:
    if value not in places:
        msg = f"`{name}` must be in {places.start}, ..., {places.stop - 1}, got {value!r}"
        raise ValueError(msg)


def _colour_of(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _number_boxes(ax: Axes, boxes: Tensor, left: float) -> None:
    """Outline the boxes (K, 4), and number each at the corner that is furthest from the numbers so far."""
    taken = torch.empty(0, 2)
    for number, box in enumerate(boxes):
        _box(ax, box, _colour_of(number), left=left)
        signs = torch.tensor([[-1, -1], [1, -1], [-1, 1], [1, 1]])
        corners = (box[:2] + signs * box[2:] / 2).clamp(_BADGE, 1 - _BADGE)
        distances = torch.cdist(corners, torch.cat([taken, torch.full((1, 2), 9.0)])).amin(-1)
        corner = corners[distances.clamp(max=3 * _BADGE).argmax()]
        taken = torch.cat([taken, corner[None]])
        _badge(ax, left + corner[0].item(), corner[1].item(), number)


def _badge(ax: Axes, x: float, y: float, number: int) -> None:
    """The number of a link, in its colour."""
    style = {"boxstyle": "circle,pad=0.15", "fc": "white", "ec": _colour_of(number), "lw": 1.4}
    ax.text(x, y, f"{number + 1}", ha="center", va="center", fontsize=6.5, color=INK, weight="bold", bbox=style)


def _list_queries(
    ax: Axes, side: _Side, queries: list[int], left: float, names: Sequence[str] | None, *, to_the_left: bool
) -> None:
    """Number, query, class and score of each link in the margin, from top to bottom."""
    align, edge, sign = ("right", left, -1) if to_the_left else ("left", left + 1, 1)
    step = min(_LABEL_STEP, 1 / max(1, len(queries)))
    for number, query in enumerate(queries):
        y = (number + 0.5) * step
        label = int(side.classes[query])
        name = f"class {label}" if names is None else names[label]
        _badge(ax, edge + sign * 0.05, y, number)
        text = f"query {query}: {name}, {side.scores[query]:.2f}"
        ax.text(edge + sign * 0.09, y, text, ha=align, va="center", fontsize=7.5, color=INK)


def plot_mask(
    image: Tensor, mask: Tensor, *, boxes: Tensor | None = None, opacity: float = 0.65, ax: Axes | None = None
) -> Axes:
    """Lay a weight of the cells of a feature map over an image.

    Args:
        image: (3, H, W), floating in [0, 1] or uint8.
        mask: (H', W'), the weight of each cell (:func:`target_aware_mask`, :func:`box_mask`).
        boxes: (T, 4), cxcywh in [0, 1], to be outlined.
        opacity: Of the mask, in [0, 1].
        ax: Where to draw.

    Returns:
        The Axes. Its last image is the mask, in the units of `mask`.

    Raises:
        ValueError: If a shape does not fit.
        TypeError: If a dtype does not fit.

    Examples:
        >>> from matplotlib.figure import Figure
        >>> ax = plot_mask(torch.rand(3, 16, 16), torch.rand(4, 4), ax=Figure().subplots())
        >>> ax.images[-1].get_array().shape
        (4, 4)
    """
    validate_floating("mask", mask)
    if mask.ndim != 2:
        msg = f"`mask` must have shape (H, W), got {tuple(mask.shape)}"
        raise ValueError(msg)
    ax = axes_or_new(ax)
    _show(ax, image, 0.0)
    shown = mask.detach().float().cpu().numpy()
    drawn = ax.imshow(shown, extent=(0, 1, 1, 0), cmap="cividis", alpha=opacity, interpolation="nearest")
    if ax.figure is not None:
        ax.figure.colorbar(drawn, ax=ax, fraction=0.046, pad=0.03, label="weight")
    if boxes is not None:
        validate_boxes("boxes", boxes)
        for box in boxes.detach().float().cpu():
            _box(ax, box, "white")
    ax.set(xlim=(0, 1), ylim=(1, 0))
    return ax


def _show(ax: Axes, image: Tensor, left: float) -> None:
    """The image in the unit square that begins at `left`."""
    if image.ndim != 3 or image.shape[0] != 3:
        msg = f"`image` must have shape (3, H, W), got {tuple(image.shape)}"
        raise ValueError(msg)
    if image.dtype != torch.uint8:
        validate_floating("image", image)
        image = image.float().clamp(0, 1)
    ax.imshow(image.detach().cpu().permute(1, 2, 0).numpy(), extent=(left, left + 1, 1, 0), interpolation="nearest")
    ax.set_axis_off()
    ax.set_aspect(image.shape[1] / image.shape[2])


def _box(ax: Axes, box: Tensor, colour: str, *, left: float = 0.0) -> None:
    """Outline what of a cxcywh box is in the image."""
    x, y, right, bottom = box_cxcywh_to_xyxy(box).clamp(0, 1).tolist()
    ax.add_patch(Rectangle((left + x, y), right - x, bottom - y, fill=False, ec=colour, lw=1.4, path_effects=_OUTLINE))
