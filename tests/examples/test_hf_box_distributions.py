"""Box distributions of D-FINE and DEIMv2 in transformers, between models of other depth, width and bins."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("transformers", reason="the Hugging Face adapter needs transformers")

import detr_kd_losses as dkl
from detr_kd_losses.taps import QueryProjection, Tap, distillation_loss, random_queries

from support import zoo

families = pytest.mark.parametrize("family", ["d_fine", "deimv2"])


def tapped(model, **options):
    with Tap(model) as tap:
        model(**zoo.images(model))
    return tap, tap.output(**options)


@families
def test_another_depth_and_other_bins(family: str) -> None:
    teacher, student = zoo.build(family, seed=1), zoo.build(family, decoder_layers=2, max_num_bins=16)
    with torch.no_grad():
        teacher_tap, taught = tapped(teacher)
    _, output = tapped(student, group=teacher_tap.query_group())
    # Untrained boxes may miss their targets, which would weigh nothing.
    terms = [dkl.BoxDistributionTerm(weighting="uniform"), dkl.SharedQueryTerm()]
    criterion = distillation_loss(student, teacher, terms=terms)
    losses = criterion(output, taught, dkl.pad_targets(zoo.labels()))
    assert losses["loss_kd_box_distribution"] > 0
    sum(losses.values()).backward()
    gradients = [parameter.grad for parameter in student.model.decoder.parameters() if parameter.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)


@families
@pytest.mark.parametrize("queries", ["own", "random"])
def test_another_width_too(family: str, queries: str) -> None:
    """Queries that run through both decoders reach a narrower student by a learned map."""
    teacher = zoo.build(family, seed=1)
    student = zoo.build(family, width=zoo.WIDTH // 2, decoder_layers=2, max_num_bins=16)
    projection = QueryProjection(student, teacher)
    with torch.no_grad(), Tap(teacher) as teacher_tap:
        teacher(**zoo.images(teacher))
    group = teacher_tap.query_group()
    if queries == "random":
        group = random_queries(group, 5)
    taught = teacher_tap.output(group=group if queries == "random" else None)
    _, output = tapped(student, group=projection(group))
    terms = [dkl.BoxDistributionTerm(weighting="uniform"), dkl.SharedQueryTerm()]
    losses = distillation_loss(student, teacher, terms=terms)(output, taught, dkl.pad_targets(zoo.labels()))
    assert all(loss > 0 for loss in losses.values())
    sum(losses.values()).backward()
    for module in (student.model.decoder, projection):
        gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
        assert gradients
        assert all(gradient.isfinite().all() for gradient in gradients)


@families
@torch.no_grad()
def test_a_model_teaches_itself_nothing(family: str) -> None:
    model = zoo.build(family)
    _, output = tapped(model)
    losses = distillation_loss(model, copy.deepcopy(model), terms=[dkl.BoxDistributionTerm(weighting="uniform")])(
        output, output, dkl.pad_targets(zoo.labels())
    )
    assert losses["loss_kd_box_distribution"] == 0
