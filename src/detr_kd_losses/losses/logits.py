"""Hungarian-matched distillation of classes and boxes."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from detr_kd_losses._options import HEADS, WEIGHTS, OptionModule, Rules, boolean, one_of, validate_options
from detr_kd_losses._precision import shared_precision
from detr_kd_losses._reduction import masked_sum
from detr_kd_losses._validation import (
    validate_both_predictions,
    validate_not_negative,
    validate_positive,
)
from detr_kd_losses.heads import Activation, ClassMap, Heads, LogScores, log_scores
from detr_kd_losses.pairs import (
    box_terms,
    count_pairs,
    gather_partners,
    validate_assignment,
    validate_batched,
    validate_teacher_positive,
    validate_teacher_weight,
    weigh_pairs,
)

__all__ = ["HungarianDistillationLoss", "hungarian_distillation_loss"]

ClassLoss = Literal["kl", "bce"]

RULES: Rules = {
    "class_loss": one_of("kl", "bce"),
    **HEADS,
    "temperature": validate_positive,
    **WEIGHTS,
    "weight_negative": validate_not_negative,
    "weight_negative_class": validate_not_negative,
    "sync_normalizer": boolean,
}


def hungarian_distillation_loss(
    student_logits: Tensor,
    student_boxes: Tensor,
    teacher_logits: Tensor,
    teacher_boxes: Tensor,
    assignment: Tensor,
    *,
    teacher_positive: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    class_loss: ClassLoss = "kl",
    student_activation: Activation = "sigmoid",
    teacher_activation: Activation = "sigmoid",
    class_map: ClassMap | None = None,
    temperature: float = 1.0,
    weight_class: float = 1.0,
    weight_bbox: float = 5.0,
    weight_giou: float = 2.0,
    weight_negative: float = 1.0,
    weight_negative_class: float = 0.0,
    sync_normalizer: bool = True,
) -> dict[str, Tensor]:
    r"""Distil class and box of each teacher query into the student query matched to it.

    .. math::
        L = \sum_l \frac{1}{|P_l|} \sum_{(n,m) \in P_l} \left[ w_{class} T^2 KL(p_m \| q_n)
            + w_{bbox} |b_n - b_m|_1 + w_{giou} (1 - GIoU(b_n, b_m)) \right]
            + \frac{w_{neg}}{|N_l|} \sum_{(n,m) \in N_l} \left[ w_{bbox} |b_n - b_m|_1 + w_{giou} (1 - GIoU) \right]

    over the decoder layers `l`, with `P` the pairs whose teacher query is positive and `N` the others: knowledgeable
    pseudo ground truths are distilled by class and box, the rest by location only. Student queries without a partner
    have no term. A layer is normalised over its batch, then layers are added; a layer without pairs gives zero with
    a graph. No gradient reaches the teacher. Half-precision inputs are computed in float32.

    With weights `w` of the teacher queries, each mean over pairs becomes :math:`\sum w \, term / \sum w`, of positives
    and of negatives on their own. A query of weight 0 has no part, as if nothing were matched to it.

    Args:
        student_logits: (L, B, N, C) or (B, N, C), raw.
        student_boxes: (L, B, N, 4) or (B, N, 4), cxcywh in [0, 1].
        teacher_logits: (L, B, M, C') or (B, M, C'), raw. For another depth than the student's see
            :func:`select_stages`.
        teacher_boxes: (L, B, M, 4) or (B, M, 4), cxcywh in [0, 1].
        assignment: (L, B, N) or (B, N) int64: the teacher query of each student query, -1 = none; from
            :func:`match_teacher`.
        teacher_positive: (L, B, M) or (B, M) bool, True = the teacher's own matching gives the query a target. None:
            every pair counts as positive, as in the paper's public code.
        teacher_weight: (L, B, M) or (B, M), not negative: how much each teacher query counts, such as its
            :func:`confidence_weight`. None: all the same.
        class_loss: ``"kl"``, the Kullback-Leibler divergence: Bernoulli per class for a sigmoid student, categorical
            for a softmax student. ``"bce"``, for sigmoid students: the binary cross-entropy of the public code,
            which has the same gradient and does not vanish when the student equals the teacher.
        student_activation: ``"sigmoid"``, or ``"softmax"`` for a head with "no object" as its last channel.
        teacher_activation: Head of the teacher. A softmax teacher gives a sigmoid student its class probabilities; a
            sigmoid teacher gives a softmax student its scores, scaled down where they exceed 1 together, and the rest
            as "no object".
        class_map: Student class of each teacher class, -1 = dropped (see :func:`map_class_logits`). Student classes
            that the teacher does not know have no class term. None: both have the same classes.
        temperature: T, the divisor of both logits in the class term.
        weight_class: Weight of the class term.
        weight_bbox: Weight of the L1 distance.
        weight_giou: Weight of 1 - GIoU.
        weight_negative: Weight of the negative pairs' box terms.
        weight_negative_class: Weight of the negative pairs' class term, on top of `weight_class`.
        sync_normalizer: Whether the numbers of pairs, or the sums of their weights, are averaged over replicas when
            torch.distributed is initialised and gradients are enabled.

    Returns:
        ``{"loss_class", "loss_bbox", "loss_giou"}``, scalars, already weighted: the loss is their sum.

    Raises:
        ValueError: If shapes, devices or options do not fit.
        TypeError: If a dtype does not fit.

    Examples:
        >>> logits, boxes = torch.randn(6, 2, 5, 3), torch.rand(6, 2, 5, 4)
        >>> assignment = torch.arange(5).expand(6, 2, 5)
        >>> losses = hungarian_distillation_loss(logits, boxes, logits, boxes, assignment)
        >>> sorted(losses), round(abs(sum(losses.values()).item()), 4)
        (['loss_bbox', 'loss_class', 'loss_giou'], 0.0)

    References:
        Chang et al., "DETRDistill", ICCV 2023, arXiv:2211.10156, Eq. 3-5.
    """
    validate_both_predictions(student_logits, student_boxes, teacher_logits, teacher_boxes, leading="(L, B)")
    validate_batched("student_logits", student_logits)
    validate_assignment("assignment", assignment, "student_logits", student_logits, teacher_logits.shape[-2])
    heads = Heads(student_activation, teacher_activation, class_map)
    validate_options(
        RULES,
        class_loss=class_loss,
        temperature=temperature,
        weight_class=weight_class,
        weight_bbox=weight_bbox,
        weight_giou=weight_giou,
        weight_negative=weight_negative,
        weight_negative_class=weight_negative_class,
        sync_normalizer=sync_normalizer,
    )
    validate_class_loss(class_loss, heads)
    student_logits, student_boxes, teacher_logits, teacher_boxes = shared_precision(
        student_logits, student_boxes, teacher_logits, teacher_boxes
    )
    validate_teacher_weight(teacher_weight, "teacher_logits", teacher_logits)
    assignment, weight = weigh_pairs(assignment, teacher_weight, teacher_logits.dtype)
    positive, negative = _split_pairs(assignment, teacher_positive, teacher_logits)

    # Unmatched queries are blanked before anything is computed, so that nothing in them reaches a gradient.
    matched = (assignment >= 0).unsqueeze(-1)
    student_logits, student_boxes = student_logits.where(matched, 0.0), student_boxes.where(matched, 0.0)
    teacher_logits = gather_partners(teacher_logits.detach(), assignment).where(matched, 0.0)
    teacher_boxes = gather_partners(teacher_boxes.detach(), assignment).where(matched, 0.0)
    student, teacher = _log_scores(student_logits / temperature, teacher_logits / temperature, heads)
    divergence = _class_divergence(student, teacher, class_loss)
    distance, overlap = box_terms(student_boxes, teacher_boxes)
    pairs = torch.stack((positive, negative))
    counts = count_pairs(pairs, divergence.dtype, weight, sync=sync_normalizer)

    def means(term: Tensor) -> Tensor:
        """Mean over the positive and mean over the negative pairs, each summed over layers -> (2,)."""
        term = term if weight is None else weight * term
        return (masked_sum(term, pairs, 2) / counts).reshape(2, -1).sum(-1)

    classes, bboxes, gious = means(divergence) * temperature**2, means(distance), means(overlap)
    return {
        "loss_class": weight_class * (classes[0] + weight_negative_class * classes[1]),
        "loss_bbox": weight_bbox * (bboxes[0] + weight_negative * bboxes[1]),
        "loss_giou": weight_giou * (gious[0] + weight_negative * gious[1]),
    }


def validate_class_loss(class_loss: ClassLoss, heads: Heads) -> None:
    """Raise unless the class term is defined for the heads."""
    heads.validate()
    if class_loss == "bce" and heads.student == "softmax":
        msg = "`class_loss` must be 'kl' for a softmax student, got 'bce'"
        raise ValueError(msg)


def _split_pairs(assignment: Tensor, teacher_positive: Tensor | None, teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Which student queries (..., N) have a positive and which a negative partner."""
    matched = assignment >= 0
    if teacher_positive is None:
        return matched, torch.zeros_like(matched)
    validate_teacher_positive(teacher_positive, teacher_logits)
    positive = gather_partners(teacher_positive, assignment) & matched
    return positive, matched & ~positive


