"""One training as a row of the results, and the teachers that it needs, each trained once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import torch
from model import TinyDETR
from runs import STUDENT, TEACHER
from shapes import ShapeImages, make_shapes
from torch import Tensor
from train import History, Losses, Teacher, evaluate, predict, step_losses, train

import detr_kd_losses as dkl
from experiments.rows import Row, Run
from experiments.settings import SETTINGS, Parts
from experiments.worlds import (
    DATA_SETS,
    TEST,
    VALIDATION,
    WORLDS,
    Recipe,
    all_images,
    held_out_images,
    training_images,
)

SHARES_AT = (0.02, 0.1, 0.25, 0.5, 0.75, 0.95)  # progress at which the gradients of the terms are measured


class TeacherOf(NamedTuple):
    """Which teacher of which world."""

    world: str
    name: str


def train_student(run: Run, cache: Path, on_step: Callable[[], None]) -> Row:
    """Train one student, the same for each setting but for what joins its loss, and return what came out."""
    setting = SETTINGS[run.setting]
    torch.manual_seed(run.seed)
    model = detector(run.world, WORLDS[run.world].student)
    criterion = dkl.DETRDistillationLoss({name: part.make() for name, part in setting.parts.items()})
    teacher = ready_teacher(run.world, setting.teacher, cache) if setting.needs_teacher else None
    data = setting.labels(training_images(run.world), all_images(run.world), teacher)
    if setting.change is not None:
        teacher = setting.change(teacher, criterion.terms)
    if setting.begin is not None:
        setting.begin(model, teacher)
    gradients: dict[str, Any] = {"steps": [], "norms": {}, "cosines": {}, "between": {}}
    instability: list[list[float]] = []
    watchers = [matching_watcher(model, training_images(run.world), run.steps, instability)]
    if setting.parts:
        watchers.append(gradient_watcher(model, criterion, run.steps, gradients))
    if setting.shares:
        watchers.append(share_holder(model, criterion, setting.shares))

    def watch(step: int, losses: Losses) -> None:
        for watcher in watchers:
            watcher(step, losses)

    history = train(
        model,
        data,
        held_out_images(run.world, VALIDATION),
        steps=run.steps,
        seed=run.seed,
        teacher=teacher,
        distillation=criterion if setting.parts else None,
        schedule=None if setting.shares else weight_schedule(criterion, setting.parts),
        watch=watch,
        on_step=on_step,
    )
    test_ap, test_ap50 = evaluate(model, held_out_images(run.world, TEST))
    return {
        **run._asdict(),
        "ap": rounded(history.ap[-1]),
        "ap50": rounded(history.ap50[-1]),
        "test_ap": rounded(test_ap),
        "test_ap50": rounded(test_ap50),
        "seconds": rounded(history.seconds),
        "curve": curve(history),
        "gradients": gradients,
        "instability": instability,
        "fingerprint": fingerprint(run.setting),
        "matched_iou": matched_iou(model, training_images(run.world)),
        "teacher": teacher_facts(run.world, setting.teacher, cache) if teacher else None,
    }


def weight_schedule(criterion: dkl.DETRDistillationLoss, parts: Parts) -> dkl.WeightSchedule | None:
    """Return what lets the weight of every term follow its schedule, if there are terms."""
    return dkl.WeightSchedule(criterion, {name: part.schedule for name, part in parts.items()}) if parts else None


def gradient_watcher(
    model: TinyDETR, criterion: dkl.DETRDistillationLoss, steps: int, seen: dict[str, Any]
) -> Callable[[int, Losses], None]:
    """Return a function that notes, now and then, the gradients of the detection loss and of each term.

    Of each their length, of the terms' the cosine of the angle to that of the detection loss, and between two of them.
    """
    watched = {max(1, round(steps * progress)) for progress in SHARES_AT}

    def watch(step: int, losses: Losses) -> None:
        if step not in watched:
            return
        terms = {name: sum_of(losses.distillation, term.names) for name, term in criterion.terms.items()}
        gradients = {name: gradient(loss, model) for name, loss in {"detection": losses.detection, **terms}.items()}
        seen["steps"].append(step)
        for name, vector in gradients.items():
            cosine = torch.cosine_similarity(vector, gradients["detection"], dim=0).item()
            seen["norms"].setdefault(name, []).append(rounded(vector.norm().item()))
            seen["cosines"].setdefault(name, []).append(rounded(cosine))
        for one, other in combinations(terms, 2):
            cosine = torch.cosine_similarity(gradients[one], gradients[other], dim=0).item()
            seen["between"].setdefault(f"{one}, {other}", []).append(rounded(cosine))

    return watch


def share_holder(
    model: TinyDETR, criterion: dkl.DETRDistillationLoss, shares: Mapping[str, float]
) -> Callable[[int, Losses], None]:
    """Return a function that moves the weights of the terms, 40 times in 2,000 steps, towards their shares."""
    controller = dkl.ShareController(criterion, shares, every=50, rate=0.5)

    def hold(step: int, losses: Losses) -> None:  # noqa: ARG001
        controller.update(losses.distillation, losses.detection, model.parameters())

    return hold


def matching_watcher(
    model: TinyDETR, data: ShapeImages, steps: int, seen: list[list[float]]
) -> Callable[[int, Losses], None]:
    """Return a function that notes, 20 times, how much of the last layer's matching has changed since the last time.

    The matching of the student to the labels of some images that it trains on.
    """
    some = data.select(torch.arange(min(200, len(data))))
    every = max(1, steps // 20)
    before: list[Tensor] = []

    def watch(step: int, losses: Losses) -> None:  # noqa: ARG001
        if step % every:
            return
        output = predict(model, some)
        after = dkl.match_targets(output.logits[-1:], output.boxes[-1:], *some.targets)
        if before:
            seen.append([step, rounded(dkl.assignment_instability(before.pop(), after).item())])
        before.append(after)

    return watch


def gradient(loss: Tensor, model: TinyDETR) -> Tensor:
    """Return the gradient by all parameters as one vector, 0 where the loss does not depend on them."""
    parameters = list(model.parameters())
    if not loss.requires_grad:
        return torch.zeros(sum(parameter.numel() for parameter in parameters))
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
    return torch.cat([each.flatten() for each in gradients])


def sum_of(losses: Mapping[str, Tensor], names: Iterable[str]) -> Tensor:
    """Return the sum of those losses that there are: a term that is at rest may have none."""
    return sum((losses[name] for name in names if name in losses), start=torch.zeros(()))


def fingerprint(name: str) -> dict[str, float]:
    """Return the losses of a setting on a few images, by detectors with random weights, in the middle of its schedules.

    They tell whether a setting still is what it was when a row was made of it.
    """
    setting, images = SETTINGS[name], make_shapes(8, 0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        student, model = (with_random_weights("demo", kind) for kind in (STUDENT, TEACHER))
        criterion = dkl.DETRDistillationLoss({key: part.make() for key, part in setting.parts.items()})
        teacher = Teacher.from_model(model, images)
        if setting.change is not None:
            teacher = setting.change(teacher, criterion.terms)
        if setting.parts:
            weight_schedule(criterion, setting.parts).update(0.4)
        losses = step_losses(student, images, torch.arange(8), teacher, criterion if setting.parts else None)
    values = {"detection": losses.detection, **losses.distillation}
    return {name: rounded(value.item()) for name, value in values.items()}


def with_random_weights(world: str, kind: Mapping[str, Any]) -> TinyDETR:
    """Return a detector in whose outputs everything depends on everything, from the heads on."""
    model = detector(world, kind)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def matched_iou(model: TinyDETR, data: ShapeImages) -> list[float]:
    """Return, layer by layer, how well the boxes fit those that the first training images are labelled with."""
    some = data.select(torch.arange(min(500, len(data))))
    output = predict(model, some)
    assignment = dkl.match_targets(output.logits, output.boxes, *some.targets)
    return [
        rounded(value)
        for value in dkl.matched_iou(
            output.boxes, some.targets.boxes.expand(len(output.boxes), -1, -1, -1), assignment
        ).tolist()
    ]


def curve(history: History) -> list[list[float]]:
    """Return step, AP and AP50 of the validation images, as often as they were computed."""
    values = zip(history.steps, history.ap, history.ap50, strict=True)
    return [[step, rounded(ap), rounded(ap50)] for step, ap, ap50 in values]


def rounded(number: float) -> float:
    """Return a number as a row has it."""
    return float(f"{number:.5g}")


def detector(world: str, model: Mapping[str, Any]) -> TinyDETR:
    """Return an untrained detector for the classes of a world."""
    return TinyDETR(num_classes=DATA_SETS[WORLDS[world].data_set].num_classes, **model)


# ---------------------------------------------------------------------------------------------------------- teachers


def teacher_file(world: str, teacher: str, cache: Path) -> Path:
    """Return where a teacher is kept: the same file in all worlds that differ in their student alone."""
    learnt = f"{WORLDS[world].teachers[teacher]} on {WORLDS[world]._replace(teachers={}, student={})}"
    return cache / f"{teacher}--{hashlib.sha256(learnt.encode()).hexdigest()[:8]}.pt"


def train_teacher(which: TeacherOf, cache: Path, on_step: Callable[[], None]) -> Row:
    """Train a teacher on the labels of its world, keep it, and return how good it is and what it cost."""
    world, name = which
    recipe: Recipe = WORLDS[world].teachers[name]
    torch.manual_seed(recipe.seed)
    model = detector(world, recipe.model)
    validation = held_out_images(world, VALIDATION)
    history = train(model, training_images(world), validation, steps=recipe.steps, seed=recipe.seed, on_step=on_step)
    test_ap, _ = evaluate(model, held_out_images(world, TEST))
    facts: Row = {
        "ap": rounded(history.ap[-1]),
        "test_ap": rounded(test_ap),
        "seconds": rounded(history.seconds),
        "matched_iou": matched_iou(model, training_images(world)),
    }
    keep_teacher(which, cache, model, facts)
    return {**which._asdict(), **facts}


def keep_teacher(which: TeacherOf, cache: Path, model: torch.nn.Module, facts: Row) -> None:
    """Save a teacher, so that its file is there when it is whole."""
    cache.mkdir(parents=True, exist_ok=True)
    path = teacher_file(*which, cache)
    unfinished = path.with_suffix(".part")
    torch.save({"weights": model.state_dict(), "facts": facts}, unfinished)
    unfinished.replace(path)


@lru_cache(maxsize=2)
def ready_teacher(world: str, teacher: str, cache: Path) -> Teacher:
    """Load a teacher, and what it says about all training images."""
    model = detector(world, WORLDS[world].teachers[teacher].model)
    model.load_state_dict(torch.load(teacher_file(world, teacher, cache))["weights"])
    return Teacher.from_model(model.eval(), all_images(world))


def teacher_facts(world: str, teacher: str, cache: Path) -> dict[str, Any]:
    """Return how good a teacher is, what it cost, and a fingerprint that tells it from another of the same recipe."""
    saved = torch.load(teacher_file(world, teacher, cache))
    digest = hashlib.sha256(b"".join(weight.numpy().tobytes() for weight in saved["weights"].values()))
    return {"name": teacher, **saved["facts"], "digest": digest.hexdigest()[:8]}
