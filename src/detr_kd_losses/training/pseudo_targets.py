"""Images without labels, or with gaps in them: what the teacher is sure of becomes a target."""

from __future__ import annotations

import torch
from torch import Tensor

from detr_kd_losses._precision import full_precision, shared_precision
from detr_kd_losses._validation import (
    validate_choice,
    validate_count,
    validate_in_unit_interval,
    validate_predictions,
    validate_record,
    validate_same_device,
    validate_same_shape,
    validate_targets_shape,
)
from detr_kd_losses.boxes import box_cxcywh_to_xyxy, box_iou
from detr_kd_losses.heads import ACTIVATIONS, Activation, ClassMap, class_index, num_classes_of
from detr_kd_losses.outputs import Targets

__all__ = ["add_pseudo_targets", "pseudo_targets"]

# Which classes a student has nobody says here: any number is one, and a loss that meets one too many says so.
_ANY_CLASS = 2**31


@torch.no_grad()
def pseudo_targets(
    teacher_logits: Tensor,
    teacher_boxes: Tensor,
    *,
    threshold: float = 0.5,
    max_targets: int = 100,
    activation: Activation = "sigmoid",
    class_map: ClassMap | None = None,
) -> Targets:
    r"""The teacher's confident predictions as targets, so that every loss works on images without labels.

    .. math:: \{(\arg\max_c p_{mc}, b_m) : \max_c p_{mc} \ge threshold\}

    Each query of the last layer gives at most one target, of its best class; duplicates are not suppressed. A query
    whose scores or box are not finite gives none. Nothing waits for the device.

    Args:
        teacher_logits: (L, B, M, C), whose last layer counts, or (B, M, C); raw.
        teacher_boxes: (L, B, M, 4) or (B, M, 4), cxcywh in [0, 1].
        threshold: Score in [0, 1] from which a prediction is a target; one of exactly that score is.
        max_targets: T, the number of targets of an image with padding; of more the best are kept.
        activation: Head of the teacher: ``"sigmoid"``, or ``"softmax"`` with "no object" as its last channel, which is
            never a target.
        class_map: Student class of each of the C teacher classes, -1 = dropped: never a target. Classes with the same
            student class are merged as by :func:`map_class_logits`: the highest score counts, or the sum of the
            probabilities of a softmax head. None: both have the same classes.

    Returns:
        :class:`Targets` (B, T), (B, T, 4), (B, T), the surest first, with label 0 and box 0 in the padding. Float32 for
        half precision. No gradient.

    Raises:
        ValueError: If shapes, devices or options do not fit, or there is no class.
        TypeError: If a dtype does not fit.

    Examples:
        >>> logits = torch.tensor([[[-3.0, 2.0], [4.0, 0.0], [-1.0, -2.0]]])
        >>> boxes = torch.tensor([[[0.1] * 4, [0.5] * 4, [0.9] * 4]])
        >>> targets = pseudo_targets(logits, boxes, threshold=0.6, max_targets=3)
        >>> targets.labels.tolist(), targets.mask.tolist()
        ([[0, 1, 0]], [[True, True, False]])
    """
    validate_predictions("teacher_", teacher_logits, teacher_boxes)
    validate_in_unit_interval("threshold", threshold)
    validate_count("max_targets", max_targets)
    validate_choice("activation", activation, ACTIVATIONS)
    if teacher_logits.ndim not in (3, 4) or not num_classes_of(teacher_logits, activation):
        msg = (
            "`teacher_logits` must have shape (L, B, M, C) or (B, M, C), with a class beside 'no object', "
            f"got {tuple(teacher_logits.shape)} and a {activation} head"
        )
        raise ValueError(msg)
    logits, boxes = teacher_logits.detach(), teacher_boxes.detach()
    if logits.ndim == 4:
        logits, boxes = logits[-1], boxes[-1]
    boxes = full_precision(boxes)
    scores, labels = _best_class(full_precision(logits), activation, class_map)
    is_target = (scores >= threshold) & boxes.isfinite().all(-1)  # False for NaN
    number = min(int(max_targets), scores.shape[-1])
    best = torch.where(is_target, scores, -1.0).topk(number, dim=-1).indices
    mask = is_target.gather(-1, best)
    labels = labels.gather(-1, best)
    boxes = boxes.gather(-2, best.unsqueeze(-1).expand(-1, -1, 4))
    # Images of other batches have as many: fewer queries than `max_targets` are padded, too.
    missing = int(max_targets) - number
    pad = torch.nn.functional.pad
    return _blanked(pad(labels, (0, missing)), pad(boxes, (0, 0, 0, missing)), pad(mask, (0, missing)))