def _log_scores(student_logits: Tensor, teacher_logits: Tensor, heads: Heads) -> tuple[LogScores, LogScores]:
    """What student (..., N, C) and teacher (..., N, C') say in the student's head, of classes that both know."""
    teacher = heads.teacher_log_scores(teacher_logits, student_logits)
    return log_scores(heads.forget_unknown_classes(student_logits, teacher_logits), heads.student), teacher


def _class_divergence(student: LogScores, teacher: LogScores, class_loss: ClassLoss) -> Tensor:
    """Divergence of the student's class distribution from the teacher's, (..., N, C) -> (..., N)."""
    divergence = _relative_entropy(student.log_p, teacher.log_p, class_loss)
    if student.log_not_p is not None and teacher.log_not_p is not None:
        divergence = divergence + _relative_entropy(student.log_not_p, teacher.log_not_p, class_loss)
    return divergence.sum(-1)


def _relative_entropy(log_q: Tensor, log_p: Tensor, class_loss: ClassLoss) -> Tensor:
    """`p (log p - log q)`, 0 exactly where both are equal, or `-p log q`, its part with a gradient."""
    p = log_p.exp()
    # What the teacher is certain of, 0 log 0, is 0.
    return torch.where(p == 0, 0.0, p * ((log_p if class_loss == "kl" else 0.0) - log_q))


