"""Faults in what a training run needs beside the losses, and in the padding of a teacher's queries."""

from __future__ import annotations

import math

import torch

import detr_kd_losses as dkl
from detr_kd_losses import step, terms
from detr_kd_losses.losses.features import mask
from detr_kd_losses.training import controller, pseudo_targets

from support.mutants.mutant import faults
from support.steps import C, make_output, make_targets

# Scores of three queries of one image: class 1 by 0.9, class 0 by 0.6 or more, nothing; and "no object", if a softmax.
LOGITS = torch.tensor([[[-3.0, 2.2, 1.0], [0.8, -1.0, 0.5], [-4.0, -4.0, 9.0]]])
BOXES = torch.tensor([[[0.3, 0.3, 0.2, 0.2], [0.6, 0.6, 0.2, 0.4], [0.8, 0.2, 0.1, 0.1]]])


def assert_targets(targets, labels, boxes):
    """The targets of the image are these, then padding."""
    assert targets.mask[0].tolist() == [True] * len(labels) + [False] * (targets.mask.shape[1] - len(labels))
    assert targets.labels[0].tolist() == labels + [0] * (targets.mask.shape[1] - len(labels))
    expected = torch.zeros_like(targets.boxes[0])
    for place, query in enumerate(boxes):
        expected[place] = BOXES[0, query]
    assert torch.equal(targets.boxes[0], expected)


def the_surest(max_examples):
    """Two of three queries are sure enough, the better first; one of exactly the threshold is."""
    logits = LOGITS[..., :2].flip(1)
    boxes = BOXES.flip(1)
    score = logits[0, 1, 0].sigmoid().item()
    assert_targets(dkl.pseudo_targets(logits, boxes, threshold=score, max_targets=4), [1, 0], [0, 1])
    assert_targets(dkl.pseudo_targets(logits, boxes, threshold=score, max_targets=1), [1], [0])


def of_the_last_layer(max_examples):
    """Layers before the last say nothing."""
    logits = torch.stack((9 - LOGITS[..., :2], LOGITS[..., :2]))
    assert_targets(dkl.pseudo_targets(logits, torch.stack((BOXES, BOXES)), max_targets=3), [1, 0], [0, 1])


def of_a_softmax(max_examples):
    """ "No object" is no class, and classes that a map joins are added."""
    options = {"max_targets": 3, "activation": "softmax"}
    assert_targets(dkl.pseudo_targets(LOGITS, BOXES, threshold=0.4, **options), [1, 0], [0, 1])
    logits = torch.tensor([[[1.0, 1.0, 1.2], [-9.0, 1.0, 1.2], [-9.0, -9.0, 0.0]]])
    assert_targets(dkl.pseudo_targets(logits, BOXES, class_map=[5, 5], **options), [5], [0])


def of_what_is_finite(max_examples):
    """A box that is not finite is no target."""
    boxes = BOXES.clone()
    boxes[0, 1, 3] = math.nan
    assert_targets(dkl.pseudo_targets(LOGITS[..., :2], boxes, max_targets=2), [1], [0])


def where_no_label_is(max_examples):
    """A pseudo target over a label is left out; one over padding is not, nor is one that is padding added."""
    labels = dkl.Targets(torch.tensor([[7, 7]]), BOXES[:, :2], torch.tensor([[True, False]]))
    said = dkl.Targets(torch.tensor([[1, 0, 2]]), BOXES, torch.tensor([[True, True, False]]))
    both = dkl.add_pseudo_targets(labels, said)
    assert both.mask.tolist() == [[True, False, False, True, False]]
    assert both.labels.tolist() == [[7, 7, 0, 0, 0]]
    nothing = dkl.add_pseudo_targets(labels._replace(mask=torch.zeros_like(labels.mask)), said, max_iou=0.0)
    assert nothing.mask.tolist() == [[False, False, True, True, False]]


