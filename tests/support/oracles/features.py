"""Target-aware feature distillation (Eq. 6-9): query quality, weight map and loss."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .autodiff import Scalar, log, sigmoid, softmax, sqrt
from .geometry import box_iou, over_images

__all__ = [
    "class_scores",
    "cosine",
    "official_feature_loss",
    "query_quality",
    "target_aware_feature_loss",
    "target_aware_mask",
]


Levels = np.ndarray | Sequence[np.ndarray]


def class_scores(logits: Sequence[float], activation: str) -> list[float]:
    """Return one query's scores of the C classes, without a softmax head's no-object channel, the last."""
    return [sigmoid(z) for z in logits] if activation == "sigmoid" else softmax(logits)[:-1]


def cosine(a: Sequence[float], b: Sequence[float]) -> float:
    """Return <a, b> / (|a| |b|), psi of Eq. 7; 0 for a zero vector."""
    norms = sqrt(sum(x * x for x in a)) * sqrt(sum(x * x for x in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / norms if norms else 0.0


@over_images("(m,c),(m,k),(t),(t,k),(t),(m)->(m)")
def query_quality(
    teacher_logits: np.ndarray,
    teacher_boxes: np.ndarray,
    target_labels: np.ndarray,
    target_boxes: np.ndarray,
    target_mask: np.ndarray,
    teacher_assignment: np.ndarray,
    *,
    gamma: float = 0.5,
    activation: str = "sigmoid",
    variant: str = "paper",
    topk: int = 100,
) -> np.ndarray:
    """Return the quality q (..., M) of the teacher's queries.

    paper (Eq. 8): q = c^gamma * IoU^(1-gamma) with c the score of the matched target's class; 0 unmatched.
    official: (sum of the query's scores among the image's topk) * (best IoU over the targets, 1 without any).
    """
    scores = [class_scores(logits, activation) for logits in teacher_logits]
    quality = np.zeros(len(scores))
    if variant == "paper":
        for m, t in enumerate(teacher_assignment):
            if t != -1:
                c, iou = scores[m][target_labels[t]], box_iou(teacher_boxes[m], target_boxes[t])
                quality[m] = c**gamma * iou ** (1.0 - gamma)
        return quality
    ranked = sorted(((score, m) for m, row in enumerate(scores) for score in row), reverse=True)
    for score, m in ranked[:topk]:
        quality[m] += score * _best_iou(teacher_boxes[m], target_boxes[target_mask])
    return quality


def _best_iou(box: np.ndarray, target_boxes: np.ndarray) -> float:
    return max((box_iou(box, target) for target in target_boxes), default=1.0)


@over_images("(d,h,w),(m,d),(m),(h,w)->(h,w)")
def _mask_of_image(
    features: np.ndarray,
    queries: np.ndarray,
    quality: np.ndarray,
    valid: np.ndarray,
    *,
    variant: str,
    normalize: str | None,
) -> np.ndarray:
    weight = np.zeros(valid.shape)
    for y, x in zip(*np.nonzero(valid), strict=True):
        psi = [cosine(query, features[:, y, x]) for query in queries]
        if variant == "paper":
            weight[y, x] = sum(q * psi_m**2 for q, psi_m in zip(quality, psi, strict=True))
        else:
            weight[y, x] = max(sum(q * psi_m for q, psi_m in zip(quality, psi, strict=True)), 0.01)
    normalize = normalize or {"paper": "queries", "official": "max"}[variant]
    cells = weight[valid]
    divisor = {
        "queries": len(queries),
        "max": max(cells, default=0.0),
        "mean": sum(cells) / max(len(cells), 1),
    }[normalize]
    return weight / divisor if divisor else weight


def target_aware_mask(
    features: np.ndarray,
    queries: np.ndarray,
    quality: np.ndarray,
    *,
    variant: str = "paper",
    normalize: str | None = None,
    padding_mask: np.ndarray | None = None,
) -> np.ndarray:
    """Return the normalised weight map (B, H, W) of the teacher's features, 0 on padded cells (mask False).

    paper (Eq. 7 and 9): w(p) = sum_m q_m psi_m(p)^2. official: s(p) = max(sum_m q_m psi_m(p), 0.01).
    normalize: "queries" divides by M, "max" and "mean" by that of the image's valid cells.
    """
    if padding_mask is None:
        padding_mask = np.ones((features.shape[0], *features.shape[2:]), dtype=bool)
    return _mask_of_image(features, queries, quality, padding_mask, variant=variant, normalize=normalize)


def _weighted_squares(student: np.ndarray, teacher: np.ndarray, weight: np.ndarray, valid: np.ndarray) -> Scalar:
    """Return sum_p weight(p) |F_T(p) - F_S(p)|^2 over the valid cells of one image."""
    total: Scalar = 0.0
    for y, x in zip(*np.nonzero(valid), strict=True):
        squares = [(t - s) ** 2 for s, t in zip(student[:, y, x], teacher[:, y, x], strict=True)]
        total += weight[y, x] * sum(squares)
    return total


def target_aware_feature_loss(
    student_features: Levels,
    teacher_features: Levels,
    teacher_queries: np.ndarray,
    quality: np.ndarray,
    *,
    variant: str = "paper",
    normalize: str | None = None,
    relative: bool = False,
    padding_mask: Levels | None = None,
) -> Scalar:
    """Return the feature distillation loss of Eq. 9, summed over levels (B, D, H, W) and stages of queries.

    The square is weighted by the paper's w, or by the square of the official s. Relative: of each image log2(1 + r),
    with r the sum over stages over that of a student whose features are 0 (0 where that is 0), a mean over images and
    levels.
    """
    if isinstance(student_features, np.ndarray):
        student_features, teacher_features = [student_features], [teacher_features]
        padding_mask = None if padding_mask is None else [padding_mask]
    if teacher_queries.ndim == 3:
        teacher_queries, quality = teacher_queries[None], quality[None]
    total: Scalar = 0.0
    for level, (student, teacher) in enumerate(zip(student_features, teacher_features, strict=True)):
        cells = (student.shape[0], *student.shape[2:])
        valid = np.ones(cells, dtype=bool) if padding_mask is None else padding_mask[level]
        weights = []
        for queries, q in zip(teacher_queries, quality, strict=True):
            mask = target_aware_mask(teacher, queries, q, variant=variant, normalize=normalize, padding_mask=valid)
            weights.append(mask if variant == "paper" else mask**2)
        weight = sum(weights, np.zeros(cells))
        for image in range(len(teacher)):
            one = teacher[image], weight[image], valid[image]
            error = _weighted_squares(student[image], *one)
            if not relative:
                total += error / (teacher.shape[1] * max(valid.sum(), 1))
            elif (nothing := _weighted_squares(np.zeros_like(teacher[image]), *one)) > 0:
                total += log(1.0 + error / nothing) / np.log(2.0) / (len(teacher) * len(student_features))
    return total


def official_feature_loss(
    student_features: Sequence[np.ndarray],
    teacher_features: Sequence[np.ndarray],
    teacher_queries: np.ndarray,
    teacher_logits: np.ndarray,
    teacher_boxes: np.ndarray,
    target_boxes: np.ndarray,
    target_mask: np.ndarray,
    *,
    topk: int = 100,
) -> Scalar:
    """Return the public code's feature loss: queries (L, B, M, D) and sigmoid logits, levels (B, D, H, W).

    Of each image, the topk (query, class) pairs by score, q = score * best IoU over the targets (score alone
    without targets), give s(p) = max(sum_i q_i psi_i(p), 0.01), divided by its maximum over p. The loss is
    the mean over (B, D, H, W) of (s (F_T - F_S))^2, summed over levels and stages.
    """
    total: Scalar = 0.0
    num_stages, num_images, num_queries, _ = teacher_queries.shape
    for stage in range(num_stages):
        for student, teacher in zip(student_features, teacher_features, strict=True):
            _, channels, height, width = teacher.shape
            for b in range(num_images):
                candidates = []
                for m in range(num_queries):
                    iou = _best_iou(teacher_boxes[stage, b, m], target_boxes[b][target_mask[b]])
                    candidates += [(sigmoid(z), m, iou) for z in teacher_logits[stage, b, m]]
                chosen = sorted(candidates, reverse=True)[:topk]
                s = np.empty((height, width))
                for y, x in np.ndindex(height, width):
                    f = teacher[b, :, y, x]
                    similarity = sum(score * iou * cosine(teacher_queries[stage, b, m], f) for score, m, iou in chosen)
                    s[y, x] = max(similarity, 0.01)
                s = s / s.max()
                for d, y, x in np.ndindex(channels, height, width):
                    difference = s[y, x] * (teacher[b, d, y, x] - student[b, d, y, x])
                    total += difference**2 / (num_images * channels * height * width)
    return total