class HungarianDistillationLoss(OptionModule):
    """Module form of :func:`hungarian_distillation_loss`, with the same options and defaults.

    Examples:
        >>> loss = HungarianDistillationLoss(temperature=2.0)
        >>> logits, boxes = torch.randn(2, 5, 3), torch.rand(2, 5, 4)
        >>> sorted(loss(logits, boxes, logits, boxes, torch.arange(5).expand(2, 5)))
        ['loss_bbox', 'loss_class', 'loss_giou']
    """

    rules = RULES

    def __init__(
        self,
        *,
        class_loss: ClassLoss = "kl",
        student_activation: Activation = "sigmoid",
        teacher_activation: Activation = "sigmoid",
        class_map: ClassMap | None = None,
        temperature: float = 1.0,
        weight_class: float = 1.0,
        weight_bbox: float = 5.0,
        weight_giou: float = 2.0,
        weight_negative: float = 1.0,
        weight_negative_class: float = 0.0,
        sync_normalizer: bool = True,
    ) -> None:
        super().__init__(
            class_loss=class_loss,
            student_activation=student_activation,
            teacher_activation=teacher_activation,
            class_map=class_map,
            temperature=temperature,
            weight_class=weight_class,
            weight_bbox=weight_bbox,
            weight_giou=weight_giou,
            weight_negative=weight_negative,
            weight_negative_class=weight_negative_class,
            sync_normalizer=sync_normalizer,
        )
        validate_class_loss(class_loss, Heads(student_activation, teacher_activation))

    def forward(
        self,
        student_logits: Tensor,
        student_boxes: Tensor,
        teacher_logits: Tensor,
        teacher_boxes: Tensor,
        assignment: Tensor,
        *,
        teacher_positive: Tensor | None = None,
        teacher_weight: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """See :func:`hungarian_distillation_loss`."""
        return hungarian_distillation_loss(
            student_logits,
            student_boxes,
            teacher_logits,
            teacher_boxes,
            assignment,
            teacher_positive=teacher_positive,
            teacher_weight=teacher_weight,
            **self.call_options,
        )