def update(weight=1.0, *, share=0.2, task=1.0, updates=1, **options):
    """Weights of a term whose gradient is `weight` long, beside a task's of `task`."""
    criterion = dkl.DETRDistillationLoss([dkl.LogitsTerm(weight=weight)])
    held = dkl.ShareController(criterion, {"logits": share}, **{"rate": 1.0, "every": 1, **options})
    weights, parameter = [], torch.ones(1, requires_grad=True)
    for _ in range(updates):
        term = criterion.terms["logits"]
        losses = {name: term.weight * parameter.sum() / 2 for name in term.names[:2]}
        measured = held.update(losses, task * parameter.sum(), [parameter])
        weights.append(term.weight)
        if measured is not None:
            assert measured["logits"].wanted == share
    return weights


def the_wanted_share(max_examples):
    """At the whole rate one update arrives: 0.25 of 0.25 + 1 is a fifth. At half the rate it goes half of the way."""
    assert math.isclose(update()[0], 0.25)
    assert math.isclose(update(rate=0.5)[0], 0.5)
    assert math.isclose(update(task=4.0)[0], 1.0)


def within_bounds(max_examples):
    """No update is beyond the bounds, and none is by more than a factor of 10."""
    assert update(share=0.999)[0] == 10.0
    assert update(share=0.001)[0] == 0.1
    assert update(share=0.999, bounds=(0.5, 2.0))[0] == 2.0
    assert update(share=0.001, bounds=(0.5, 2.0))[0] == 0.5


def in_every_other_step(max_examples):
    """The first step is an update, then every so many."""
    weights = update(rate=0.5, every=2, updates=3)
    assert weights[0] == weights[1] != weights[2]


def what_is_nothing(max_examples):
    """Neither a norm that is not finite nor a term that is alone or off moves a weight."""
    assert update(task=math.nan) == [1.0]
    assert update(task=0.0) == [1.0]
    assert update(weight=0.0) == [0.0]


def padded_step(**options):
    """A step whose teacher has 6 queries in the first image and 4 in the second, others behind."""
    student = make_output(0, 2, 7, group=6, bins=3, mask_size=(3, 4), requires_grad=True, **options)
    teacher = make_output(1, 2, 6, bins=3, mask_size=(3, 4), **options)
    return student, teacher._replace(query_mask=torch.arange(6) < torch.tensor([[6], [4]])), make_targets()


def padding_has_no_part(term, **heads):
    """What stands in the padding changes nothing, and nothing there has a gradient."""

    def check(max_examples):
        criterion = dkl.DETRDistillationLoss([term()], **heads)
        channels = C + ("student_activation" in heads)
        results = []
        for value in (0.0, 3.0):
            student, teacher, targets = padded_step(channels=channels)
            padding = ~teacher.query_mask.unsqueeze(-1)
            group = dkl.Predictions(
                *(part.detach().masked_fill(padding, value + 0.1).requires_grad_() for part in student.group)
            )
            said = {name: getattr(teacher, name).masked_fill(padding, value) for name in ("logits", "boxes", "queries")}
            losses = criterion(student._replace(group=group), teacher._replace(**said), targets)
            total = sum(losses.values())
            if total.requires_grad:
                total.backward()
            assert group.logits.grad is None or not group.logits.grad.masked_select(padding).any()
            results.append(losses)
        for name, loss in results[0].items():
            assert loss.item() == results[1][name].item(), name

    return check


def by_their_own_number(max_examples):
    """A mask of an image that is divided by the number of its queries does not see those of another."""
    features, queries, quality = torch.rand(2, 4, 3, 3), torch.rand(2, 6, 4), torch.rand(2, 6)
    query_mask = torch.arange(6) < torch.tensor([[6], [4]])
    queries[~query_mask] = quality[~query_mask] = math.nan
    for variant in ("paper", "official"):
        options = {"variant": variant, "normalize": "queries"}
        both = dkl.target_aware_mask(features, queries, quality, query_mask=query_mask, **options)
        alone = dkl.target_aware_mask(features[1:], queries[1:, :4], quality[1:, :4], **options)
        torch.testing.assert_close(both[1:], alone)


