"""Faults in the losses of classes and boxes."""

from __future__ import annotations

import detr_kd_losses as dkl
from detr_kd_losses import boxes, pairs
from detr_kd_losses.losses import detection, logits
from detr_kd_losses.testing.makers import make_detection_arguments, make_distillation_arguments

from support.mutants.mutant import faults, law_of, oracle

SIZE = {"stages": 2, "images": 2, "classes": 3}
DISTILLATION = make_distillation_arguments(students=5, teachers=6, split=True, **SIZE)
DETECTION = make_detection_arguments(queries=6, targets=4, at_least=2, **SIZE)

distillation = law_of(dkl.hungarian_distillation_loss)
detected = law_of(dkl.detection_loss)
group = law_of(dkl.teacher_assigned_query_loss)
distillation_value = oracle("hungarian_distillation_loss", DISTILLATION)
detection_value = oracle("detection_loss", DETECTION)
cross_entropy_value = oracle("detection_loss", DETECTION, class_loss="cross_entropy")

MUTANTS = [
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
            "= shared_precision(student_logits, student_boxes, teacher_logits, teacher_boxes)",
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
            "logits.dtype), sync=sync_normalizer)",
            "logits.dtype), sync=False)",
            detected("replicas"),
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
