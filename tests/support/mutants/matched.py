"""Faults in the losses of what matched queries say beside classes and boxes."""

from __future__ import annotations

import numpy as np
import torch

import detr_kd_losses as dkl
from detr_kd_losses.losses import masks
from detr_kd_losses.losses.box_distributions import bins
from detr_kd_losses.losses.box_distributions import loss as distributions
from detr_kd_losses.paired_term import PairedTerm
from detr_kd_losses.testing.pair_makers import BINS, SCALE, make_box_distribution_arguments, make_mask_arguments

from support import cases, oracles
from support.mutants.mutant import faults, law_of, oracle
from support.steps import make_output, make_targets

SIZE = {"stages": 2, "images": 2, "students": 5, "teachers": 6}
BOXES = make_box_distribution_arguments(weighted=True, **SIZE)
GRID = {"student_bins": BINS, "student_scale": SCALE}

MASKS = make_mask_arguments(height=3, width=4, boxed=True, weighted=True, **SIZE)

mask_law = law_of(dkl.mask_distillation_loss)
mask_value = oracle("mask_distillation_loss", MASKS, temperature=3.0)
distribution_law = law_of(dkl.box_distribution_loss)
distribution_value = oracle("box_distribution_loss", BOXES, temperature=3.0, **GRID)


def distribution(name):
    return distribution_law(name, **GRID)


def other_bins(max_examples):
    """With other bins and another scale of the teacher it is its oracle."""
    case = cases.box_distributions()
    actual = dkl.box_distribution_loss(**{name: torch.tensor(array) for name, array in case.items()})
    np.testing.assert_allclose(actual, oracles.box_distribution_loss(**case), rtol=1e-9)


def other_size(max_examples):
    """With masks of another size it is its oracle."""
    case = cases.masks()
    actual = dkl.mask_distillation_loss(**{name: torch.tensor(array) for name, array in case.items()})
    np.testing.assert_allclose(actual, oracles.mask_distillation_loss(**case), rtol=1e-9)


def only_the_paired(max_examples):
    """A term that compares the queries which can have a partner has the loss of all."""
    student, teacher = (make_output(seed, 2, 7, mask_size=(3, 4)) for seed in (0, 1))
    targets = make_targets()
    own, assigned = (dkl.match_targets(said.logits, said.boxes, *targets) for said in (student, teacher))
    pairs = dkl.match_through_targets(own, assigned, targets.mask.shape[-1])
    expected = dkl.mask_distillation_loss(student.masks, teacher.masks, pairs, boxes=teacher.boxes)
    losses = dkl.DETRDistillationLoss([dkl.MaskTerm()])(student, teacher, targets)
    np.testing.assert_allclose(losses["loss_kd_mask"], expected, rtol=1e-5)


MUTANTS = [
    *faults(
        PairedTerm.leave_out_the_single,
        ("those that have no partner", "(assignment >= 0).int()", "(assignment < 0).int()", only_the_paired),
        ("one too few", "topk(most)", "topk(most - 2)", only_the_paired),
    ),
    *faults(
        dkl.mask_distillation_loss,
        ("masks without T squared", "teachers) * temperature**2", "teachers)", mask_value),
        ("weights of masks forgotten", "assignment >= 0, weight,", "assignment >= 0, None,", mask_value),
        ("masks of each replica", "weight, sync=sync_normalizer)", "weight, sync=False)", mask_law("replicas")),
    ),
    *faults(
        masks._compare,
        ("rows for columns", "touched_cells(left, right, size[1])", "touched_cells(top, bottom, size[1])", mask_value),
        ("mean over all cells", "(rows.sum(-1) * columns.sum(-1))", "(0 * rows.sum(-1) + size.numel())", mask_value),
        ("entropy stays", "(cross_entropy - entropy)", "cross_entropy", mask_law("zero_at_teacher")),
        ("what is in no box has a part", "student.where(part, 0.0)", "student", mask_value),
    ),
    *faults(masks._resize, ("corners aligned", "align_corners=False", "align_corners=True", other_size)),
    *faults(
        dkl.box_distribution_loss,
        ("box distributions without T squared", "(temperature**2 / 4)", "(1 / 4)", distribution_value),
        ("edges added, not averaged", "(temperature**2 / 4)", "temperature**2", distribution_value),
        (
            "bins of the student for those of the teacher",
            "student_scale if teacher_scale is None else teacher_scale",
            "student_scale",
            other_bins,
        ),
        (
            "weights of box distributions forgotten",
            "assignment >= 0, weight,",
            "assignment >= 0, None,",
            distribution_value,
        ),
        (
            "box distributions of each replica",
            "sync=sync_normalizer)",
            "sync=False)",
            distribution("replicas"),
        ),
    ),
    *faults(
        distributions._log_shares,
        (
            "unmatched box distributions have a part",
            "distributions.where(matched.unsqueeze(-1), 0.0).to(",
            "distributions.to(",
            distribution("unmatched_students"),
        ),
    ),
    *faults(
        distributions._divergence,
        ("0 log 0 is not a number", "target == 0, 0.0", "target < 0, 0.0", distribution("finite")),
        ("divergence turned round", "target * (log_p - log_q)", "log_q.exp() * (log_q - log_p)", distribution_value),
    ),
    *faults(
        bins.rebin,
        ("right as left", "1 if edge < 2 else -1", "1", distribution_value),
        ("top by the width", "edge % 2, 1", "0, 1", distribution_value),
        ("reference does not grow", "grown + sign * shift", "sign * shift", distribution_value),
        ("scale of the teacher forgotten", "(student_scale / teacher_scale)", "1", other_bins),
        ("empty references divide", "own_size.clamp(min=_LEAST_SIZE)", "own_size", distribution("finite")),
    ),
    *faults(
        bins._split,
        ("places beyond the bins", "places = places.clamp(bins[0], bins[last])", "places = places", distribution_value),
        ("mass to the nearer bin alone", "mass * share)", "0 * mass)", distribution("zero_at_teacher")),
        (
            "mass split the wrong way",
            "mass * (1 - share)).scatter_add(-1, below + 1, mass * share)",
            "mass * share).scatter_add(-1, below + 1, mass * (1 - share))",
            distribution_value,
        ),
    ),
]
