"""Faults in the losses of classes and boxes."""

from __future__ import annotations

from inspect import signature

import numpy as np
import torch

import detr_kd_losses as dkl
from detr_kd_losses import _reduction, boxes, pairs
from detr_kd_losses.losses import detection, logits
from detr_kd_losses.testing.makers import make_detection_arguments, make_distillation_arguments
from detr_kd_losses.testing.query_makers import make_shared_arguments, make_weighted_arguments

from support import cases, oracles
from support.mutants.mutant import faults, law_of, oracle

SIZE = {"stages": 2, "images": 2, "classes": 3}
DISTILLATION = make_distillation_arguments(students=5, teachers=6, split=True, **SIZE)
WEIGHTED = make_weighted_arguments(students=5, teachers=6, split=True, weighted=True, **SIZE)
SHARED = make_shared_arguments(queries=5, **SIZE)
DETECTION = make_detection_arguments(queries=6, targets=4, at_least=2, **SIZE)

WEIGHTS = {name: getattr(dkl, name) for name in ("confidence_weight", "overlap_weight", "localization_weight")}

distillation = law_of(dkl.hungarian_distillation_loss)
shared = law_of(dkl.shared_query_distillation_loss)
detected = law_of(dkl.detection_loss)
group = law_of(dkl.teacher_assigned_query_loss)
weighted_value = oracle("hungarian_distillation_loss", WEIGHTED)
shared_value = oracle("shared_query_distillation_loss", SHARED)
warm_shared_value = oracle("shared_query_distillation_loss", SHARED, temperature=3.0)
distillation_value = oracle("hungarian_distillation_loss", DISTILLATION)
detection_value = oracle("detection_loss", DETECTION)
cross_entropy_value = oracle("detection_loss", DETECTION, class_loss="cross_entropy")


def published_weights(max_examples):
    """Each weight of queries is its oracle's."""
    case = cases.published_weights()
    for name, function in WEIGHTS.items():
        arguments = {argument: case[argument] for argument in signature(function).parameters if argument in case}
        actual = function(**{argument: torch.tensor(array) for argument, array in arguments.items()})
        np.testing.assert_allclose(actual, getattr(oracles, name)(*arguments.values()), atol=1e-12, err_msg=name)
    softmax = dkl.confidence_weight(torch.tensor(case["teacher_logits"]), activation="softmax")
    np.testing.assert_allclose(softmax, oracles.confidence_weight(case["teacher_logits"], activation="softmax"))


MUTANTS = [
    *faults(
        dkl.shared_query_distillation_loss,
        (
            "shared queries count the same",
            'weighting == "confidence" else',
            'weighting == "uniform" else',
            shared_value,
        ),
        (
            "shared queries turned round",
            "torch.arange(queries[-1], device=student_logits.device)",
            "torch.arange(queries[-1], device=student_logits.device).flip(0)",
            shared("zero_at_teacher"),
        ),
        ("temperature of shared queries forgotten", "temperature=temperature", "temperature=1.0", warm_shared_value),
        (
            "shared queries of each replica",
            "sync_normalizer=sync_normalizer",
            "sync_normalizer=False",
            shared("replicas"),
        ),
    ),
    *faults(
        dkl.teacher_assigned_query_loss,
        (
            "boxes of the group lose their graph",
            "return detection_loss(",
            "group_boxes = group_boxes.detach(); return detection_loss(",
            group("gradients"),
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
        ("normaliser of each replica", "sync=sync_normalizer", "sync=False", distillation("replicas")),
        ("weights are only summed", "else weight * term", "else term", weighted_value),
        (
            "temperature unsquared",
            "temperature**2",
            "temperature",
            oracle("hungarian_distillation_loss", DISTILLATION, temperature=3.0),
        ),
        ("weights exchanged", '"loss_bbox": weight_bbox', '"loss_bbox": weight_giou', distillation("weights_linear")),
        (
            "half precision is computed in half precision",
            "= shared_precision(student_logits, student_boxes, teacher_logits, teacher_boxes)",
            "= (student_logits, student_boxes, teacher_logits, teacher_boxes)",
            distillation("half_precision"),
        ),
    ),
    *faults(
        pairs.weigh_pairs,
        ("no weight, but a part", "weight != 0", "weight != -1", distillation("weightless")),
    ),
    *faults(
        pairs.count_pairs,
        (
            "normaliser of each image",
            "sum_last(pairs.to(dtype), 2)",
            "sum_last(pairs.to(dtype), 2) / pairs.shape[-2]",
            distillation("images_join"),
        ),
        ("weights have no sum", "masked_sum(weight, pairs, 2)", "sum_last(pairs.to(dtype), 2)", weighted_value),
    ),
    *faults(
        _reduction.replica_weight,
        ("weights are at least 1", "at_least=[0.0]", "at_least=[1.0]", distillation("equal_weights")),
        ("no weight divides", "total > 0", "total >= 0", distillation("no_pairs")),
    ),
    *faults(
        dkl.confidence_weight,
        ("confidence of no object", "logits.softmax(-1)[..., :-1]", "logits.softmax(-1)", published_weights),
    ),
    *faults(
        dkl.overlap_weight,
        ("padding overlaps", "giou.where(target_mask.unsqueeze(-2), -1.0)", "giou", published_weights),
        ("queries far from targets count", "best > threshold", "best > -2", published_weights),
    ),
    *faults(
        dkl.localization_weight,
        ("a confidence for an overlap", "matched, iou, confidence", "~matched, iou, confidence", published_weights),
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
        pairs.gather_partners,
        (
            "partners one off",
            "index = assignment.clamp(min=0)",
            "index = (assignment - 1).clamp(min=0)",
            distillation("zero_at_teacher"),
        ),
    ),
    *faults(
        pairs.box_terms,
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
            "replica_means(num_targets, sync=sync_normalizer)",
            "replica_means(num_targets, sync=False)",
            detected("replicas"),
        ),
        (
            "cross-entropy over the number of queries",
            "sum_last(weight, 2), sync",
            "sum_last(torch.ones_like(weight), 2), sync",
            cross_entropy_value,
        ),
        (
            "unmatched queries have a class",
            "& matched.unsqueeze(-1)",
            "",
            detected("target_permutation"),
        ),
    ),
    *faults(
        detection._focal,
        (
            "focal loss without its focus",
            "(gamma * F.logsigmoid(-signed)).exp() if gamma",
            "1.0 if gamma",
            detection_value,
        ),
        (
            "focal balance exchanged",
            "1 - alpha).masked_fill(is_class, alpha)",
            "alpha).masked_fill(is_class, 1 - alpha)",
            detection_value,
        ),
    ),
    *faults(
        detection._cross_entropy,
        ("no-object class first", "no_object = logits.shape[-1] - 1", "no_object = 0", cross_entropy_value),
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
]
