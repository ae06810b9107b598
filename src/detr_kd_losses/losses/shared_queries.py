"""Distillation on queries that both decoders were given: query k teaches query k."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from detr_kd_losses._options import OptionModule, Rules, one_of, validate_options
from detr_kd_losses._validation import validate_both_predictions, validate_same_shape
from detr_kd_losses.heads import Activation, ClassMap, Heads
from detr_kd_losses.losses import logits
from detr_kd_losses.losses.logits import ClassLoss, hungarian_distillation_loss, validate_class_loss
from detr_kd_losses.pairs import validate_batched, validated_mask
from detr_kd_losses.weights import confidence_weight

__all__ = ["SharedQueryDistillationLoss", "shared_query_distillation_loss"]

SharedWeighting = Literal["confidence", "uniform"]

RULES: Rules = {
    "weighting": one_of("confidence", "uniform"),
    **{name: rule for name, rule in logits.RULES.items() if not name.startswith("weight_negative")},
}


def shared_query_distillation_loss(
    student_logits: Tensor,
    student_boxes: Tensor,
    teacher_logits: Tensor,
    teacher_boxes: Tensor,
    *,
    query_mask: Tensor | None = None,
    weighting: SharedWeighting = "confidence",
    class_loss: ClassLoss = "kl",
    student_activation: Activation = "sigmoid",
    teacher_activation: Activation = "sigmoid",
    class_map: ClassMap | None = None,
    temperature: float = 1.0,
    weight_class: float = 1.0,
    weight_bbox: float = 5.0,
    weight_giou: float = 2.0,
    sync_normalizer: bool = True,
) -> dict[str, Tensor]:
    r"""Distil class and box of each query into the same query, after it ran through both decoders.

    .. math::
        L = \sum_l \frac{1}{\sum_k w_k} \sum_k w_k \left[ w_{class} T^2 KL(p_k \| q_k)
            + w_{bbox} |b_k - b'_k|_1 + w_{giou} (1 - GIoU(b_k, b'_k)) \right]

    over the decoder layers `l` and the K queries of all images of the batch, with :math:`w_k` the confidence of the
    teacher. Nothing is matched: both models were asked the same question, and how to answer it is what the teacher
    knows better. The queries are those of the teacher, whose ordinary predictions are then the targets, or any others
    that both decoders are run on. No gradient reaches the teacher. Half-precision inputs are computed in float32.

    Args:
        student_logits: (L, B, K, C) or (B, K, C), raw.
        student_boxes: (L, B, K, 4) or (B, K, 4), cxcywh in [0, 1].
        teacher_logits: (L, B, K, C') or (B, K, C'), raw, for the same queries in the same order. For another depth
            than the student's see :func:`select_stages`.
        teacher_boxes: (L, B, K, 4) or (B, K, 4), cxcywh in [0, 1].
        query_mask: (B, K) or (L, B, K) bool, True = a query, False = padding, which has no part. None: all are queries.
        weighting: ``"confidence"``: a query counts by the teacher's highest score of a class that the student knows
            (:func:`confidence_weight`). ``"uniform"``: all count the same.
        class_loss: ``"kl"``, or for sigmoid students ``"bce"`` (:func:`hungarian_distillation_loss`).
        student_activation: ``"sigmoid"``, or ``"softmax"`` for a head with "no object" as its last channel.
        teacher_activation: Head of the teacher, ``"sigmoid"`` or ``"softmax"``.
        class_map: Student class of each teacher class, -1 = dropped. None: both have the same classes.
        temperature: T, the divisor of both logits in the class term.
        weight_class: Weight of the class term.
        weight_bbox: Weight of the L1 distance.
        weight_giou: Weight of 1 - GIoU.
        sync_normalizer: Whether the sums of weights are averaged over replicas when torch.distributed is initialised.

    Returns:
        ``{"loss_class", "loss_bbox", "loss_giou"}``, scalars, already weighted: the loss is their sum.

    Raises:
        ValueError: If shapes, devices or options do not fit.
        TypeError: If a dtype does not fit.

    Examples:
        >>> logits, boxes = torch.randn(6, 2, 5, 3), torch.rand(6, 2, 5, 4)
        >>> losses = shared_query_distillation_loss(logits, boxes, logits, boxes)
        >>> sorted(losses), round(abs(sum(losses.values()).item()), 4)
        (['loss_bbox', 'loss_class', 'loss_giou'], 0.0)

    References:
        Wang et al., "KD-DETR: Knowledge Distillation for Detection Transformer with Consistent Distillation Points
        Sampling", CVPR 2024, arXiv:2211.08071.
    """
    validate_both_predictions(student_logits, student_boxes, teacher_logits, teacher_boxes, leading="(L, B)")
    validate_batched("student_logits", student_logits)
    queries = student_logits.shape[:-1]
    validate_same_shape("student_logits", queries, "teacher_logits", teacher_logits.shape[:-1], "(L, B, K)")
    validate_options(RULES, weighting=weighting)
    heads = Heads(student_activation, teacher_activation, class_map)
    validate_class_loss(class_loss, heads)
    itself = torch.arange(queries[-1], device=student_logits.device).expand(queries)
    if query_mask is not None:
        itself = itself.where(validated_mask("query_mask", query_mask, "student_logits", student_logits), -1)
    return hungarian_distillation_loss(
        student_logits,
        student_boxes,
        teacher_logits,
        teacher_boxes,
        itself,
        teacher_weight=_confidence(teacher_logits, student_logits, heads) if weighting == "confidence" else None,
        class_loss=class_loss,
        **heads.options,
        temperature=temperature,
        weight_class=weight_class,
        weight_bbox=weight_bbox,
        weight_giou=weight_giou,
        sync_normalizer=sync_normalizer,
    )


def _confidence(teacher_logits: Tensor, student_logits: Tensor, heads: Heads) -> Tensor:
    """The teacher's highest score (L, B, K) of a class that the student has; 0 where they have none in common."""
    teacher_in_common = heads.in_student_classes(teacher_logits.detach(), student_logits)
    confidence = confidence_weight(teacher_in_common, activation=heads.teacher)
    known = heads.known_classes(teacher_logits, student_logits)
    return confidence if known is None else confidence.where(known.any(), 0.0)


