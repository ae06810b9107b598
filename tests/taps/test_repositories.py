"""DETR and the repositories after it, by signature: heads outside the decoder, sequences first, groups, padding."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.testing import assert_close

import detr_kd_losses as dkl
from detr_kd_losses.taps import Tap, query_channels

from support import repositories
from support.decoder_parts import CLASSES, WIDTH, images, targets
from support.repositories import GROUPS, LAYERS, QUERIES, NestedTensor

EXACT = {"rtol": 0, "atol": 1e-5}
kinds = pytest.mark.parametrize("kind", list(repositories.KINDS))
PROJECTING = [kind for kind in repositories.KINDS if kind.startswith(("deformable", "dino", "rf"))]
PARTS = {
    "detr": {"content", "position"},
    "conditional": {"content", "position"},
    "dab": {"content", "reference"},
    "dn": {"content", "reference"},
    "dino": {"content", "reference"},
    "rf_detr": {"content", "reference"},
}


def samples() -> NestedTensor:
    return NestedTensor(images(size=(48, 48)), padded=16)


@kinds
@pytest.mark.parametrize("training", [True, False])
def test_own_queries_at_every_layer(kind: str, training: bool) -> None:
    """Without those of denoising; of groups the first, which is the one that evaluation uses."""
    model = repositories.build(kind).train(training)
    with Tap(model) as tap:
        outputs = repositories.call(model, samples(), targets() if training else None)
    output = tap.output()
    layers = [*outputs["aux_outputs"], outputs]
    assert output.logits.shape == (LAYERS, 2, QUERIES, CLASSES + (kind == "detr"))
    for index, layer in enumerate(layers):
        expected = tuple(layer[name][:, :QUERIES] for name in ("pred_logits", "pred_boxes"))
        assert_close((output.logits[index], output.boxes[index]), expected, **EXACT)
    assert output.queries.shape == (LAYERS, 2, QUERIES, WIDTH)
    assert tap.activation == ("softmax" if kind == "detr" else "sigmoid")


@kinds
@pytest.mark.parametrize("training", [True, False])
def test_own_queries_replayed(kind: str, training: bool) -> None:
    model = repositories.build(kind).train(training)
    with Tap(model) as tap:
        repositories.call(model, samples(), targets() if training else None)
    group = tap.query_group()
    assert group.parts.keys() == PARTS.get(kind, {"content", "position", "reference"})
    output = tap.output(group=group)
    assert_close((output.group.logits, output.group.boxes), (output.logits, output.boxes), **EXACT)
    assert [module.training for module in model.modules()] == [training] * len(list(model.modules()))


@kinds
def test_features_and_their_padding(kind: str) -> None:
    model = repositories.build(kind).eval()
    with Tap(model) as tap:
        repositories.call(model, samples())
    features, valid = tap.features()
    levels = 2 if kind in PROJECTING else 1
    assert_close(features, model.backbone(samples().tensors)[:levels], rtol=0, atol=0)
    for stride, mask in zip((8, 16), valid, strict=False):
        assert_close(mask, ~samples().mask[:, ::stride, ::stride], rtol=0, atol=0)


@kinds
def test_a_teacher_teaches_all_and_nothing_if_equal(kind: str) -> None:
    student, teacher = repositories.build(kind).eval(), repositories.build(kind, seed=1).eval()
    with torch.no_grad(), Tap(teacher) as teacher_tap:
        repositories.call(teacher, samples())
    group = teacher_tap.query_group(share=0.5)
    outputs = []
    for model in (student, copy.deepcopy(student)):
        with torch.no_grad(), Tap(model) as tap:
            repositories.call(model, samples())
        outputs.append(tap.output(group=group))
    head = dict.fromkeys(("student_activation", "teacher_activation"), tap.activation)
    terms = [dkl.LogitsTerm(), dkl.FeatureTerm(), dkl.SharedQueryTerm(stage_map="even")]
    losses = dkl.DETRDistillationLoss(terms, **head)(*outputs, dkl.pad_targets(targets()))
    assert len(losses) == 7
    assert max(losses.values()) < 1e-5
    other = dkl.DETRDistillationLoss([dkl.LogitsTerm()], **head)
    assert min(other(outputs[0], teacher_tap.output(), dkl.pad_targets(targets())).values()) > 1e-3


@pytest.mark.parametrize("kind", PROJECTING)
def test_memory_is_projected_once(kind: str) -> None:
    model = repositories.build(kind).train()
    with Tap(model) as tap:
        repositories.call(model, samples(), targets())
    assert len(tap.call.projections) == LAYERS
    tap.output(group=tap.query_group()).group.logits.sum().backward()
    projection = model.transformer.decoder.layers[0].cross_attn.value_proj
    assert projection.weight.grad.abs().sum() > 0


def test_groups_split_queries_no_more_when_replayed() -> None:
    """As many queries as one likes, of which no group sees less than all."""
    model = repositories.build("rf_detr").train()
    with Tap(model) as tap:
        outputs = repositories.call(model, samples())
    assert outputs["pred_logits"].shape[1] == GROUPS * QUERIES
    group = tap.query_group(torch.tensor([[0, 3, 5, 1, 2]] * 2))
    assert tap.replay(group).logits.shape == (LAYERS, 2, 5, CLASSES)


def test_boxes_of_an_rf_detr_that_are_not_reparametrised() -> None:
    model = repositories.build("rf_detr").eval()
    with Tap(model) as tap:
        repositories.call(model, samples())
    states, references = tap.call.output
    model.transformer.decoder.bbox_reparam = False
    assert_close(tap.output().boxes, (model.bbox_embed(states) + references).sigmoid(), rtol=0, atol=0)


def test_patterns_multiply_the_queries_of_dab_detr() -> None:
    model = repositories.build("dn").train()
    model.transformer.num_patterns = 2
    model.query_embed = torch.nn.Embedding(2 * QUERIES, 4)
    whole = repositories.QUERIES * 2
    with Tap(model) as tap:
        model.transformer(
            torch.randn(2, WIDTH, 3, 3), torch.zeros(2, 3, 3, dtype=torch.bool), torch.randn(whole + 4, 2, 4),
            torch.zeros(2, WIDTH, 3, 3), torch.zeros(whole + 4, 2, WIDTH), torch.zeros(whole + 4, whole + 4).bool(),
        )  # fmt: skip
    assert tap.output().logits.shape[2] == whole


def test_one_box_head_for_each_layer_of_dab_detr() -> None:
    model = repositories.build("dab").eval()
    with Tap(model) as tap:
        expected = repositories.call(model, samples())["pred_boxes"]
    model.bbox_embed = torch.nn.ModuleList([model.bbox_embed] * LAYERS)
    assert_close(tap.output().boxes[-1], expected, **EXACT)


def test_student_and_teacher_of_different_repositories() -> None:
    """Logits, boxes and features of any; queries where both have the same kind, whatever the unit of their boxes."""

    def tapped(model: torch.nn.Module) -> Tap:
        with Tap(model.eval()) as tap:
            repositories.call(model, samples())
        return tap

    dino, rf_detr, detr = (tapped(repositories.build(kind)) for kind in ("dino", "rf_detr", "detr"))
    output = dino.output(group=rf_detr.query_group())
    assert output.group.boxes.isfinite().all()
    assert (rf_detr.query_group().unit, dino.query_group().unit) == ("box", "logit")
    inverse = rf_detr.query_group().reference.logit(eps=1e-5)
    as_logits = rf_detr.query_group()._replace(reference=inverse, unit="logit")
    assert_close(output.group, dino.output(group=as_logits).group, **EXACT)
    with pytest.raises(
        ValueError, match=r"must have the parts \['content', 'reference'\] .* got \['content', 'position"
    ):
        dino.output(group=detr.query_group())


@kinds
def test_width(kind: str) -> None:
    assert query_channels(repositories.build(kind)) == WIDTH