@torch.no_grad()
def add_pseudo_targets(targets: Targets, pseudo: Targets, *, max_iou: float = 0.5) -> Targets:
    """Labels, and behind them the pseudo targets that no label overlaps: for labels with gaps.

    A pseudo target stays where its IoU with every label of its image, of whatever class, is below `max_iou`. Nothing
    waits for the device.

    Args:
        targets: The labels, (B, T).
        pseudo: What the teacher is sure of, (B, P), from :func:`pseudo_targets`.
        max_iou: IoU in [0, 1] from which a pseudo target is taken for the label. 0: none is added to an image that has
            a label; 1: only those whose box is a label's are left out.

    Returns:
        :class:`Targets` (B, T + P), boxes in the wider of both dtypes, at least float32.

    Raises:
        ValueError: If shapes, devices or `max_iou` do not fit.
        TypeError: If an argument is not a :class:`Targets`, or a dtype does not fit.

    Examples:
        >>> labels = Targets(torch.tensor([[7]]), torch.tensor([[[0.5, 0.5, 0.2, 0.2]]]), torch.tensor([[True]]))
        >>> boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.21], [0.1, 0.1, 0.2, 0.2]]])
        >>> said = Targets(torch.tensor([[7, 3]]), boxes, torch.tensor([[True, True]]))
        >>> both = add_pseudo_targets(labels, said)
        >>> both.labels.tolist(), both.mask.tolist()
        ([[7, 0, 3]], [[True, False, True]])
    """
    validate_in_unit_interval("max_iou", max_iou)
    for name, value in (("targets", targets), ("pseudo", pseudo)):
        validate_record(name, value, Targets, "Targets(labels, boxes, mask)")
        labels, batch = value.labels, value.labels.shape[:-1]
        validate_targets_shape(*value, batch_shape=batch, like=labels, like_name=f"{name}.labels")
    validate_same_shape("targets", targets.labels.shape[:-1], "pseudo", pseudo.labels.shape[:-1], "(B,)")
    validate_same_device("targets", targets.labels, pseudo=pseudo.labels)
    own, added = shared_precision(targets.boxes.detach(), pseudo.boxes.detach())
    corners = [
        box_cxcywh_to_xyxy(boxes.where(mask.unsqueeze(-1), 0.0))
        for boxes, mask in ((added, pseudo.mask), (own, targets.mask))
    ]
    taken = ((box_iou(*corners) >= max_iou) & targets.mask.unsqueeze(-2)).any(-1)
    pseudo = _blanked(pseudo.labels, added, pseudo.mask & ~taken)
    pairs = (targets.labels, pseudo.labels), (targets.mask, pseudo.mask)
    labels, mask = (torch.cat(pair, dim=-1) for pair in pairs)
    return Targets(labels, torch.cat((own, pseudo.boxes), dim=-2), mask)


def _best_class(logits: Tensor, activation: Activation, class_map: ClassMap | None) -> tuple[Tensor, Tensor]:
    """Score (B, M) and student class of the best class of each query; a score below 0 where all are dropped."""
    classes = num_classes_of(logits, activation)
    scores = logits.softmax(-1)[..., :-1] if activation == "softmax" else logits.sigmoid()
    if class_map is None:
        best = scores.max(-1)
        return best.values, best.indices
    student_class = class_index(class_map, classes, _ANY_CLASS, device=logits.device)
    if activation == "softmax":
        # Probabilities of one student class are added in the channel of the first of its teacher classes.
        first = (student_class.unsqueeze(-1) == student_class).int().argmax(-1)
        scores = torch.zeros_like(scores).index_add(-1, first, scores)
    best = scores.where(student_class < _ANY_CLASS, -1.0).max(-1)
    return best.values, student_class[best.indices]


def _blanked(labels: Tensor, boxes: Tensor, mask: Tensor) -> Targets:
    """Targets without anything in their padding."""
    return Targets(labels.where(mask, 0), boxes.where(mask.unsqueeze(-1), 0.0), mask)