class SharedQueryDistillationLoss(OptionModule):
    """Module form of :func:`shared_query_distillation_loss`, with the same options and defaults.

    Examples:
        >>> loss = SharedQueryDistillationLoss(weighting="uniform")
        >>> logits, boxes = torch.randn(2, 5, 3), torch.rand(2, 5, 4)
        >>> sorted(loss(logits, boxes, logits, boxes))
        ['loss_bbox', 'loss_class', 'loss_giou']
    """

    rules = RULES

    def __init__(
        self,
        *,
        weighting: SharedWeighting = "confidence",
        class_loss: ClassLoss = "kl",
        student_activation: Activation = "sigmoid",
        teacher_activation: Activation = "sigmoid",
        class_map: ClassMap | None = None,
        temperature: float = 1.0,
        weight_class: float = 1.0,
        weight_bbox: float = 5.0,
        weight_giou: float = 2.0,
        sync_normalizer: bool = True,
    ) -> None:
        super().__init__(
            weighting=weighting,
            class_loss=class_loss,
            student_activation=student_activation,
            teacher_activation=teacher_activation,
            class_map=class_map,
            temperature=temperature,
            weight_class=weight_class,
            weight_bbox=weight_bbox,
            weight_giou=weight_giou,
            sync_normalizer=sync_normalizer,
        )
        validate_class_loss(class_loss, Heads(student_activation, teacher_activation))

    def forward(
        self,
        student_logits: Tensor,
        student_boxes: Tensor,
        teacher_logits: Tensor,
        teacher_boxes: Tensor,
        *,
        query_mask: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """See :func:`shared_query_distillation_loss`."""
        predictions = student_logits, student_boxes, teacher_logits, teacher_boxes
        return shared_query_distillation_loss(*predictions, query_mask=query_mask, **self.call_options)
