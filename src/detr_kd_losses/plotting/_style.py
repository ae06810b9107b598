"""What all pictures have in common: their colours, and an Axes to draw on."""

from __future__ import annotations

from matplotlib.axes import Axes

__all__: list[str] = []

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))
INK, GREY, FAINT = "#22272e", "#8b949e", "#d8dde3"


def axes_or_new(ax: Axes | None, *, figsize: tuple[float, float] | None = None) -> Axes:
    """`ax`, or that of a new figure of pyplot, of that size."""
    if ax is None:
        from matplotlib import pyplot as plt  # noqa: PLC0415  # whoever gives an Axes needs no window

        ax = plt.figure(layout="constrained", figsize=figsize).subplots()
    return ax
