"""The term of box distributions."""

from __future__ import annotations

from torch import Tensor

from detr_kd_losses._options import Rules
from detr_kd_losses.losses.box_distributions.loss import RULES, box_distribution_loss
from detr_kd_losses.outputs import BoxDistributions
from detr_kd_losses.paired_term import Matching, Negatives, PairedTerm, Weighting
from detr_kd_losses.stages import StageMap
from detr_kd_losses.step import Step

__all__ = ["BoxDistributionTerm"]

_RULES: Rules = {**PairedTerm.rules, **RULES}


class BoxDistributionTerm(PairedTerm):
    """Where heads of D-FINE's kind expect the edges of a box: a matching, then :func:`box_distribution_loss`.

    It needs ``distributions`` of both, which may have other references, bins and scales, and does not apply without.
    ``loss_kd_box_distribution``.

    Args:
        weight: Weight of the term.
        prefix: Where its name begins.
        matching: ``"targets"``: a student query learns from the teacher query of its own target, whose edges are those
            of the same object; or as in :class:`LogitsTerm`.
        negatives: What becomes of the teacher queries without a target, as in :class:`LogitsTerm`.
        weighting: How much a teacher query counts, as in :class:`LogitsTerm`: by ``"localization"``, as D-FINE weighs
            its own last layer where it teaches the others.
        cost_class: Weight of the class in the matching cost.
        cost_bbox: Weight of the L1 distance in the matching cost.
        cost_giou: Weight of the negative GIoU in the matching cost.
        backend: Solver of the matching, by name (:func:`linear_sum_assignment`).
        stage_map: Which teacher layer teaches which student layer (:func:`select_stages`).
        temperature: Divisor of both distributions; D-FINE's is 5.
        sync_normalizer: Whether the sums of weights are averaged over replicas.

    Examples:
        >>> BoxDistributionTerm(temperature=5.0).names
        ('loss_kd_box_distribution',)

    References:
        Peng et al., "D-FINE", ICLR 2025, arXiv:2410.13842.
    """

    parts = ("box_distribution",)
    needs = ("distributions",)
    shares_counts = True
    rules = _RULES

    def __init__(
        self,
        *,
        weight: float = 1.0,
        prefix: str = "loss_kd_",
        matching: Matching = "targets",
        negatives: Negatives | None = None,
        weighting: Weighting = "localization",
        cost_class: float = 1.0,
        cost_bbox: float = 5.0,
        cost_giou: float = 2.0,
        backend: str = "auto",
        stage_map: StageMap = "even",
        temperature: float = 1.0,
        sync_normalizer: bool = True,
    ) -> None:
        super().__init__(
            weight=weight,
            prefix=prefix,
            matching=matching,
            negatives=negatives,
            weighting=weighting,
            cost_class=cost_class,
            cost_bbox=cost_bbox,
            cost_giou=cost_giou,
            backend=backend,
            stage_map=stage_map,
            temperature=temperature,
            sync_normalizer=sync_normalizer,
        )

    def compute(self, step: Step) -> dict[str, Tensor]:
        """Match student to teacher queries and distil."""
        student, teacher = (BoxDistributions(*each) for each in step.given_by_both("distributions"))
        pairing = self.pair(step)
        said = pairing.assignment, student.logits, student.references
        assignment, logits, references = self.leave_out_the_single(step, *said)
        loss = box_distribution_loss(
            logits,
            references,
            self.in_students_depth(step, teacher.logits),
            self.in_students_depth(step, teacher.references),
            assignment,
            student_bins=student.bins,
            teacher_bins=teacher.bins,
            student_scale=student.scale,
            teacher_scale=teacher.scale,
            teacher_weight=pairing.weight,
            **{name: self.call_options[name] for name in RULES},
        )
        return {"box_distribution": loss}
