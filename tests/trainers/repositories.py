"""Read and distil a model of a repository as it is, and print what docs/how-to/trainers.md says of it.

    python tests/trainers/repositories.py d_fine /path/to/D-FINE
    python tests/trainers/repositories.py deformable /path/to/Deformable-DETR --with_box_refine --two_stage
    tests/trainers.sh python tests/trainers/repositories.py rf_detr

With PYTHONPATH=src:tests, and what the repository imports: torchvision (on a CPU, it is made to import), and for some
timm, pycocotools, faster-coco-eval, tensorboard, yapf. Lines say how it is read, what it learns from a teacher that has
learned the batch, and how strongly the terms pull beside the trainer's own loss: their value, and their gradient over
that of the loss.
"""

from __future__ import annotations

import argparse
import copy
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import detr_kd_losses as dkl
from detr_kd_losses.taps import DistillationCriterion, Tap, distillation_loss, random_queries
from detr_kd_losses.training.diagnostics import loss_magnitudes

from support.package_models import PACKAGES
from support.real_trainers import targets
from support.repository_models import AFTER_THE_ENCODER, KINDS, Subject, build_subject
from support.torchvision_on_cpu import import_torchvision

STEPS = 25  # of distillation
RATE = 1e-3  # of a student that learns from a teacher alone, the same for all


def worst(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(one, other, strict=True))


def look(subject: Subject) -> dict[str, str]:
    """Whether a tap reads what the model says, and a replay of its own queries gives its own answer."""
    model = fresh(subject, seed=0).eval()
    with torch.no_grad():
        with Tap(model) as tap:
            subject.call(model)
        output = tap.output(group=tap.query_group())
        drawn = random_queries(tap.query_group(), 20, generator=torch.Generator().manual_seed(0))
        with Tap(copy.deepcopy(model)) as other:
            subject.call(other.model)
        terms = [dkl.LogitsTerm(), dkl.FeatureTerm(), dkl.SharedQueryTerm(stage_map="even")]
        head = dict.fromkeys(("student_activation", "teacher_activation"), tap.activation)
        truth = dkl.pad_targets(targets(subject.classes))
        equal = dkl.DETRDistillationLoss(terms, **head)(tap.output(drawn), other.output(drawn), truth)
    model.train()
    with Tap(model) as tap:
        answer = subject.train(model)
    trained = tap.output(group=tap.query_group())
    said = answer[0] if isinstance(answer, tuple) else answer
    layers = [*said["aux_outputs"][: len(trained.logits) - 1], said]
    logits, boxes = (torch.stack([layer[name] for layer in layers]) for name in ("pred_logits", "pred_boxes"))
    number = trained.logits.shape[2]
    return {
        "layers": f"{len(output.logits)} of {len(tap.call.decoder.layers)}",
        "queries": str(number),
        "maps": str(len(output.features)),
        "tap = model": f"{worst((logits[:, :, :number], boxes[:, :, :number]), (trained.logits, trained.boxes)):.0e}",
        "replay = own": f"{worst(tuple(output.group), (output.logits, output.boxes)):.0e}",
        "in training": f"{worst(tuple(trained.group), (trained.logits, trained.boxes)):.0e}",
        "teacher = student": f"{max(equal.values()).item():.0e}",
        "distributions": "no" if output.distributions is None else "yes",
    }


def inherited(subject: Subject, kind: str) -> dict[str, str]:
    """Whether what follows the encoder, with what comes before it, is the whole of another model."""
    student, teacher = (fresh(subject, seed).eval() for seed in range(2))
    modules = dict(student.named_modules(remove_duplicate=False))
    found = dkl.inherit_weights(student, teacher, [part for part in AFTER_THE_ENCODER[kind] if part in modules])
    missing = [name for name in student.state_dict() if name not in found.inherited]
    before = ("backbone.", "encoder.", "input_proj.", "transformer.encoder.", "transformer.level_embed")
    dkl.inherit_weights(student, teacher, [name for name in missing if name.startswith(before)])
    answers = []
    for model in (student, teacher):
        with torch.no_grad(), Tap(model) as tap:
            subject.call(model)
        answers.append((tap.output().logits, tap.output().boxes))
    return {"inherited": f"{len(found.inherited)} tensors", "with all before them": f"{worst(*answers):.0e}"}


def fresh(subject: Subject, seed: int) -> nn.Module:
    """A model that trains, without dropout."""
    torch.manual_seed(seed)
    model = subject.build().train()
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        if isinstance(part, nn.MultiheadAttention):
            part.dropout = 0.0
    return model


