"""Masks of RF-DETR in transformers, between models of other depth and size of mask."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers", reason="masks are read from a model of transformers")

import transformers

import detr_kd_losses as dkl

from support import zoo


def segmenter(seed, **options):
    torch.manual_seed(seed)
    config = transformers.RfDetrConfig(**{**zoo.rf_detr_options(zoo.WIDTH), **options})
    model = transformers.RfDetrForInstanceSegmentation(config)
    zoo.strengthen(model, seed)
    return model.eval()


def output_of(model):
    """What the last layer says."""
    said = model(**zoo.images(model))
    return dkl.DetectorOutput(said.logits, said.pred_boxes, masks=said.pred_masks)


@pytest.mark.parametrize("cells", ["boxes", "all"])
def test_another_depth_and_size(cells):
    teacher, student = segmenter(1), segmenter(0, decoder_layers=2, mask_downsample_ratio=8)
    with torch.no_grad():
        taught = output_of(teacher)
    output = output_of(student)
    assert output.masks.shape[-1] < taught.masks.shape[-1]
    criterion = dkl.DETRDistillationLoss([dkl.MaskTerm(cells=cells, matching="joint")])
    losses = criterion(output, taught, dkl.pad_targets(zoo.labels()))
    assert losses["loss_kd_mask"] > 0
    losses["loss_kd_mask"].backward()
    gradients = [parameter.grad for parameter in student.parameters() if parameter.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)


@torch.no_grad()
def test_a_model_teaches_itself_nothing():
    output = output_of(segmenter(0))
    losses = dkl.DETRDistillationLoss([dkl.MaskTerm(cells="all")])(output, output, dkl.pad_targets(zoo.labels()))
    assert losses["loss_kd_mask"] == 0
