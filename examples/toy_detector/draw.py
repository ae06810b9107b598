"""One picture of what distillation did: learning curves, the gain of each seed, and one image seen by everyone."""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Rectangle
from runs import ALONE, RECOMMENDED, STUDENT, TEACHER, load_detector, validation_images, weights_file
from shapes import CLASSES, ShapeImages
from torch import Tensor
from train import Histories, predict

import detr_kd_losses as dkl
from detr_kd_losses.plotting import plot_mask, plot_matching

INK, FAINT, GREY, BLUE, RED = "#22272e", "#d8dde3", "#8b949e", "#0969da", "#cf222e"
OTHERS = ("#bf8700", "#1a7f37", "#8250df", "#bc4c00")


def draw_comparison(students: Histories, directory: Path, out: Path) -> None:
    """Draw the histories, and the saved detectors of the first seed at work on one validation image."""
    figure = Figure(figsize=(15, 8.6), layout="constrained", facecolor="white")
    charts, pictures = figure.subfigures(2, 1, height_ratios=(1.2, 1), hspace=0.04)
    curves, gains = charts.subplots(1, 2, width_ratios=(1.25, 1))
    draw_curves(curves, students)
    draw_gains(gains, students)
    draw_image(pictures, directory, min(students[RECOMMENDED]))
    figure.suptitle(headline(students), fontsize=17, fontweight="bold", color=INK)
    figure.savefig(out, dpi=110)


def headline(students: Histories) -> str:
    """Say what came out, whatever it is."""
    gains = seed_gains(students)
    better = sum(gain > 0 for gain in gains)
    return f"Distillation: {sum(gains) / len(gains):+.1f} AP for the student, better on {better} of {len(gains)} seeds"


def seed_gains(students: Histories) -> list[float]:
    """Return the AP that the recommended distillation adds, for each seed."""
    return [run.ap[-1] - students[ALONE][seed].ap[-1] for seed, run in students[RECOMMENDED].items()]


# ------------------------------------------------------------------------------------------------------------ charts


def draw_curves(axes: Axes, students: Histories) -> None:
    """Draw AP over the training steps: each seed thin, their mean bold, settings with fewer seeds in the back."""
    others = [setting for setting in students if setting not in (ALONE, RECOMMENDED)]
    colours = dict(zip(others, OTHERS, strict=False)) | {ALONE: GREY, RECOMMENDED: BLUE}
    labels = []
    for setting, colour in colours.items():
        runs = list(students[setting].values())
        steps = [0, *runs[0].steps]
        curves = torch.tensor([[0.0, *run.ap] for run in runs])
        important = setting in (ALONE, RECOMMENDED)
        axes.plot(steps, curves.mean(0), color=colour, lw=3.5 if important else 1.5, alpha=1 if important else 0.7)
        if important:
            axes.plot(steps, curves.T, color=colour, lw=1, alpha=0.5)
            axes.fill_between(steps, curves.amin(0), curves.amax(0), color=colour, alpha=0.1, lw=0)
        seeds = f"{len(runs)} seed{'s'[: len(runs) > 1]}"
        labels.append((float(curves.mean(0)[-1]), f"{setting}  ({seeds})", colour, important))
    axes.set_ylim(0, 1.12 * axes.get_ylim()[1])
    place_labels(axes, steps[-1], labels)
    style(axes, "AP on the validation images", xlabel="training step")
    axes.set_xlim(0, 1.42 * steps[-1])
    axes.set_xticks([step for step in steps if step <= steps[-1]])