def what_else_a_teacher_says(max_examples):
    """A teacher with padding still has its box distributions and masks."""
    criterion = dkl.DETRDistillationLoss([dkl.BoxDistributionTerm(), dkl.MaskTerm()])
    try:
        losses = criterion(*padded_step())
    except ValueError as error:
        raise AssertionError(str(error)) from error
    assert all(loss > 0 for loss in losses.values())


MUTANTS = [
    *faults(
        pseudo_targets.pseudo_targets,
        ("the threshold is not enough", "scores >= threshold", "scores > threshold", the_surest),
        ("pseudo targets of the first layer", "logits[-1], boxes[-1]", "logits[0], boxes[0]", of_the_last_layer),
        ("boxes that are not finite", "& boxes.isfinite().all(-1)", "", of_what_is_finite),
        ("the first and not the best", "torch.where(is_target, scores, -1.0)", "is_target.float()", the_surest),
    ),
    *faults(
        pseudo_targets._best_class,
        ("no object is a class", "logits.softmax(-1)[..., :-1]", "logits.softmax(-1)", of_a_softmax),
        ("classes of one name are not added", "-1, first, scores", "-1, first, scores / 2", of_a_softmax),
    ),
    *faults(
        pseudo_targets.add_pseudo_targets,
        ("over a label all the same", "& ~taken", "", where_no_label_is),
        ("padding is a label", "& targets.mask.unsqueeze(-2)", "", where_no_label_is),
        ("padding is added", "pseudo.mask & ~taken", "~taken", where_no_label_is),
    ),
    *faults(
        controller.ShareController._moved,
        ("at once", "** self.rate", "** 1.0", the_wanted_share),
        ("a share is its ratio", "wanted * (1 - share) / (share * (1 - wanted))", "wanted / share", the_wanted_share),
        ("one odd batch moves much", "max(ratio, 1 / _MOST), _MOST)", "max(ratio, 1e-9), 1e9)", within_bounds),
        ("no upper bound", "self.bounds[0]), self.bounds[1])", "self.bounds[0]), 1e9)", within_bounds),
        ("no lower bound", "max(moved, self.bounds[0])", "moved", within_bounds),
    ),
    *faults(
        controller.ShareController.update,
        ("in every step", "due = self.steps % self.every == 0", "due = True", in_every_other_step),
        ("one that is alone is moved", "and 0 < share < 1", "and 0 < share", what_is_nothing),
    ),
    *faults(
        controller.ShareController._measure,
        ("the task is forgotten", "[gradient_norm(task_loss, learned)]", "[torch.zeros(())]", the_wanted_share),
        ("half of a term", "for name in term.names if", "for name in term.names[:1] if", the_wanted_share),
    ),
    *faults(
        step._without_padding,
        (
            "padding keeps its logits",
            "torch.where(column, teacher.logits, nothing(teacher.logits, activation))",
            "teacher.logits",
            padding_has_no_part(lambda: dkl.FeatureTerm(variant="official", topk=5)),
        ),
        ("box distributions are lost", "teacher.distributions, teacher.masks", "None, None", what_else_a_teacher_says),
    ),
    *faults(
        terms.shared_queries.SharedQueryTerm.compute,
        (
            "shared padding",
            "query_mask=mask",
            "query_mask=None",
            padding_has_no_part(lambda: dkl.SharedQueryTerm(weighting="uniform")),
        ),
    ),
    *faults(
        terms.query_group.QueryGroupTerm.compute,
        (
            "padding in a group",
            "query_mask=step.group_mask()",
            "query_mask=None",
            padding_has_no_part(dkl.QueryGroupTerm, student_activation="softmax", teacher_activation="softmax"),
        ),
    ),
    *faults(
        mask.without_padding,
        ("the number with padding", "query_mask.sum(-1, keepdim=True)", "queries.shape[-2]", by_their_own_number),
        ("padding has quality", "quality.where(mask, 0.0)", "quality", by_their_own_number),
    ),
]
