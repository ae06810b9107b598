"""Lines with error bars as an SVG that is the same text on every machine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 620, 400, 56, 200, 36, 48
COLOURS = ("#8b949e", "#0969da", "#cf222e", "#1a7f37", "#8250df", "#bf8700")


class Line(NamedTuple):
    """A named line through points (x, y, half an error bar)."""

    name: str
    points: Sequence[tuple[float, float, float]]


def line_plot(title: str, x_label: str, lines: Sequence[Line]) -> str:
    """Return an SVG with a logarithmic x axis whose ticks are doublings, and all values of y."""
    ticks = doublings([x for line in lines for x, _, _ in line.points])
    lows = [y - error for line in lines for _, y, error in line.points] or [0.0]
    highs = [y + error for line in lines for _, y, error in line.points] or [100.0]
    bottom, top = 10 * math.floor(min(lows) / 10), 10 * math.ceil(max(highs) / 10)

    def place(x: float, y: float) -> tuple[float, float]:
        across = math.log(x / ticks[0]) / math.log(ticks[-1] / ticks[0])
        return (
            LEFT + (WIDTH - LEFT - RIGHT) * across,
            HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (y - bottom) / (top - bottom),
        )

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        text(LEFT, 20, title, weight="bold", size=14),
        text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, x_label, anchor="middle"),
    ]
    for y in range(bottom, top + 1, 10):
        (x1, height), (x2, _) = place(ticks[0], y), place(ticks[-1], y)
        parts += [segment(x1, height, x2, height, "#d8dde3"), text(x1 - 8, height + 4, str(y), anchor="end")]
    for tick in ticks:
        x, y = place(tick, bottom)
        parts += [segment(x, y, x, y + 5, "#22272e"), text(x, y + 20, f"{tick:g}", anchor="middle")]
    labels = label_heights([place(*line.points[-1][:2])[1] for line in lines])
    for line, colour, height in zip(lines, COLOURS, labels, strict=False):
        parts += drawn_line(line, colour, place)
        parts.append(text(WIDTH - RIGHT + 10, height + 4, line.name, colour=colour))
    return "\n".join([*parts, "</svg>\n"])


def doublings(numbers: Sequence[float]) -> list[float]:
    """Return powers of two, or of two times 1000 from there on, from below all numbers to above them."""
    unit = 1000.0 if numbers and min(numbers) >= 1000 else 1.0
    exponents = [math.log2(number / unit) for number in numbers] or [0.0]
    first, last = math.floor(min(exponents)), math.ceil(max(exponents))
    return [unit * 2.0**exponent for exponent in range(first, max(last, first + 1) + 1)]


def drawn_line(line: Line, colour: str, place) -> list[str]:
    """Return a line, its points and their error bars."""
    places = [place(x, y) for x, y, _ in line.points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    parts = [f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>']
    for x, y, error in line.points:
        (across, low), (_, high) = place(x, y - error), place(x, y + error)
        parts.append(segment(across, low, across, high, colour))
        parts.append(f'<circle cx="{across:.1f}" cy="{place(x, y)[1]:.1f}" r="3" fill="{colour}"/>')
    return parts


def label_heights(heights: Sequence[float], distance: float = 15) -> list[float]:
    """Return where the labels of lines are written, none on another."""
    placed = list(heights)
    lowest = math.inf
    for index in sorted(range(len(heights)), key=lambda index: -heights[index]):
        placed[index] = lowest = min(heights[index], lowest - distance)
    return placed


def segment(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    """Return a straight line."""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"/>'


def text(
    x: float,
    y: float,
    words: str,
    *,
    anchor: str = "start",
    colour: str = "#22272e",
    weight: str = "normal",
    size: int = 12,
) -> str:
    """Return a line of text."""
    style = f'text-anchor="{anchor}" fill="{colour}" font-weight="{weight}" font-size="{size}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{words}</text>'
