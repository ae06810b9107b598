"""Box distributions of heads of D-FINE's kind: the teacher's in the bins of the student, and their divergence."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from .autodiff import Scalar, log_softmax

__all__ = ["box_distribution_loss", "rebin_box_distribution"]


def _rebin_edge(
    mass: Sequence[float], edge: int, references: tuple[np.ndarray, np.ndarray], grids: tuple, scales: tuple
) -> list[float]:
    """Return what of the `mass` of each teacher bin of one edge goes to each student bin."""
    (teacher, student), (teacher_bins, student_bins), (teacher_scale, student_scale) = references, grids, scales
    axis, side = edge % 2, -1.0 if edge < 2 else 1.0
    result = [0.0] * len(student_bins)
    for share, offset in zip(mass, teacher_bins, strict=True):
        place = teacher[axis] + side * (teacher_scale / 2.0 + offset) * teacher[axis + 2] / teacher_scale
        here = side * (place - student[axis]) * student_scale / student[axis + 2] - student_scale / 2.0
        here = min(max(here, student_bins[0]), student_bins[-1])
        above = next(k for k, bound in enumerate(student_bins) if bound >= here)
        if above == 0:
            result[0] += share
            continue
        part = (here - student_bins[above - 1]) / (student_bins[above] - student_bins[above - 1])
        result[above - 1] += share * (1.0 - part)
        result[above] += share * part
    return result


def rebin_box_distribution(
    probabilities: np.ndarray,
    teacher_reference: np.ndarray,
    student_reference: np.ndarray,
    *,
    teacher_bins: np.ndarray,
    student_bins: np.ndarray,
    teacher_scale: float,
    student_scale: float,
) -> np.ndarray:
    """Return (..., 4, R_S + 1): the mass of each teacher bin, split between the student bins beside its place."""
    result = np.zeros((*probabilities.shape[:-1], len(student_bins)))
    for index in np.ndindex(*teacher_reference.shape[:-1]):
        references = teacher_reference[index], student_reference[index]
        for edge in range(4):
            result[index][edge] = _rebin_edge(
                probabilities[index][edge],
                edge,
                references,
                (teacher_bins, student_bins),
                (float(teacher_scale), float(student_scale)),
            )
    return result


def _divergence(z_s: np.ndarray, z_t: np.ndarray, references: tuple, grids: tuple, scales: tuple, t: float) -> Scalar:
    """Return the sum over edges of KL(rebinned teacher || student) of one pair."""
    teacher_bins, student_bins = grids
    total: Scalar = 0.0
    for edge in range(4):
        log_p, log_q = (
            log_softmax([z / t for z in logits[edge * len(bins) : (edge + 1) * len(bins)]])
            for logits, bins in ((z_t, teacher_bins), (z_s, student_bins))
        )
        target = _rebin_edge([math.exp(x) for x in log_p], edge, references, grids, scales)
        total += sum(p * (math.log(p) - q) for p, q in zip(target, log_q, strict=True) if p > 0.0)
    return total


def box_distribution_loss(
    student_distributions: np.ndarray,
    student_references: np.ndarray,
    teacher_distributions: np.ndarray,
    teacher_references: np.ndarray,
    assignment: np.ndarray,
    *,
    student_bins: np.ndarray,
    student_scale: float,
    teacher_bins: np.ndarray | None = None,
    teacher_scale: float | None = None,
    teacher_weight: np.ndarray | None = None,
    temperature: float = 1.0,
) -> Scalar:
    """Return sum over layers of sum over pairs of w T^2 / 4 sum over edges of KL / sum of w."""
    bins = student_bins if teacher_bins is None else teacher_bins, student_bins
    scales = float(student_scale if teacher_scale is None else teacher_scale), float(student_scale)
    total: Scalar = 0.0
    lead = assignment.shape[:-1]
    for stage in np.ndindex(*lead[:-1]):
        loss: Scalar = 0.0
        weights = 0.0
        for image, n in np.ndindex(*assignment.shape[-2:]):
            at, m = (*stage, image), assignment[(*stage, image, n)]
            if m < 0:
                continue
            w = 1.0
            if teacher_weight is not None:
                w = teacher_weight[(*at[-(teacher_weight.ndim - 1) :], m)]
            if w == 0.0:
                continue
            weights += w
            references = teacher_references[(*at, m)], student_references[(*at, n)]
            pair = student_distributions[(*at, n)], teacher_distributions[(*at, m)]
            loss += w * temperature**2 / 4.0 * _divergence(*pair, references, bins, scales, temperature)
        total += loss / weights if weights > 0.0 else loss
    return total
