"""Deliberate faults in the package, each with the check that must notice it.

A mutant is one edit of one function. Where a law is enough, the law is the check; a fault that keeps every law (a
weight of the wrong size, a formula for another) must be noticed by the oracles, which know the numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

import detr_kd_losses as dkl
from detr_kd_losses import boxes, costs, matching, testing
from detr_kd_losses.assignment import _cpu
from detr_kd_losses.losses import _comparison, _pairs, _similarity, detection, features, logits, query_quality
from detr_kd_losses.testing.cases import (
    group_outputs,
    make_criterion_arguments,
    make_detection_arguments,
    make_distillation_arguments,
    make_feature_arguments,
)

from support import oracles


class Mutant(NamedTuple):
    """`old` becomes `new` in the source of `function`, and `check(max_examples=...)` must raise AssertionError."""

    name: str
    function: Callable
    old: str
    new: str
    check: Callable[..., None]


def faults(function, *rows):
    """Mutants of one function, from (name, old, new, check)."""
    return [Mutant(name, function, *row) for name, *row in rows]


def law(laws, name, function, **options):
    """The check by one law."""
    return partial(laws[name], partial(function, **options))


distillation = partial(law, testing.HUNGARIAN_DISTILLATION_LAWS, function=dkl.hungarian_distillation_loss)
detected = partial(law, testing.DETECTION_LAWS, function=dkl.detection_loss)
feature = partial(law, testing.FEATURE_LAWS, function=dkl.target_aware_feature_loss)
criterion = partial(law, testing.CRITERION_LAWS, function=dkl.DETRDistillationLoss())
solver = partial(law, testing.ASSIGNMENT_LAWS, function=dkl.linear_sum_assignment, backend="scipy")
targets = partial(law, testing.TARGET_MATCHING_LAWS, function=dkl.match_targets)
teacher = partial(law, testing.TEACHER_MATCHING_LAWS, function=dkl.match_teacher)

SIZE = {"stages": 2, "images": 2, "classes": 3}
DISTILLATION = make_distillation_arguments(students=5, teachers=6, split=True, **SIZE)
DETECTION = make_detection_arguments(queries=6, targets=4, at_least=2, **SIZE)
CRITERION = make_criterion_arguments(students=5, teachers=6, targets=4, **SIZE)
FEATURES = make_feature_arguments(stages=2, images=2, queries=5, channels=4, height=3, width=4, padded=True)


def oracle(name, arguments, **options):
    """The check by the values of the oracle of that name."""

    def check(max_examples):
        actual = arguments.call(getattr(dkl, name), **options)
        arrays = arguments.replaced(**{key: tensor.numpy() for key, tensor in arguments.tensors.items()})
        expected = arrays.call(getattr(oracles, name), **options)
        for key in expected if isinstance(expected, dict) else [()]:
            value, truth = (actual[key], expected[key]) if key else (actual, expected)
            np.testing.assert_allclose(value.numpy(), truth, rtol=1e-9, atol=1e-9, err_msg=str(key))

    return check


def depth(max_examples):
    """The last layer teaches the last layer."""
    teacher_stages = torch.arange(6)
    for student_stages in (1, 2, 3, 6, 7):
        assert dkl.select_stages(teacher_stages, student_stages)[-1] == 5
        assert len(dkl.select_stages(teacher_stages, student_stages)) == student_stages


distillation_value = oracle("hungarian_distillation_loss", DISTILLATION)
detection_value = oracle("detection_loss", DETECTION)
cross_entropy_value = oracle("detection_loss", DETECTION, class_loss="cross_entropy")
cost_value = oracle("detection_cost", DETECTION.without("target_mask").without("assignment"))


def group_follows_teacher(max_examples):
    """The query group learns the teacher's assignment, whatever its own predictions are."""
    student, teacher, truth = group_outputs(CRITERION.tensors)
    terms = dkl.DETRDistillationLoss(weight_logits=0, weight_feature=0)(student, teacher, truth)
    assignment = dkl.match_targets(teacher.logits, teacher.boxes, *truth)
    own = dkl.teacher_assigned_query_loss(student.group_logits, student.group_boxes, *truth, assignment)
    for name, value in own.items():
        torch.testing.assert_close(terms[name.replace("loss_", "loss_kd_group_")], value)


