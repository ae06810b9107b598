"""The heirs of RT-DETR in transformers that cannot be trained there, but can be read as teachers."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

pytest.importorskip("transformers", reason="the models are those of transformers")

import transformers

from detr_kd_losses.taps import Tap

from support import zoo


def build(version: str) -> nn.Module:
    options = zoo.d_fine_options(zoo.WIDTH)
    if version == "V2":
        options |= {"class_thresholds": [0.5] * zoo.CLASSES, "class_order": list(range(zoo.CLASSES))}
    else:  # its masks need a map of stride 4 as well
        backbone = options["backbone_config"].to_dict()
        names = ("stem_channels", "stage_in_channels", "stage_mid_channels", "stage_out_channels", "stage_num_blocks")
        kept = {name: backbone[name] for name in (*names, "stage_numb_of_layers", "embedding_size", "hidden_sizes")}
        stages = {"out_features": ["stage1", "stage2", "stage3", "stage4"], "return_idx": [0, 1, 2, 3]}
        options |= {"backbone_config": transformers.HGNetV2Config(**kept, depths=[1] * 4, **stages), "x4_feat_dim": 16}
    config = getattr(transformers, f"PPDocLayout{version}Config")(**options)
    model = getattr(transformers, f"PPDocLayout{version}ForObjectDetection")(config)
    zoo.strengthen(model, 0)
    return model.eval()


@pytest.mark.parametrize("version", ["V2", "V3"])
@torch.no_grad()
def test_predictions_and_replay(version: str) -> None:
    model = build(version)
    with Tap(model) as tap:
        answer = model(pixel_values=torch.rand(2, 3, 128, 96))
    output = tap.output(group=tap.query_group())
    assert output.logits.shape == (zoo.LAYERS, 2, zoo.QUERIES, zoo.CLASSES)
    assert_close((output.logits[-1], output.boxes[-1]), (answer.logits, answer.pred_boxes), rtol=0, atol=1e-6)
    assert_close(tuple(output.group), (output.logits, output.boxes), rtol=0, atol=1e-6)
