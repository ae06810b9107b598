"""The heirs of RT-DETR, by signature: all layers, any size, their own queries alone, replays, distributions."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.testing import assert_close

import detr_kd_losses as dkl
from detr_kd_losses.taps import Tap, query_channels

from support import lineage
from support.decoder_parts import WIDTH, images, targets

KINDS = list(lineage.DECODERS)
EXACT = {"rtol": 0, "atol": 1e-5}
kinds = pytest.mark.parametrize("kind", KINDS)
with_dict = pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "ultralytics"])


@kinds
def test_all_layers_in_evaluation_too(kind: str) -> None:
    """In the same weights, so that all that differs is the mode."""
    model = lineage.build(kind, eval_size=None)
    with Tap(model.train()) as tap:
        model(images())
    expected = tap.output()
    with torch.no_grad(), Tap(model.eval()) as tap:
        model(images())
    output = tap.output()
    assert output.logits.shape[0] == output.queries.shape[0] == lineage.LAYERS
    assert_close((output.logits, output.boxes), (expected.logits.detach(), expected.boxes.detach()), **EXACT)
    assert not model.decoder.decoder.training


@kinds
@pytest.mark.parametrize("eval_idx", [-1, 1])
def test_answer_in_evaluation_does_not_change(kind: str, eval_idx: int) -> None:
    """Also where the decoder stops before its last layer."""
    model = lineage.build(kind, eval_idx=eval_idx).eval()
    plain = model(images(size=lineage.EVAL_SIZE))
    with Tap(model) as tap:
        tapped = model(images(size=lineage.EVAL_SIZE))
    assert_close(tapped, plain, rtol=0, atol=0)
    assert len(tap.output().logits) == lineage.LAYERS
    assert_close(model(images(size=lineage.EVAL_SIZE)), plain, rtol=0, atol=0)


@kinds
def test_any_size_of_images(kind: str) -> None:
    """Stock configurations fix the size in evaluation, and train at many."""
    model = lineage.build(kind).eval()
    with pytest.raises(RuntimeError, match="size"):
        model(images())
    with Tap(model):
        model(images())
    assert model.decoder.eval_spatial_size == model.encoder.eval_spatial_size == lineage.EVAL_SIZE


@kinds
def test_frozen_teacher_shows_all_layers(kind: str) -> None:
    """It puts itself into evaluation mode at each call, as a whole."""
    teacher = dkl.FrozenTeacher(lineage.build(kind))
    with Tap(teacher.module) as tap:
        teacher(images())
    assert len(tap.output().logits) == lineage.LAYERS


@with_dict
def test_own_queries_alone_in_training(kind: str) -> None:
    """Without denoising queries, and without the encoder's proposals, which v1 puts among its layers."""
    model = lineage.build(kind).train()
    with Tap(model) as tap:
        outputs = model(images(), targets())
    output = tap.output()
    assert output.logits.shape == (lineage.LAYERS, 2, lineage.QUERIES, lineage.CLASSES)
    layers = [*outputs["aux_outputs"][: lineage.LAYERS - 1], outputs]
    for index, layer in enumerate(layers):
        assert_close((output.logits[index], output.boxes[index]), (layer["pred_logits"], layer["pred_boxes"]), **EXACT)
    assert tap.query_group().shapes == {"content": (2, lineage.QUERIES, WIDTH), "reference": (2, lineage.QUERIES, 4)}


@kinds
@pytest.mark.parametrize("training", [True, False])
def test_own_queries_replayed(kind: str, training: bool) -> None:
    model = lineage.build(kind).train(training)
    with Tap(model) as tap:
        model(images(), targets() if training else None)
    output = tap.output(group=tap.query_group())
    assert_close((output.group.logits, output.group.boxes), (output.logits, output.boxes), **EXACT)


@kinds
def test_replay_equals_concatenation_under_a_block_mask(kind: str) -> None:
    """The definition of an extra group; without the mask, queries see each other and differ."""
    teacher, student = lineage.build(kind, seed=1, queries=9).eval(), lineage.build(kind).eval()
    with torch.no_grad():
        with Tap(teacher) as teacher_tap:
            teacher(images())
        with Tap(student) as tap:
            student(images())
        group = teacher_tap.query_group()
        replayed = tap.output(group=group)
        blocks = torch.ones(lineage.QUERIES + 9, lineage.QUERIES + 9, dtype=torch.bool)
        blocks[: lineage.QUERIES, : lineage.QUERIES] = blocks[lineage.QUERIES :, lineage.QUERIES :] = False
        for mask, agrees in ((blocks, True), (torch.zeros_like(blocks), False)):
            arguments = dict(tap.call.arguments) | {"attn_mask": mask}
            for role, part in group.parts.items():
                name = tap.call.roles[role]
                arguments[name] = torch.cat([arguments[name], part], 1)
            if kind == "d_fine":
                arguments["dn_meta"] = {}
            student.decoder.decoder.train()
            boxes, logits = student.decoder.decoder(**arguments)[:2]
            student.decoder.decoder.eval()
            together = (logits[:, :, lineage.QUERIES :], boxes[:, :, lineage.QUERIES :])
            difference = max((a - b).abs().max() for a, b in zip(together, replayed.group, strict=True))
            assert (difference < 1e-5) == agrees, difference