MUTANTS = [
    *faults(
        dkl.DETRDistillationLoss._query_group_loss,
        (
            "the group is matched afresh",
            "(logits, boxes, *targets, assignment)",
            "(logits, boxes, *targets, match_targets(logits, boxes, *targets))",
            group_follows_teacher,
        ),
    ),
    *faults(
        dkl.DETRDistillationLoss._feature_loss,
        (
            "padding of the features is forgotten",
            "padding_mask=padding_mask",
            "padding_mask=None",
            criterion("cell_padding"),
        ),
    ),
    *faults(
        logits.hungarian_distillation_loss,
        (
            "teacher logits keep their graph",
            "teacher_logits.detach()",
            "teacher_logits",
            distillation("teacher_detached"),
        ),
        ("teacher boxes keep their graph", "teacher_boxes.detach()", "teacher_boxes", distillation("teacher_detached")),
        (
            "student boxes lose their graph",
            "box_terms(student_boxes, ",
            "box_terms(student_boxes.detach(), ",
            distillation("gradients"),
        ),
        ("negatives are forgotten", "(distance), means(overlap)", "(distance) * 0, means(overlap)", distillation_value),
        (
            "unmatched queries are not blanked",
            "student_logits.where(matched, 0.0)",
            "student_logits",
            distillation("unmatched_students"),
        ),
        (
            "normaliser of all layers together",
            "/ counts)",
            "/ counts.sum(-1, keepdim=True))",
            distillation("stages_add"),
        ),
        ("normaliser of the first layer", "/ counts)", "/ counts[..., :1])", distillation("stages_add")),
        ("mean over layers", "reshape(2, -1).sum(-1)", "reshape(2, -1).mean(-1)", distillation("stages_add")),
        ("maximum over layers", "reshape(2, -1).sum(-1)", "reshape(2, -1).amax(-1)", distillation("stages_add")),
        (
            "normaliser of each image",
            "sum_last(pairs.to(divergence.dtype), 2)",
            "sum_last(pairs.to(divergence.dtype), 2) / pairs.shape[-2]",
            distillation("images_join"),
        ),
        ("normaliser of each replica", "sync=sync_normalizer", "sync=False", distillation("replicas")),
        (
            "temperature unsquared",
            "temperature**2",
            "temperature",
            oracle("hungarian_distillation_loss", DISTILLATION, temperature=3.0),
        ),
        ("weights exchanged", '"loss_bbox": weight_bbox', '"loss_bbox": weight_giou', distillation("weights_linear")),
        (
            "half precision is computed in half precision",
            "= shared_precision(\n        student_logits, student_boxes, teacher_logits, teacher_boxes\n    )",
            "= (student_logits, student_boxes, teacher_logits, teacher_boxes)",
            distillation("half_precision"),
        ),
    ),
    *faults(
        logits._split_pairs,
        (
            "negatives teach their class",
            "return positive, matched & ~positive",
            "return matched, matched & ~positive",
            distillation("negatives_by_box"),
        ),
        (
            "unmatched queries count as pairs",
            "matched = assignment >= 0",
            "matched = assignment >= -1",
            distillation("unmatched_students"),
        ),
    ),
    *faults(
        logits._class_divergence,
        (
            "divergence the wrong way round",
            "_relative_entropy(student.log_p, teacher.log_p, class_loss)",
            "_relative_entropy(teacher.log_p, student.log_p, class_loss)",
            distillation_value,
        ),
        ("half of the Bernoulli", "divergence = divergence +", "divergence = divergence + 0 *", distillation_value),
    ),
    *faults(
        logits._relative_entropy, ("no entropy", '"kl" else 0.0', '"bce" else 0.0', distillation("zero_at_teacher"))
    ),
    *faults(
        _pairs.gather_partners,
        (
            "partners one off",
            "index = assignment.clamp(min=0)",
            "index = (assignment - 1).clamp(min=0)",
            distillation("zero_at_teacher"),
        ),
    ),
    *faults(
        _pairs.box_terms,
        ("L1 of the centres only", "(boxes - partners).abs()", "(boxes - partners).abs()[..., :2]", detection_value),
        (
            "overlap of unconverted boxes",
            "box_cxcywh_to_xyxy(boxes), box_cxcywh_to_xyxy(partners)",
            "boxes, partners",
            detection_value,
        ),
    ),
    *faults(
        detection.detection_loss,
        ("target boxes keep their graph", "target_boxes.detach()", "target_boxes", detected("targets_detached")),
        (
            "padding counts as targets",
            "target_mask.sum()",
            "torch.ones_like(target_mask).sum()",
            detected("target_padding"),
        ),
        (
            "normaliser of each replica's targets",
            "logits.dtype), sync=sync_normalizer)",
            "logits.dtype), sync=False)",
            detected("replicas"),
        ),
        (
            "unmatched queries have a class",
            "& matched.unsqueeze(\n            -1\n        )",
            "",
            detected("target_permutation"),
        ),
    ),
    *faults(
        detection._focal,
        ("focal loss without its focus", "(gamma * F.logsigmoid(-signed)).exp()", "1", detection_value),
        (
            "focal balance exchanged",
            "1 - alpha).masked_fill(is_class, alpha)",
            "alpha).masked_fill(is_class, 1 - alpha)",
            detection_value,
        ),
    ),
    *faults(
        detection._weighted_cross_entropy,
        ("no-object class first", "logits.shape[-1] - 1", "0", cross_entropy_value),
        (
            "cross-entropy over the number of queries",
            "sum_last(weight, 2)",
            "sum_last(torch.ones_like(weight), 2)",
            cross_entropy_value,
        ),
    ),
    *faults(
        features.target_aware_feature_loss,
        ("padding cells count", "cells.sum()", "torch.ones_like(cells).sum()", feature("cell_padding")),
        ("cells of each replica", "sync=sync_normalizer", "sync=False", feature("replicas")),
        ("levels averaged", "torch.stack(losses).sum()", "torch.stack(losses).mean()", feature("levels_add")),
    ),
    *faults(
        features._loss_weight,
        ("stages averaged", "else weight).sum(0)", "else weight).mean(0)", feature("stages_add", normalize="mean")),
        (
            "official mask not squared",
            "weight.square() if",
            "weight if",
            oracle("target_aware_feature_loss", FEATURES, variant="official"),
        ),
    ),
    *faults(_comparison._Comparison.backward, ("half a gradient", "2 * grad", "grad", feature("gradients"))),
    *faults(
        _comparison._Comparison.forward,
        ("padding has a distance", "if valid is None else", "if True else", feature("cell_padding")),
    ),
    *faults(
        _comparison._scale_difference,
        ("padding has a gradient", "if valid is not None", "if False", feature("cell_padding")),
    ),
    *faults(
        _similarity.summarize_queries,
        (
            "queries unnormalised",
            "1 / length, 0.0",
            "1.0, 0.0",
            oracle("target_aware_feature_loss", FEATURES),
        ),
        (
            "entries beside the diagonal once",
            "part.triu() + part.triu(1)",
            "part.triu()",
            oracle("target_aware_feature_loss", FEATURES),
        ),
    ),
    *faults(
        _cpu._replace_non_finite,
        (
            "not finite costs the largest float",
            "finite = np.isfinite(cost)",
            "return np.nan_to_num(cost, nan=3e38, posinf=3e38, neginf=3e38)",
            solver("bad_numbers"),
        ),
        (
            "minus infinity wins",
            "finite = np.isfinite(cost)",
            "return np.nan_to_num(cost, nan=1e5, posinf=1e5, neginf=-1e5)",
            solver("bad_numbers"),
        ),
    ),
    *faults(
        dkl.linear_sum_assignment,
        ("costs transposed", "cost.detach()", "cost.detach().mT.reshape(cost.shape)", solver("optimal")),
        ("costs in float16", "cost.detach()", "cost.detach().half()", solver("planted")),
        ("costs in integers", "cost.detach()", "cost.detach().round()", solver("optimal")),
        ("maximum instead of minimum", "cost.detach()", "-cost.detach()", targets("optimal")),
        ("row mask ignored", "cost.detach()), row_mask", "cost.detach()), None", solver("masks")),
    ),
    *faults(
        _cpu.CpuBackend._solve_valid,
        ("columns not renumbered", "matched_columns = columns[matched_columns]", "pass", solver("masks")),
    ),
    *faults(
        dkl.match_targets, ("target mask forgotten", "*targets), mask)", "*targets), None)", targets("target_padding"))
    ),
    *faults(
        matching._positives_first,
        (
            "negatives matched before positives",
            "column_mask=column_mask",
            "column_mask=~column_mask",
            teacher("optimal"),
        ),
        ("positives may be matched twice", "row_mask=positives < 0", "row_mask=None", teacher("optimal")),
    ),
    *faults(
        dkl.detection_cost,
        (
            "overlap is a cost",
            "by_label = by_class.gather(-1, labels)",
            "by_label = by_class.gather(-1, labels); weight_giou = -weight_giou",
            cost_value,
        ),
        ("focal cost without its negative part", "by_class = positive - negative", "by_class = positive", cost_value),
    ),
    *faults(
        costs.distillation_costs,
        (
            "class cost transposed",
            " + logits @ scores.mT",
            " + logits.flip(-1) @ scores.mT",
            oracle("distillation_cost", DISTILLATION.without("teacher_positive").without("assignment")),
        ),
    ),
    *faults(
        dkl.stages._stage_indices,
        ("the first stage is skipped", "num_student_stages) - 1\n", "num_student_stages) - 2\n", depth),
    ),
    *faults(
        dkl.query_quality,
        (
            "unmatched queries have a quality",
            "torch.where(matched, ",
            "torch.where(matched | True, ",
            oracle("query_quality", DETECTION),
        ),
    ),
    *faults(
        query_quality._best_iou,
        ("quality of the worst IoU", ".amax(-1)", ".amin(-1)", oracle("query_quality", DETECTION, variant="official")),
    ),
    *faults(
        boxes._overlap,
        (
            "hull of the first box",
            "torch.maximum(right1, right2) - torch.minimum(left1, left2)",
            "right1 - left1",
            detection_value,
        ),
    ),
    *faults(
        boxes._ratio,
        (
            "boxes without area never coincide",
            "coincide.to(whole.dtype)",
            "torch.zeros_like(whole)",
            distillation("zero_at_empty_boxes"),
        ),
        ("an area of 0 divides", "torch.where(settled, 1.0, whole)", "whole", distillation("finite")),
    ),
    *faults(dkl.select_stages, ("the teacher's depth is cut", "stages == list(range(depth))", "stages[0] == 0", depth)),
]
