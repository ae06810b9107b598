"""Distillation of box distributions: where a head of D-FINE's kind expects each edge of a box, bin by bin."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from detr_kd_losses._blocks import recompute_queries
from detr_kd_losses._options import OptionModule, Rules, boolean, validate_options
from detr_kd_losses._precision import shared_dtype
from detr_kd_losses._validation import (
    validate_boxes,
    validate_floating,
    validate_positive,
    validate_same_device,
    validate_same_shape,
)
from detr_kd_losses.losses.box_distributions.bins import Bins, Grid, Scale, grid_of, rebin
from detr_kd_losses.pairs import (
    gather_partners,
    mean_over_pairs,
    validate_assignment,
    validate_batched,
    validate_teacher_weight,
    weigh_pairs,
)

__all__ = ["BoxDistributionLoss", "box_distribution_loss"]

RULES: Rules = {"temperature": validate_positive, "sync_normalizer": boolean}


def box_distribution_loss(
    student_distributions: Tensor,
    student_references: Tensor,
    teacher_distributions: Tensor,
    teacher_references: Tensor,
    assignment: Tensor,
    *,
    student_bins: Bins,
    teacher_bins: Bins | None = None,
    student_scale: Scale,
    teacher_scale: Scale | None = None,
    teacher_weight: Tensor | None = None,
    temperature: float = 1.0,
    sync_normalizer: bool = True,
) -> Tensor:
    r"""Distil where a head of D-FINE's kind expects the edges of a box into the student query matched to it.

    .. math::
        L = \sum_l \frac{1}{\sum w_m} \sum_{(n,m)} w_m \frac{T^2}{4} \sum_e KL(\hat p_{me} \| q_{ne})

    over the decoder layers `l`, their pairs and the four edges `e`, with `q` the softmax of the student's
    distributions / T and :math:`\hat p` that of the teacher's in the student's bins (:func:`rebin_box_distribution`).
    Student queries without a partner have no part. A layer is normalised over its batch, then layers are added; a layer
    without pairs gives zero with a graph. No gradient reaches teacher, references, bins and scales. Half-precision
    inputs are computed in float32.

    Args:
        student_distributions: (L, B, N, 4 (R_S + 1)) or (B, N, 4 (R_S + 1)), raw, edges left, top, right, bottom.
        student_references: (L, B, N, 4) or (B, N, 4), cxcywh: the boxes that they are about, before they are refined.
        teacher_distributions: (L, B, M, 4 (R_T + 1)) or (B, M, 4 (R_T + 1)), raw.
        teacher_references: (L, B, M, 4) or (B, M, 4), cxcywh.
        assignment: (L, B, N) or (B, N) int64: the teacher query of each student query, -1 = none.
        student_bins: (R_S + 1,), ascending. A tensor, or numbers, which a GPU has to be sent.
        teacher_bins: (R_T + 1,), ascending. None: the student's.
        student_scale: A number, or a tensor of one number.
        teacher_scale: A number, or a tensor of one number. None: the student's.
        teacher_weight: (L, B, M) or (B, M), not negative: how much each teacher query counts, such as its
            :func:`localization_weight`. None: all the same.
        temperature: T, the divisor of both distributions.
        sync_normalizer: Whether the numbers of pairs, or the sums of their weights, are averaged over replicas when
            torch.distributed is initialised and gradients are enabled.

    Returns:
        A scalar.

    Raises:
        ValueError: If shapes, devices or options do not fit, or numbers do not ascend.
        TypeError: If a dtype does not fit.

    Examples:
        >>> distributions, references = torch.randn(6, 2, 5, 4 * 3), torch.rand(6, 2, 5, 4)
        >>> assignment = torch.arange(5).expand(6, 2, 5)
        >>> predicted = distributions, references
        >>> box_distribution_loss(*predicted, *predicted, assignment, student_bins=[-2, 0, 2], student_scale=4.0)
        tensor(0.)

    References:
        Peng et al., "D-FINE", ICLR 2025, arXiv:2410.13842.
        Zheng et al., "Localization Distillation for Dense Object Detection", CVPR 2022, arXiv:2102.12252.
    """
    validate_options(RULES, temperature=temperature, sync_normalizer=sync_normalizer)
    _validate_both(student_distributions, student_references, teacher_distributions, teacher_references)
    queries = teacher_distributions.shape[-2]
    validate_assignment("assignment", assignment, "student_distributions", student_distributions, queries)
    validate_teacher_weight(teacher_weight, "teacher_distributions", teacher_distributions)
    dtype = shared_dtype(student_distributions, student_references, teacher_distributions, teacher_references)
    student_grid = grid_of("student_", student_bins, student_scale, student_distributions, dtype)
    teacher_grid = grid_of(
        "teacher_",
        student_bins if teacher_bins is None else teacher_bins,
        student_scale if teacher_scale is None else teacher_scale,
        teacher_distributions,
        dtype,
    )
    assignment, weight = weigh_pairs(assignment, teacher_weight, dtype)
    compare = partial(_compare, student_grid=student_grid, teacher_grid=teacher_grid, temperature=temperature)
    students = student_distributions, student_references.detach()
    teachers = teacher_distributions.detach(), teacher_references.detach()
    divergence = recompute_queries(compare, assignment, students, teachers) * (temperature**2 / 4)
    return mean_over_pairs(divergence, assignment >= 0, weight, sync=sync_normalizer)


def _compare(
    assignment: Tensor,
    student_distributions: Tensor,
    student_references: Tensor,
    teacher_distributions: Tensor,
    teacher_references: Tensor,
    *,
    student_grid: Grid,
    teacher_grid: Grid,
    temperature: float,
) -> Tensor:
    """The divergence of each student query (..., N) from its partner, edges added."""
    matched = assignment >= 0
    with torch.no_grad():
        distributions = gather_partners(teacher_distributions, assignment)
        shares = _log_shares(distributions, matched, teacher_grid, temperature).exp_()
        teacher, student = (
            references.where(matched.unsqueeze(-1), 0.0).to(shares.dtype)
            for references in (gather_partners(teacher_references, assignment), student_references)
        )
        target = rebin(shares, teacher, student, teacher_grid, student_grid)
    log_q = _log_shares(student_distributions, matched, student_grid, temperature)
    # The gradient is that of the cross-entropy: the divergence is 0 as its own is only to rounding.
    finite = log_q.clamp(min=torch.finfo(log_q.dtype).min)
    cross_entropy = -(target * finite).sum((-2, -1))
    return _divergence(target, log_q.detach()) + (cross_entropy - cross_entropy.detach())


def _validate_both(
    student_distributions: Tensor, student_references: Tensor, teacher_distributions: Tensor, teacher_references: Tensor
) -> None:
    """Raise unless the distributions (..., N, 4 (R + 1)) and references (..., N, 4) of both belong together."""
    predictions = {
        "student_": (student_distributions, student_references),
        "teacher_": (teacher_distributions, teacher_references),
    }
    for prefix, (distributions, references) in predictions.items():
        name = f"{prefix}distributions"
        validate_floating(name, distributions)
        validate_batched(name, distributions, "4 (R + 1)")
        validate_boxes(f"{prefix}references", references)
        validate_same_shape(name, distributions.shape[:-1], f"{prefix}references", references.shape[:-1], "(..., N)")
        validate_same_device(name, distributions, **{f"{prefix}references": references})
    batch = student_distributions.shape[:-2]
    validate_same_shape(
        "student_distributions", batch, "teacher_distributions", teacher_distributions.shape[:-2], "(L, B)"
    )
    validate_same_device("student_distributions", student_distributions, teacher_distributions=teacher_distributions)


def _log_shares(distributions: Tensor, matched: Tensor, grid: Grid, temperature: float) -> Tensor:
    """Log-softmax of each edge, (..., 4 (R + 1)) -> (..., 4, R + 1)."""
    # Unmatched queries are blanked before anything is computed, so that nothing in them reaches a gradient.
    logits = distributions.where(matched.unsqueeze(-1), 0.0).to(grid[0].dtype) / temperature
    return logits.reshape(*matched.shape, 4, len(grid[0])).log_softmax(-1)


def _divergence(target: Tensor, log_q: Tensor) -> Tensor:
    """KL(target || q), edges added, (..., 4, R + 1) -> (...)."""
    # Where both are the same so are their logarithms, rounded once: the difference is exactly 0.
    log_p = torch.where(target == log_q.exp(), log_q, target.log())
    # What the teacher excludes, 0 log 0, is 0.
    return torch.where(target == 0, 0.0, target * (log_p - log_q)).sum((-2, -1))


class BoxDistributionLoss(OptionModule):
    """Module form of :func:`box_distribution_loss`, with the same options and defaults.

    Bins and scales are facts about two models, and given with their distributions.

    Examples:
        >>> loss = BoxDistributionLoss(temperature=5.0)
        >>> predicted = torch.randn(2, 5, 4 * 3), torch.rand(2, 5, 4)
        >>> assignment = torch.arange(5).expand(2, 5)
        >>> loss(*predicted, *predicted, assignment, student_bins=torch.tensor([-2.0, 0.0, 2.0]), student_scale=4.0)
        tensor(0.)
    """

    rules = RULES

    def __init__(self, *, temperature: float = 1.0, sync_normalizer: bool = True) -> None:
        super().__init__(temperature=temperature, sync_normalizer=sync_normalizer)

    def forward(
        self,
        student_distributions: Tensor,
        student_references: Tensor,
        teacher_distributions: Tensor,
        teacher_references: Tensor,
        assignment: Tensor,
        *,
        student_bins: Bins,
        teacher_bins: Bins | None = None,
        student_scale: Scale,
        teacher_scale: Scale | None = None,
        teacher_weight: Tensor | None = None,
    ) -> Tensor:
        """See :func:`box_distribution_loss`."""
        return box_distribution_loss(
            student_distributions,
            student_references,
            teacher_distributions,
            teacher_references,
            assignment,
            student_bins=student_bins,
            teacher_bins=teacher_bins,
            student_scale=student_scale,
            teacher_scale=teacher_scale,
            teacher_weight=teacher_weight,
            **self.call_options,
        )
