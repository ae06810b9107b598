"""Curves and bars of a training: its terms, the instability of its matching, how strongly each term pulls."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from matplotlib.axes import Axes
from torch import Tensor

from detr_kd_losses._validation import validate_floating, validate_same_shape
from detr_kd_losses.plotting._style import COLOURS, DASHES, FAINT, INK, axes_or_new
from detr_kd_losses.training.diagnostics import LossMagnitude

__all__ = ["plot_instability", "plot_magnitudes", "plot_terms"]


def plot_terms(
    terms: Mapping[str, Sequence[float] | Tensor],
    *,
    steps: Sequence[float] | Tensor | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw how the terms of a loss went, step by step.

    Args:
        terms: The values of each term, by name.
        steps: When they were taken; None: 0, 1, 2, ...
        ax: Where to draw. Its vertical axis becomes logarithmic where all values are above 0.

    Returns:
        The Axes, with a line for each term.

    Raises:
        ValueError: If a term has another number of values than there are steps.

    Examples:
        >>> from matplotlib.figure import Figure
        >>> ax = plot_terms({"loss_kd_class": [2.0, 1.0, 0.5], "loss_kd_bbox": [1.0, 0.9, 0.8]}, ax=Figure().subplots())
        >>> [line.get_label() for line in ax.lines]
        ['loss_kd_class', 'loss_kd_bbox']
    """
    ax = axes_or_new(ax)
    series = {name: torch.as_tensor(values).detach().double().cpu() for name, values in terms.items()}
    for number, (name, values) in enumerate(series.items()):
        at = torch.arange(len(values)) if steps is None else torch.as_tensor(steps)
        validate_same_shape(f"terms[{name!r}]", values.shape, "steps", at.shape, "(S,)")
        _curve(ax, at, values, number, name)
    if series and all(bool((values > 0).all()) for values in series.values()):
        ax.set_yscale("log")
    _frame(ax, "step", "value of the term")
    return ax


def plot_instability(
    instability: Tensor, *, steps: Sequence[float] | Tensor | None = None, ax: Axes | None = None
) -> Axes:
    """Draw what share of the matched queries changed their partner, layer by layer, over the training.

    Args:
        instability: (S, L) or (S,), of :func:`assignment_instability` at S moments; NaN where there was nothing.
        steps: When; None: 0, 1, 2, ...
        ax: Where to draw.

    Returns:
        The Axes, with a line for each layer.

    Raises:
        ValueError: If a shape does not fit.
        TypeError: If a dtype does not fit.

    Examples:
        >>> from matplotlib.figure import Figure
        >>> ax = plot_instability(torch.tensor([[0.9, 0.8], [0.5, 0.3], [0.4, 0.2]]), ax=Figure().subplots())
        >>> [line.get_label() for line in ax.lines]
        ['layer 1', 'layer 2']

    References:
        Li et al., "DN-DETR", CVPR 2022, arXiv:2203.01305.
        Chang et al., "DETRDistill", ICCV 2023, arXiv:2211.10156, Fig. 7.
    """
    validate_floating("instability", instability)
    layers = instability.detach().double().cpu()
    layers = layers.unsqueeze(-1) if layers.ndim == 1 else layers
    ax = axes_or_new(ax)
    at = torch.arange(len(layers)) if steps is None else torch.as_tensor(steps)
    validate_same_shape("instability", layers.shape[:1], "steps", at.shape, "(S,)")
    for number, values in enumerate(layers.unbind(-1)):
        _curve(ax, at, values, number, f"layer {number + 1}")
    ax.set_ylim(0, 1)
    _frame(ax, "step", "share of matched queries with another partner")
    return ax


def plot_magnitudes(magnitudes: Mapping[str, LossMagnitude], *, ax: Axes | None = None) -> Axes:
    """Draw how strongly each term pulls beside the task's loss, which is 1: a bar of its gradient, a dot of its value.

    Args:
        magnitudes: From :func:`loss_magnitudes`.
        ax: Where to draw. Its horizontal axis becomes logarithmic.

    Returns:
        The Axes, with a bar for each term, from the top in the order given. What is not finite, as where the task's
        loss has no gradient, has no bar, and stands behind the name of its term.

    Examples:
        >>> from matplotlib.figure import Figure
        >>> magnitudes = {"loss_kd_class": LossMagnitude(*torch.tensor([1.5, 0.25, 0.5, 0.125]))}
        >>> ax = plot_magnitudes(magnitudes, ax=Figure().subplots())
        >>> [float(bar.get_width()) for bar in ax.patches]
        [0.125]
    """
    ax = axes_or_new(ax)
    rows = range(len(magnitudes))
    norms = [float(magnitude.relative_gradient_norm) for magnitude in magnitudes.values()]
    ax.barh(rows, [_drawn(norm) for norm in norms], height=0.55, color=COLOURS[0], label="gradient")
    values = [float(magnitude.relative_value) for magnitude in magnitudes.values()]
    ax.plot(
        [_drawn(value) for value in values], rows, "D", ms=6, color=COLOURS[5], mec="white", ls="none", label="value"
    )
    ax.axvline(1.0, color=INK, lw=1, ls=DASHES[1], label="the task's loss")
    ax.set_xscale("log")
    names = [name if math.isfinite(norm) else f"{name}: {norm}" for name, norm in zip(magnitudes, norms, strict=True)]
    ax.set_yticks(rows, names)
    ax.invert_yaxis()
    _frame(ax, "relative to the task's own loss", "")
    return ax


def _drawn(value: float) -> float:
    return value if math.isfinite(value) else math.nan


def _curve(ax: Axes, steps: Tensor, values: Tensor, number: int, name: str) -> None:
    colour, dashes = COLOURS[number % len(COLOURS)], DASHES[number % len(DASHES)]
    ax.plot(steps.tolist(), values.tolist(), color=colour, ls=dashes, lw=1.8, label=name)


def _frame(ax: Axes, xlabel: str, ylabel: str) -> None:
    """The names of the axes, a legend beside them, a light grid."""
    ax.set(xlabel=xlabel, ylabel=ylabel)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8)
    ax.grid(color=FAINT, lw=0.7)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
