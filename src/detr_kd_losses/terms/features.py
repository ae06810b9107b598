"""The term of features, weighted by where good teacher queries look."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from detr_kd_losses._options import Rules
from detr_kd_losses._validation import validate_same_shape
from detr_kd_losses.losses.features.loss import RULES, target_aware_feature_loss
from detr_kd_losses.losses.features.mask import Normalize, resolve_normalize
from detr_kd_losses.losses.features.projection import (
    FeatureProjection,
)
from detr_kd_losses.losses.features.quality import QUALITY_RULES, Variant, query_quality
from detr_kd_losses.pairs import gather_partners, invert_assignment
from detr_kd_losses.step import Step
from detr_kd_losses.term import Term

__all__ = ["FeatureTerm"]

_RULES: Rules = {**Term.rules, **QUALITY_RULES, **RULES}


class FeatureTerm(Term):
    """Features where good teacher queries look: :func:`query_quality`, then :func:`target_aware_feature_loss`.

    The queries of all teacher layers say where. It needs ``features`` of both and ``queries`` of the teacher, and does
    not apply without features. ``loss_kd_feature``.

    Args:
        student_channels: Channels of the student's feature map, or one number per level, where they differ from the
            teacher's: the learned projection is part of this Module (:class:`FeatureProjection`).
        teacher_channels: Channels of the teacher's feature map, or one number per level.
        weight: Weight of the term.
        prefix: Where its name begins.
        variant: ``"paper"``: quality times squared similarity. ``"official"``, as the paper's public code: the square
            of the mask of the top-scored queries.
        normalize: What the mask of an image is divided by (:func:`target_aware_mask`). With ``"max"`` every image
            counts; None is the variant's own, for ``"paper"`` the 1 / M of Eq. 9.
        relative: Whether the error is measured by that of features of 0 (:func:`target_aware_feature_loss`): a number
            of the order of 1, whatever the scale of the features and the number of levels and teacher layers. False,
            with ``normalize=None``, is the sum of Eq. 9, or of the public code.
        gamma: Balance of score and IoU in the quality of ``"paper"``.
        topk: Number of scores that count in the quality of ``"official"``.
        sync_normalizer: Whether the number of images, or of valid cells, is averaged over replicas.

    Examples:
        >>> FeatureTerm([64, 128], [256, 256]).names
        ('loss_kd_feature',)

    References:
        Chang et al., "DETRDistill", ICCV 2023, arXiv:2211.10156, Eq. 6-9.
    """

    parts = ("feature",)
    needs = ("features",)
    shares_counts = True
    rules = _RULES

    def __init__(
        self,
        student_channels: int | Sequence[int] | None = None,
        teacher_channels: int | Sequence[int] | None = None,
        *,
        weight: float = 10.0,
        prefix: str = "loss_kd_",
        variant: Variant = "paper",
        normalize: Normalize | None = "max",
        relative: bool = True,
        gamma: float = 0.5,
        topk: int = 100,
        sync_normalizer: bool = True,
    ) -> None:
        super().__init__(
            weight=weight,
            prefix=prefix,
            variant=variant,
            normalize=normalize,
            relative=relative,
            gamma=gamma,
            topk=topk,
            sync_normalizer=sync_normalizer,
        )
        self.projections = FeatureProjection(student_channels, teacher_channels)

    def compute(self, step: Step) -> dict[str, Tensor]:
        """Weigh cells by the queries of all teacher layers, and compare the features."""
        students, teachers, own, mask = step.features()
        teacher, assignment = step.teacher, step.teacher_assignment
        if teacher.queries is None:
            msg = (
                "`teacher.queries` must be given for the feature loss "
                "(or set the weight of the feature term to 0), got None"
            )
            raise ValueError(msg)
        validate_same_shape(
            "teacher.queries", teacher.queries.shape[:-1], "teacher.logits", teacher.logits.shape[:-1], "(L, B, M)"
        )
        quality = query_quality(
            step.teacher_logits,
            teacher.boxes,
            *step.known_targets,
            assignment,
            gamma=self.gamma,
            activation=step.heads.teacher,
            variant=self.variant,
            topk=self.topk,
        )
        queries, query_mask = teacher.queries, teacher.query_mask
        if self.variant == "paper" and resolve_normalize(self.variant, self.normalize) != "queries":
            # Only queries with a target have quality: no more than T of M, and nothing here depends on M.
            query = invert_assignment(assignment, step.known_targets.mask.shape[-1])
            queries = gather_partners(queries, query)
            quality, query_mask = gather_partners(quality, query).where(query >= 0, 0.0), None
        loss = target_aware_feature_loss(
            self.projections(students, teachers, own),
            teachers,
            queries,
            quality,
            padding_mask=mask,
            query_mask=query_mask,
            **{name: self.call_options[name] for name in RULES},
        )
        return {"feature": loss}
