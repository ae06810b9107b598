"""What the terms over matched queries make of a step, beside classes and boxes."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.testing import assert_close

import detr_kd_losses as dkl

from support.steps import make_output, make_targets


def distil(term, student, teacher, targets):
    return dkl.DETRDistillationLoss([term])(student, teacher, targets)


def pair(student, teacher, targets):
    """The assignment through the targets, and what selects the teacher's layers."""
    select = partial(dkl.select_stages, num_student_stages=len(student.logits))
    own = dkl.match_targets(student.logits, student.boxes, *targets)
    assigned = dkl.match_targets(teacher.logits, teacher.boxes, *targets)
    return dkl.match_through_targets(own, select(assigned), targets.mask.shape[-1]), assigned, select


def steps(**options):
    student = make_output(0, 3, 7, requires_grad=True, **options)
    return student, make_output(1, 6, 9, **options), make_targets()


def test_box_distributions_of_other_bins():
    student = make_output(0, 3, 7, bins=5, requires_grad=True)
    teacher, targets = make_output(1, 6, 9, bins=8), make_targets()
    teacher = teacher._replace(distributions=teacher.distributions._replace(scale=torch.tensor([3.0])))
    assignment, assigned, select = pair(student, teacher, targets)
    own, taught = student.distributions, teacher.distributions
    expected = dkl.box_distribution_loss(
        own.logits,
        own.references,
        select(taught.logits),
        select(taught.references),
        assignment,
        student_bins=own.bins,
        teacher_bins=taught.bins,
        student_scale=4.0,
        teacher_scale=3.0,
        teacher_weight=select(dkl.localization_weight(teacher.logits, teacher.boxes, targets.boxes, assigned)),
        temperature=5.0,
    )
    losses = distil(dkl.BoxDistributionTerm(temperature=5.0, weight=2.0), student, teacher, targets)
    assert expected > 0
    assert_close(losses, {"loss_kd_box_distribution": 2 * expected})
    sum(losses.values()).backward()
    assert own.logits.grad.abs().sum() > 0


@pytest.mark.parametrize("cells", ["boxes", "all"])
def test_masks_of_another_size(cells):
    student = make_output(0, 3, 7, mask_size=(4, 5), requires_grad=True)
    teacher, targets = make_output(1, 6, 9, mask_size=(7, 6)), make_targets()
    assignment, _, select = pair(student, teacher, targets)
    boxes = select(teacher.boxes) if cells == "boxes" else None
    expected = dkl.mask_distillation_loss(student.masks, select(teacher.masks), assignment, boxes=boxes)
    losses = distil(dkl.MaskTerm(cells=cells), student, teacher, targets)
    assert expected > 0
    assert_close(losses, {"loss_kd_mask": expected})


@pytest.mark.parametrize("padded", [1, 3, 12])
@pytest.mark.parametrize("term", [dkl.MaskTerm, dkl.BoxDistributionTerm])
def test_only_queries_that_can_have_a_partner_are_compared(term, padded, monkeypatch):
    """With fewer targets than queries, and with more: the gradients are those of all queries."""
    student, teacher, _ = steps(mask_size=(3, 4), bins=5)
    targets = make_targets((min(padded, 3), 1), padded)
    wrt = student.masks if term is dkl.MaskTerm else student.distributions.logits
    results = []
    for everyone in (False, True):
        if everyone:
            monkeypatch.setattr(term, "leave_out_the_single", lambda self, step, *said: list(said))
        losses = distil(term(), student, teacher, targets)
        results.append((losses, torch.autograd.grad(sum(losses.values()), wrt)))
    assert_close(*results)
    assert results[0][1][0].any()


@pytest.mark.parametrize(
    ("options", "field", "term"),
    [({"mask_size": (3, 4)}, "masks", dkl.MaskTerm), ({"bins": 5}, "distributions", dkl.BoxDistributionTerm)],
)
def test_a_term_applies_where_both_have_its_field(options, field, term):
    student, teacher, targets = steps(**options)
    without = [output._replace(**{field: None}) for output in (student, teacher)]
    assert distil(term(), *without, targets) == {}
    with pytest.raises(ValueError, match=f"`student.{field}` must be given where `teacher.{field}` is, got None"):
        distil(term(), without[0], teacher, targets)
    with pytest.raises(ValueError, match=f"`teacher.{field}` must be given where `student.{field}` is, got None"):
        distil(term(), student, without[1], targets)
    (zero,) = distil(term(weight=0.0), student, teacher, targets).values()
    zero.backward()
    assert zero == 0


@pytest.mark.parametrize(("options", "field", "term"), [({"bins": 5}, "distributions", dkl.BoxDistributionTerm)])
def test_one_layer_needs_no_dimension_of_layers(options, field, term):
    *outputs, targets = steps(**options)
    of_one = [each._replace(logits=each.logits[-1:], boxes=each.boxes[-1:], queries=None) for each in outputs]

    def take(value, index):
        if isinstance(value, torch.Tensor):
            return value[index]
        return value._replace(logits=value.logits[index], references=value.references[index])

    layered, flat = (
        [output._replace(**{field: take(getattr(output, field), index)}) for output in of_one]
        for index in (slice(-1, None), -1)
    )
    flat = [output._replace(logits=output.logits[0], boxes=output.boxes[0]) for output in flat]
    assert_close(distil(term(), *flat, targets), distil(term(), *layered, targets))


@pytest.mark.parametrize("number", [6, 8])
def test_another_number_of_queries_is_named(number):
    student, teacher, targets = steps(mask_size=(3, 4))
    masks = torch.rand(3, 2, number, 3, 4)
    with pytest.raises(ValueError, match=r"`assignment` and `student_masks` must have the same dimensions \(..., N\)"):
        distil(dkl.MaskTerm(), student._replace(masks=masks), teacher, targets)


def test_distributions_are_a_record():
    student, teacher, targets = steps(bins=5)
    wrong = student._replace(distributions=tuple(student.distributions))
    with pytest.raises(TypeError, match=r"`student\.distributions` must be a BoxDistributions, got tuple: pass"):
        distil(dkl.BoxDistributionTerm(), wrong, teacher, targets)
    moved = student.to("meta").distributions
    assert isinstance(moved, dkl.BoxDistributions)
    assert moved.bins.device.type == "meta"