def learn(model: nn.Module, losses: Callable[[], dict[str, Tensor]], steps: int, rate: float) -> list[dict[str, float]]:
    """Losses before each step, and after the last; denoising draws the same noise each time."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    history = []
    for _ in range(steps + 1):
        torch.manual_seed(0)
        found = losses()
        optimizer.zero_grad()
        torch.stack(list(found.values())).sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        history.append({name: loss.item() for name, loss in found.items()})
    return history


class Lesson:
    """A teacher that has learned the batch by the repository's own loss, and what it teaches another model."""

    def __init__(self, subject: Subject, steps: int) -> None:
        self.subject = subject
        self.teacher = fresh(subject, seed=1)
        own = learn(self.teacher, lambda: {"own": subject.loss(subject.train(self.teacher))}, steps, subject.rate)
        self.before, self.after = own[0]["own"], own[-1]["own"]
        with torch.no_grad(), Tap(self.teacher.eval()) as tap:
            subject.call(self.teacher)
        self.output, self.group = tap.output(), tap.query_group()
        self.distillation = distillation_loss(fresh(subject, seed=0), self.teacher)

    def given_to(self, student: nn.Module) -> tuple[Any, dict[str, Tensor]]:
        """What a student answers, and the terms of distillation with their default weights."""
        with Tap(student) as tap:
            answer = self.subject.train(student)
        truth = dkl.pad_targets(targets(self.subject.classes))
        return answer, self.distillation(tap.output(self.group), self.output, truth)

    def fall(self) -> str:
        """How many terms are lower after some steps of distillation alone, of a student that knows nothing."""
        student = fresh(self.subject, seed=0)
        history = learn(student, lambda: self.given_to(student)[1], STEPS, RATE)
        first, last = history[0], history[-1]
        higher = [f"{name} {first[name]:.3g} -> {last[name]:.3g}" for name in first if not last[name] < first[name]]
        most = max(last[name] / first[name] for name in first)
        return f"{len(first) - len(higher)} of {len(first)}, to {most:.2f} at most {', '.join(higher)}".strip()

    def magnitudes(self) -> list[dict[str, str]]:
        """Each term beside the own loss, for a student that knows nothing and for one that has begun to learn by it."""
        student = fresh(self.subject, seed=0)
        found = [{"first step, own": self._magnitudes(student)}]
        own = lambda: {"own": self.subject.loss(self.subject.train(student))}  # noqa: E731
        learn(student, own, STEPS - 1, self.subject.rate)
        found.append({f"after {STEPS}, own": self._magnitudes(student)})
        return found

    def _magnitudes(self, student: nn.Module) -> str:
        """Value of each term, and its gradient by all parameters over that of the own loss."""
        torch.manual_seed(0)
        answer, terms = self.given_to(student)
        parts = {
            "logits": ("loss_kd_class", "loss_kd_bbox", "loss_kd_giou"),
            "feature": ("loss_kd_feature",),
            "group": ("loss_kd_group_class", "loss_kd_group_bbox", "loss_kd_group_giou"),
            "all": tuple(terms),
        }
        sums = {part: torch.stack([terms[name] for name in names]).sum() for part, names in parts.items()}
        own = self.subject.loss(answer)
        found = loss_magnitudes(sums, own, student.parameters())
        shown = [f"{part} {one.value:.3g}, {one.relative_gradient_norm:.2g}" for part, one in found.items()]
        return " | ".join([f"{own:.3g}", *shown])


class OwnLoss(nn.Module):
    """A repository's own loss as a criterion."""

    def __init__(self, subject: Subject) -> None:
        super().__init__()
        self.subject = subject

    def forward(self, outputs: Any, _: Any) -> dict[str, Tensor]:
        return {"own": self.subject.loss(outputs)}


def traces(subject: Subject, teacher: nn.Module) -> str:
    """What copies and files of a student show of its teacher after a step with a criterion that has one."""
    student = fresh(subject, seed=0)
    size, keys = saved(student), set(student.state_dict())
    criterion = DistillationCriterion(OwnLoss(subject), student, teacher, teacher_call=subject.teacher_call)
    truth = targets(subject.classes)
    history = learn(student, lambda: criterion(subject.train(student), truth), 1, subject.rate)
    assert len(history[0]) == 1 + len(criterion.distillation.names), "the teacher has taken no part"
    other = copy.deepcopy(student)
    hooks = sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in other.modules())
    more = len(set(other.state_dict()) ^ keys)
    return "none" if hooks + more == 0 and saved(student) == size else f"{hooks} hooks, {more} tensors more"


def saved(model: nn.Module) -> int:
    """Bytes of a file of a whole model."""
    file = io.BytesIO()
    torch.save(model, file)
    return file.tell()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=[*KINDS, *PACKAGES])
    parser.add_argument("folder", type=Path, nargs="?", help="of the repository; none for a package")
    parser.add_argument("--lessons", type=int, default=50, help="steps in which a teacher learns the batch")
    arguments, options = parser.parse_known_args()
    torch.set_num_threads(1)
    import_torchvision()
    kind, folder = arguments.kind, arguments.folder
    shown = [" ".join((kind, *options))]
    if folder is not None:
        command = ["git", "-C", folder, "rev-parse", "--short=7", "HEAD"]
        shown.append(subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip())
        os.chdir(folder)
        sys.path.insert(0, "")
    subject = PACKAGES[kind]() if kind in PACKAGES else build_subject(kind, options)
    if kind not in PACKAGES:  # whose own tests look
        show(shown, look(subject))
        show(shown, inherited(subject, kind))
    if subject.loss is not None:
        lesson = Lesson(subject, arguments.lessons)
        learned = {"teacher": f"{lesson.before:.3g} -> {lesson.after:.3g}", "lower": lesson.fall()}
        if kind not in PACKAGES:
            learned["traces"] = traces(subject, lesson.teacher)
        show(shown, learned)
        for found in lesson.magnitudes():
            show(shown, found)


def show(beginning: list[str], found: dict[str, str]) -> None:
    print(" | ".join([*beginning, *(f"{what} {seen}" for what, seen in found.items())]), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