def place_labels(axes: Axes, x: float, labels: list[tuple[float, str, str, bool]]) -> None:
    """Write the labels at the ends of their curves, from below, no two of them on one another."""
    distance = 0.065 * axes.get_ylim()[1]
    lowest = 0.0
    for value, text, colour, important in sorted(labels):
        lowest = max(value, lowest)
        weight = "bold" if important else "normal"
        axes.annotate(
            f"{value:.1f}  {text}",
            (x, lowest),
            (6, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            fontsize=11 if important else 10,
            fontweight=weight,
        )
        lowest += distance


def draw_gains(axes: Axes, students: Histories) -> None:
    """Draw, seed by seed, how far the recommended distillation moves the final AP."""
    for row, (seed, gain) in enumerate(zip(students[RECOMMENDED], seed_gains(students), strict=True)):
        before = students[ALONE][seed].ap[-1]
        after, colour = before + gain, BLUE if gain > 0 else RED
        axes.annotate("", (after, row), (before, row), arrowprops={"arrowstyle": "-|>", "color": colour, "lw": 4})
        axes.plot(before, row, "o", ms=11, color=GREY)
        axes.plot(after, row, "o", ms=11, color=colour)
        axes.text(before + gain / 2, row - 0.13, f"{gain:+.1f} AP", ha="center", color=colour, size=13, weight="bold")
        for value, text_colour in ((before, GREY), (after, colour)):
            axes.text(value, row + 0.24, f"{value:.1f}", ha="center", color=text_colour, size=10)
    style(axes, f"Final AP, seed by seed: {ALONE} → {RECOMMENDED}", xlabel="AP")
    axes.set_yticks(range(len(students[RECOMMENDED])), [f"seed {seed}" for seed in students[RECOMMENDED]])
    axes.set_ylim(len(students[RECOMMENDED]) - 0.4, -0.6)
    axes.margins(x=0.15)


def style(axes: Axes, title: str, xlabel: str) -> None:
    """Give a chart its title and a light frame."""
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", color=INK)
    axes.set_xlabel(xlabel, color=INK)
    axes.grid(color=FAINT, lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(colors=INK, length=0)


# --------------------------------------------------------------------------------------------------------- one image


def draw_image(figure: SubFigure, directory: Path, seed: int) -> None:
    """Draw the detections of both students, the matching with the teacher, and the target-aware mask."""
    data = image_to_show(validation_images())
    alone, student, teacher = (
        predict(load_detector(kind, weights_file(directory, name, of_seed)), data)
        for kind, name, of_seed in ((STUDENT, ALONE, seed), (STUDENT, RECOMMENDED, seed), (TEACHER, "teacher", 0))
    )
    axes = figure.subplots(1, 4, width_ratios=(1, 1, 2.6, 1.15))
    image = data.images[0]
    for panel in axes[:2]:
        panel.imshow(image.permute(1, 2, 0).numpy(), extent=(0, 1, 1, 0), interpolation="nearest")
        panel.set(xlim=(0, 1), ylim=(1, 0))
        panel.set_axis_off()
    draw_detections(axes[0], alone, data.targets, ALONE)
    draw_detections(axes[1], student, data.targets, RECOMMENDED)
    draw_matching(axes[2], image, student, teacher, data.targets)
    draw_mask(axes[3], image, teacher, data.targets)
    count = int(data.targets.mask.sum())
    figure.supxlabel(
        f"The first validation image with {count} objects, seen by the students of seed {seed}. "
        f"Of their {count} best detections, the green ones are right in class and place (IoU 0.5).",
        color=GREY,
        fontsize=10,
    )


def image_to_show(data: ShapeImages, objects: int = 4) -> ShapeImages:
    """Return the first image of a data set with so many objects, as a data set of one image."""
    first = int((data.targets.mask.sum(1) == objects).int().argmax())
    return data.select(torch.tensor([first]))


def draw_detections(axes: Axes, output: dkl.DetectorOutput, targets: dkl.Targets, title: str) -> None:
    """Draw as many of the best detections as there are objects: full lines are right, dashed ones wrong."""
    count = int(targets.mask.sum())
    scores, labels = output.logits[-1, 0].sigmoid().max(-1)
    best = scores.topk(count).indices
    iou = dkl.box_iou(
        dkl.box_cxcywh_to_xyxy(output.boxes[-1, 0, best]), dkl.box_cxcywh_to_xyxy(targets.boxes[0, targets.mask[0]])
    )
    hits = (iou >= 0.5) & (labels[best, None] == targets.labels[0, targets.mask[0]])
    for query, hit in zip(best.tolist(), hits.any(1).tolist(), strict=True):
        draw_box(axes, output.boxes[-1, 0, query], "#3fb950" if hit else "#ff7b72", "-" if hit else (0, (3, 2)))
        x, y = (output.boxes[-1, 0, query, :2] - output.boxes[-1, 0, query, 2:] / 2).tolist()
        axes.text(
            x,
            max(y - 0.01, 0.05),
            CLASSES[labels[query]],
            color="white",
            fontsize=7.5,
            va="bottom",
            clip_on=True,
            bbox={"boxstyle": "round,pad=0.12", "fc": "#1a7f37" if hit else "#cf222e", "ec": "none", "alpha": 0.9},
        )
    axes.set_title(f"{title}\n{int(hits.any(0).sum())} of {count} objects found", fontsize=11, color=INK)


def draw_matching(
    axes: Axes, image: Tensor, student: dkl.DetectorOutput, teacher: dkl.DetectorOutput, targets: dkl.Targets
) -> None:
    """Connect the teacher's queries that found an object to the student queries that learn from them."""
    positive = dkl.match_targets(teacher.logits, teacher.boxes, *targets) >= 0
    assignment = dkl.match_teacher(
        student.logits, student.boxes, teacher.logits, teacher.boxes, teacher_positive=positive
    )
    plot_matching(image, student, teacher, assignment, teacher_positive=positive, class_names=CLASSES, ax=axes)
    axes.set_title("Hungarian matching:\nwhich student query learns from which of the teacher", fontsize=11, color=INK)


def draw_mask(axes: Axes, image: Tensor, teacher: dkl.DetectorOutput, targets: dkl.Targets) -> None:
    """Lay the weights of the feature loss over the image."""
    assignment = dkl.match_targets(teacher.logits, teacher.boxes, *targets)
    quality = dkl.query_quality(teacher.logits, teacher.boxes, *targets, assignment, variant="paper")
    masks = dkl.target_aware_mask(teacher.features, teacher.queries, quality, variant="paper", normalize="max")
    plot_mask(image, masks[:, 0].mean(0), boxes=targets.boxes[0, targets.mask[0]], ax=axes)
    axes.set_title("Target-aware mask:\nthe weight of each feature", fontsize=11, color=INK)


def draw_box(axes: Axes, box: Tensor, colour: str, line: str | tuple[int, tuple[int, int]] = "-") -> None:
    """Outline a cxcywh box."""
    x, y, width, height = box.tolist()
    rectangle = Rectangle((x - width / 2, y - height / 2), width, height, fill=False, ec=colour, ls=line, lw=2)
    axes.add_patch(rectangle)
