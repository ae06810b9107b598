"""The adapter for the dict convention: it reads the outputs, leaves everything else alone, and fits the engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import detr_kd_losses as dkl
from detr_convention.adapter import (
    DetrReader,
    DistillationCriterion,
    Reader,
    attach_teacher,
)
from detr_convention.standin import SetCriterion, StandIn, train_one_epoch

from support.stand_ins import batch, stand_in

EXACT = {"rtol": 0, "atol": 1e-6}


def test_reader_stacks_all_layers_with_the_last_one_last() -> None:
    layers = [
        {"pred_logits": torch.full((2, 3, 4), float(k)), "pred_boxes": torch.full((2, 3, 4), -float(k))}
        for k in range(3)
    ]
    others = {"enc_outputs": layers[0], "interm_outputs": layers[0], "dn_meta": {"output_known_lbs_bboxes": layers[0]}}
    output = Reader(nn.Identity()).output({**layers[-1], "aux_outputs": layers[:-1], **others})
    assert output.logits[:, 0, 0, 0].tolist() == [0, 1, 2]
    assert output.boxes[:, 0, 0, 0].tolist() == [0, -1, -2]
    assert Reader(nn.Identity()).output(layers[-1]).logits.shape == (1, 2, 3, 4)


class TestDetrReader:
    """The full reader, on the stand-in."""

    @pytest.fixture
    def read(self) -> tuple[StandIn, DetrReader, dkl.DetectorOutput]:
        model = stand_in(0).eval()
        with torch.no_grad(), DetrReader(model) as reader:
            outputs = model(batch()[0])
            return model, reader, reader.output(outputs, reader.query_group())

    def test_own_queries_reproduce_the_predictions(self, read: Any) -> None:
        output = read[2]
        assert_close(output.group.logits, output.logits, **EXACT)
        assert_close(output.group.boxes, output.boxes, **EXACT)
        assert output.queries.shape == (3, 4, 12, 32)
        assert output.logits.std(2).amax() > 1e-2, "a test of queries needs queries that differ"

    def test_queries_and_features_are_what_the_heads_and_the_decoder_see(self, read: Any) -> None:
        model, _, output = read
        with torch.no_grad():
            assert_close(model.class_embed(output.queries), output.logits, **EXACT)
            assert_close(output.features, [model.backbone(batch()[0])], **EXACT)

    def test_padding_is_turned_into_validity(self, read: Any) -> None:
        _, reader, output = read
        assert output.padding_mask[0].all()
        padding = torch.zeros(4, 8, 8, dtype=torch.bool)
        padding[1, :, 6:] = True
        reader._options["memory_key_padding_mask"] = padding.flatten(1)
        layer = {"pred_logits": output.logits[-1], "pred_boxes": output.boxes[-1]}
        assert_close(reader.output(layer).padding_mask[0], ~padding)

    def test_group_equals_concatenation_under_a_block_mask(self, read: Any) -> None:
        model, reader, output = read
        teacher = stand_in(1, queries=17).eval()
        with torch.no_grad(), DetrReader(teacher) as teacher_reader:
            teacher(batch()[0])
            group = teacher_reader.query_group()
            layer = {"pred_logits": output.logits[-1], "pred_boxes": output.boxes[-1]}
            replayed = reader.output(layer, group)
            both = torch.cat([reader.query_group()["query_pos"], group["query_pos"]])
            _, memory = reader._arguments
            results = []
            for mask in (dkl.query_group_attention_mask([12, 17]), None):
                options = {**reader._options, "query_pos": both, "tgt_mask": mask}
                states = model.transformer.decoder(torch.zeros_like(both), memory, **options).transpose(1, 2)
                results.append(model.class_embed(states))
        masked, unmasked = results
        assert_close(masked[:, :, :12], output.logits, rtol=0, atol=1e-5)
        assert_close(masked[:, :, 12:], replayed.group.logits, rtol=0, atol=1e-5)
        assert (unmasked[:, :, :12] - output.logits).abs().max() > 1e-2, "the mask must matter"
        assert (unmasked[:, :, 12:] - replayed.group.logits).abs().max() > 1e-2, "the mask must matter"


def test_engine_trains_300_queries_under_900() -> None:
    """The engine knows nothing of the teacher; every term of it takes part, and they fall on a batch seen often."""
    student, teacher = stand_in(0, queries=300), stand_in(1, queries=900, layers=4)
    attach_teacher(student, teacher, reader=DetrReader)
    criterion = DistillationCriterion(SetCriterion(layers=3), dkl.DETRDistillationLoss())
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    images, targets = batch()
    history = train_one_epoch(student, criterion, [(images[:1], targets[:1])] * 6, optimizer)
    assert set(criterion.distillation.names) <= history[0].keys()
    first, last = (sum(term for name, term in step.items() if "kd" in name) for step in (history[0], history[-1]))
    assert last < 0.8 * first
