"""Shared queries in transformers: all queries of the teacher, or the surest of them."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("transformers", reason="the Hugging Face adapter needs transformers")

import detr_kd_losses as dkl
from detr_kd_losses.taps import Tap, distillation_loss

from support import zoo

families = pytest.mark.parametrize("family", list(zoo.FAMILIES))


@families
@torch.no_grad()
def test_queries_may_be_chosen(family: str) -> None:
    """In another order, which differs between images, they get the same answers in that order."""
    model = zoo.build(family)
    with Tap(model) as tap:
        model(**zoo.images(model))
    own = tap.output()
    number = own.logits.shape[2]
    index = torch.stack([torch.arange(number).flip(0), torch.arange(number).roll(1)])[: len(own.logits[0])]
    output = tap.output(group=tap.query_group(index))
    assert torch.equal(output.group_index, index)
    for answers, chosen in zip(own[:2], output.group, strict=True):
        expected = torch.stack([answers[:, image, order] for image, order in enumerate(index)], 1)
        assert_close(chosen, expected, rtol=1e-4, atol=1e-4)


@families
def test_the_surest_queries_teach(family: str) -> None:
    teacher, student = zoo.build(family, seed=1), zoo.build(family)
    with torch.no_grad(), Tap(teacher) as teacher_tap:
        teacher(**zoo.images(teacher))
    with Tap(student) as tap:
        student(**zoo.images(student))
    answers = teacher_tap.output()
    index = dkl.best_queries(answers.logits[-1], 1 / 3, activation=teacher_tap.activation)
    output = tap.output(group=teacher_tap.query_group(share=1 / 3))
    assert torch.equal(output.group_index, index)
    assert output.group.logits.shape[2] == index.shape[1] < answers.logits.shape[2]
    criterion = distillation_loss(student, teacher, terms=[dkl.SharedQueryTerm(), dkl.QueryGroupTerm()])
    losses = criterion(output, answers, dkl.pad_targets(zoo.labels()))
    sum(losses.values()).backward()
    gradients = [parameter.grad for parameter in student.model.decoder.parameters() if parameter.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)
