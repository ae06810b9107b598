"""Whether a distillation is set up right, before hours of training: one call that prints what it found."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from detr_kd_losses._validation import validate_record
from detr_kd_losses.criterion import DETRDistillationLoss
from detr_kd_losses.outputs import DetectorOutput, Targets
from detr_kd_losses.taps.agreement import validate_classes
from detr_kd_losses.taps.find import unwrap
from detr_kd_losses.taps.loss import distillation_loss
from detr_kd_losses.taps.queries import QueryProjection
from detr_kd_losses.taps.tap import Tap
from detr_kd_losses.terms.features import FeatureTerm
from detr_kd_losses.terms.logits import LogitsTerm
from detr_kd_losses.terms.shared_queries import SharedQueryTerm
from detr_kd_losses.training.value_checks import check_targets

__all__ = ["Finding", "check_setup"]

Levels = tuple["Sequence[int] | None", "Sequence[int] | None"]
SMALL = 1e-4
CORNERS = "`target_boxes` must be cxcywh, got boxes that reach beyond the image and would all be right as xyxy"


class Finding(NamedTuple):
    """One line of a report: what was looked at, whether it is right, what was seen. None: nothing can be wrong."""

    what: str
    right: bool | None
    seen: str

    def __str__(self) -> str:
        """The line."""
        mark = {True: "ok", False: "WRONG", None: ""}[self.right]
        return f"{mark:6}{self.what:32}{self.seen}"


@torch.no_grad()
def check_setup(
    student: nn.Module,
    teacher: nn.Module,
    call: Callable[[nn.Module], Any],
    targets: Targets | None = None,
    *,
    distillation: DETRDistillationLoss | None = None,
    query_projection: QueryProjection | None = None,
    levels: Levels = (None, None),
) -> bool:
    """Run student and teacher on a batch, in evaluation mode, and print whether the set-up is right.

    Of both: which decoder was found, whether all of its layers were read, how many queries, classes and maps there are,
    whether boxes are in [0, 1] and the model's own queries replayed give its own answer. Then whether a teacher equal
    to the student teaches nothing, whether classes, heads, levels and queries of both fit each other, and whether
    targets are cxcywh in [0, 1] in the student's classes. Both models are left in the mode that they were in.

    Args:
        student: The student.
        teacher: The teacher.
        call: Runs a model on a batch: ``lambda model: model(images)``.
        targets: Targets of that batch.
        distillation: The losses that are meant. None: :func:`distillation_loss` of both.
        query_projection: What maps the teacher's queries to the student's width.
        levels: Feature levels of student and of teacher that correspond.

    Returns:
        Whether all is right.

    Raises:
        ValueError: If a decoder is not found.
        RuntimeError: If `call` does not reach it.
        TypeError: If targets are not padded.
    """
    if targets is not None:
        validate_record("targets", targets, Targets, "pad_targets(targets)")
    student, teacher = unwrap(student), unwrap(teacher)
    distillation = distillation or distillation_loss(student, teacher)
    with _evaluating(student), _evaluating(teacher):
        taps = [_tapped(model, call) for model in (student, teacher)]
        outputs = [tap.output(tap.query_group(), levels=kept) for tap, kept in zip(taps, levels, strict=True)]
        findings = [*_of_a_model("student", taps[0], outputs[0]), *_of_a_model("teacher", taps[1], outputs[1])]
        findings += _of_heads(distillation, taps, outputs)
        findings += _of_features_and_queries(distillation, taps, outputs, query_projection)
        findings.append(_of_equals(taps[0], outputs[0], targets))
    if targets is not None:
        findings.append(_of_targets(targets, _num_classes(outputs[0], taps[0])))
    for finding in findings:
        print(finding)  # noqa: T201 - what it is for
    return all(finding.right is not False for finding in findings)


def _tapped(model: nn.Module, call: Callable[[nn.Module], Any]) -> Tap:
    with Tap(model) as tap:
        call(model)
    return tap


def _of_a_model(name: str, tap: Tap, output: DetectorOutput) -> Iterator[Finding]:
    decoder = tap.found.decoder(tap.model)
    maps = ", ".join(f"{level.shape[1]} x {level.shape[2]} x {level.shape[3]}" for level in output.features or ())
    layers, _, queries, channels = output.logits.shape
    yield Finding(f"{name}: decoder", None, f"{type(decoder).__name__} at {tap.found.path}, {tap.description.name}")
    whole = len(decoder.layers)  # type: ignore[arg-type]
    yield Finding(f"{name}: layers", layers == whole, f"{layers} of {whole} are read")
    yield Finding(f"{name}: queries", None, f"{queries}, {tap.query_group().shapes}")
    yield Finding(f"{name}: head", None, f"{channels} channels, {tap.activation}")
    yield Finding(f"{name}: maps", None, maps)
    low, high = output.boxes.min().item(), output.boxes.max().item()
    outside = ((output.boxes < 0) | (output.boxes > 1)).any(-1).float().mean().item()
    centres = output.boxes[..., :2]
    right = bool((centres > -1).all() and (centres < 2).all())
    yield Finding(f"{name}: boxes", right, f"from {low:.3g} to {high:.3g}, {100 * outside:.0f} % not within [0, 1]")
    difference = max(
        (own - replayed).abs().max().item()
        for own, replayed in zip((output.logits, output.boxes), output.group or (), strict=True)
    )
    scale = output.logits.abs().max().item()
    yield Finding(f"{name}: own queries replayed", difference < SMALL * max(scale, 1.0), f"differ by {difference:.1e}")


def _of_heads(
    distillation: DETRDistillationLoss, taps: Sequence[Tap], outputs: Sequence[DetectorOutput]
) -> Iterator[Finding]:
    for name, tap in zip(("student", "teacher"), taps, strict=True):
        given = getattr(distillation, f"{name}_activation")
        yield Finding(f"{name}_activation", given == tap.activation, f"{given}, the head is {tap.activation}")
    own, taught = (_num_classes(output, tap) for output, tap in zip(outputs, taps, strict=True))
    if distillation.class_map is None:
        seen = f"{own} and {taught}" + ("" if own == taught else ": give `class_map`, such as coco_class_map(91, 80)")
        right = own == taught
        try:
            validate_classes(taps[0].model, taps[1].model)
        except ValueError as error:
            right, seen = False, str(error)
        yield Finding("classes", right, seen)
    else:
        class_map = torch.as_tensor(distillation.class_map)
        known = int((class_map >= 0).sum())
        right = len(class_map) == taught and known > 0 and int(class_map.max()) < own
        yield Finding("classes", right, f"{own} and {taught}, of which a map of {len(class_map)} teaches {known}")


def _of_features_and_queries(
    distillation: DETRDistillationLoss,
    taps: Sequence[Tap],
    outputs: Sequence[DetectorOutput],
    projection: QueryProjection | None,
) -> Iterator[Finding]:
    if "features" in distillation.needs:
        numbers = [len(output.features or ()) for output in outputs]
        remedy = "" if numbers[0] == numbers[1] else ": choose those that correspond with `levels`"
        yield Finding("feature levels", numbers[0] == numbers[1], f"{numbers[0]} and {numbers[1]}{remedy}")
    if "group" in distillation.needs:
        group = taps[1].query_group()
        try:
            taps[0].replay(group if projection is None else projection(group))
        except ValueError as error:
            yield Finding("the teacher's queries", False, str(error))
        else:
            yield Finding("the teacher's queries", True, "run through the student's decoder")


def _num_classes(output: DetectorOutput, tap: Tap) -> int:
    return output.logits.shape[-1] - (tap.activation == "softmax")


def _of_equals(tap: Tap, output: DetectorOutput, targets: Targets | None) -> Finding:
    """A student that is its own teacher, at all layers: logits, boxes, features, and shared queries."""
    heads = dict.fromkeys(("student_activation", "teacher_activation"), tap.activation)
    terms = [LogitsTerm(), FeatureTerm(), SharedQueryTerm(stage_map="even")]
    batch = output.logits.shape[1]
    if targets is None:
        labels = torch.zeros(batch, 1, dtype=torch.int64, device=output.logits.device)
        targets = Targets(labels, output.boxes.new_full((batch, 1, 4), 0.5), torch.ones_like(labels, dtype=torch.bool))
    losses = DETRDistillationLoss(terms, **heads)(output, output, targets.to(output.logits.device))  # type: ignore[arg-type]
    worst: Tensor = torch.stack(list(losses.values())).max()
    return Finding("teacher == student", bool(worst < SMALL), f"the largest of {len(losses)} terms is {worst:.1e}")


def _of_targets(targets: Targets, num_classes: int) -> Finding:
    try:
        check_targets(*targets, num_classes=num_classes)
    except ValueError as error:
        return Finding("targets", False, str(error))
    if are_corners(targets):
        return Finding("targets", False, CORNERS)
    return Finding("targets", True, f"{int(targets.mask.sum())} on {len(targets.mask)} images, cxcywh in [0, 1]")


def are_corners(targets: Targets) -> bool:
    """Whether all boxes would be right as xyxy, and one reaches beyond the image by a hundredth as cxcywh."""
    boxes = targets.boxes[targets.mask]
    centres, sizes = boxes[:, :2], boxes[:, 2:]
    beyond = (centres - sizes / 2 < -0.01) | (centres + sizes / 2 > 1.01)
    return bool((sizes > centres).all() and beyond.any())


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
