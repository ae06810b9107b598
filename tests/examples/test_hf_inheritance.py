"""The table of what a student may inherit: these parts, backbone and encoder are the whole of each family."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="the models are of transformers")

import detr_kd_losses as dkl

from support import zoo

README = (Path(__file__).parents[2] / "examples" / "hf_transformers" / "README.md").read_text()
BEFORE = ("model.backbone", "model.conv_encoder", "model.encoder", "model.encoder_input_proj", "model.input_proj")


def parts_of(model: torch.nn.Module) -> list[str]:
    """What the table has for a `model_type`."""
    rows = re.findall(r"^\| (.*?) \| `inherit_weights.*?\[(.*?)\]\)` \|$", README, flags=re.MULTILINE)
    (found,) = [parts for types, parts in rows if f"`{model.config.model_type}`" in types]
    parts = re.findall(r'"(.*?)"', found)
    if getattr(model.config, "two_stage", False) and model.config.model_type == "deformable_detr":
        parts = [part for part in parts if part not in ("model.query_position_embeddings", "model.reference_points")]
        parts += ["model.enc_output", "model.enc_output_norm", "model.pos_trans", "model.pos_trans_norm"]
    return parts


def predictions(model: torch.nn.Module) -> list[torch.Tensor]:
    with torch.no_grad():
        outputs = model(**zoo.images(model))
    return [outputs.logits, outputs.pred_boxes]


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_with_backbone_and_encoder_they_are_the_whole_teacher(family: str) -> None:
    student, teacher = zoo.build(family, seed=0), zoo.build(family, seed=1)
    before = predictions(student)
    found = dkl.inherit_weights(student, teacher, parts_of(student))
    assert not found.left
    assert not any(name.startswith(BEFORE) for name in found.inherited)
    own = student.state_dict()
    rest = [name for name in own if name.startswith(BEFORE) or name == "model.level_embed"]
    dkl.inherit_weights(student, teacher, rest)
    for own_values, others, old in zip(predictions(student), predictions(teacher), before, strict=True):
        assert torch.equal(own_values, others)
        assert not torch.equal(own_values, old)


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_a_student_of_fewer_layers_has_the_last_of_its_teacher(family: str) -> None:
    student, teacher = zoo.build(family, seed=0), zoo.build(family, seed=1, decoder_layers=zoo.LAYERS + 2)
    found = dkl.inherit_weights(student, teacher, parts_of(student))
    left = [name for name in found.left if "decoder.layers" in name]
    # What the first layer alone has in Conditional and DAB-DETR is in no other layer of the teacher.
    assert all("decoder.layers.0." in name and "pos_proj" in name for name in left)
    assert not left or family in ("conditional", "dab")
    own, others = student.model.decoder.layers, teacher.model.decoder.layers
    assert len(own) < len(others)
    for one, other in zip(own[-1].parameters(), others[-1].parameters(), strict=True):
        assert torch.equal(one, other)
    assert all(prediction.isfinite().all() for prediction in predictions(student))