@kinds
def test_teacher_equal_to_the_student_teaches_nothing(kind: str) -> None:
    student = lineage.build(kind).eval()
    outputs = []
    for model in (student, copy.deepcopy(student)):
        with torch.no_grad(), Tap(model) as tap:
            model(images())
        outputs.append(tap.output(group=tap.query_group()))
    terms = [dkl.LogitsTerm(), dkl.FeatureTerm(), dkl.SharedQueryTerm(stage_map="even")]
    losses = dkl.DETRDistillationLoss(terms)(*outputs, dkl.pad_targets(targets()))
    assert len(losses) == 7
    assert max(losses.values()) < 1e-5


@kinds
def test_features_are_the_maps_that_the_decoder_sees(kind: str) -> None:
    model = lineage.build(kind).train()
    with Tap(model) as tap:
        model(images())
    expected = model.encoder(model.backbone(images()))
    features, padding = tap.features()
    assert_close(features, expected, rtol=0, atol=0)
    assert padding is None
    assert_close(tap.output(levels=[1]).features, expected[1:], rtol=0, atol=0)


@pytest.mark.parametrize("training", [True, False])
def test_distributions_give_the_boxes(training: bool) -> None:
    model = lineage.build("d_fine").train(training)
    with Tap(model) as tap:
        model(images(), targets() if training else None)
    output = tap.output()
    logits, references, bins, scale = output.distributions
    assert_close(bins, lineage.weighting_of_the_paper(lineage.BINS, 0.5, 4.0), rtol=1e-5, atol=1e-6)
    assert logits.shape == (lineage.LAYERS, 2, lineage.QUERIES, 4 * (lineage.BINS + 1))
    boxes = lineage.moved_edges(references, lineage.Integral()(logits, bins), float(scale))
    assert_close(boxes, output.boxes, **EXACT)


@pytest.mark.parametrize("kind", ["v1", "v2", "ultralytics"])
def test_memory_is_projected_once_with_gradients(kind: str) -> None:
    """The gradients of a replay are those of a decoder that projects again."""
    gradients = []
    for keep in (True, False):
        model = lineage.build(kind).train()
        with Tap(model) as tap:
            model(images(), targets())
        assert len(tap.call.projections) == lineage.LAYERS
        if not keep:
            tap.call = tap.call._replace(projections={})
        seen = []
        hooks = [
            layer.cross_attn.value_proj.register_forward_hook(
                lambda _, __, output, seen=seen: seen.append(output.shape[1])
            )
            for layer in model.decoder.decoder.layers
        ]
        output = tap.output(group=tap.query_group())
        assert (max(seen) == 0) == keep
        for hook in hooks:
            hook.remove()
        sum(tensor.square().sum() for tensor in (*output.group, output.logits)).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert_close(*gradients, rtol=1e-4, atol=1e-4)


@kinds
def test_fewer_cells_than_queries(kind: str) -> None:
    """Ultralytics takes as many as there are."""
    model = lineage.build(kind, queries=40).train()
    with Tap(model) as tap:
        model(images(size=(32, 32)), targets())
    assert tap.output().logits.shape[2] == 20


@kinds
def test_width(kind: str) -> None:
    assert query_channels(lineage.build(kind, width=24)) == 24


def test_layers_of_different_widths_have_no_queries_to_stack() -> None:
    """The later layers of a D-FINE may be wider than the first."""
    model = lineage.build("v2").eval()
    model.decoder.decoder.layers[-1].register_forward_hook(lambda _, __, output: output.repeat(1, 1, 2))
    model.decoder.dec_bbox_head[-1] = torch.nn.Linear(2 * WIDTH, 4)
    model.decoder.dec_score_head[-1] = torch.nn.Linear(2 * WIDTH, lineage.CLASSES)
    with Tap(model) as tap:
        model(images())
    assert tap.output().queries is None
