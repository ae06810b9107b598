"""Tiny models of every family of transformers that the adapter reads, built offline, with weights of trained scale."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers", reason="the Hugging Face adapter needs transformers")

import transformers

CLASSES = 5
WIDTH = 64
QUERIES = 12
LAYERS = 3

COMMON = {
    "num_queries": QUERIES,
    "num_labels": CLASSES,
    "encoder_layers": 1,
    "encoder_ffn_dim": 64,
    "encoder_attention_heads": 4,
    "decoder_layers": LAYERS,
    "decoder_ffn_dim": 64,
    "decoder_attention_heads": 4,
}
PADDED = (
    "detr",
    "table-transformer",
    "conditional_detr",
    "dab-detr",
    "deformable_detr",
)  # no other sees a mask


def resnet(*stages: int) -> Any:
    return transformers.ResNetConfig(
        embedding_size=16,
        hidden_sizes=[16, 16, 32, 32],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=[f"stage{stage}" for stage in stages],
    )


def detr_options(width: int) -> dict[str, Any]:
    return {**COMMON, "backbone_config": resnet(1, 2, 3, 4), "use_timm_backbone": False, "d_model": width}


def dab_options(width: int) -> dict[str, Any]:
    return {**COMMON, "backbone_config": resnet(4), "use_timm_backbone": False, "hidden_size": width}


def deformable_options(width: int) -> dict[str, Any]:
    return {
        **COMMON,
        "backbone_config": resnet(2, 3, 4),
        "use_timm_backbone": False,
        "d_model": width,
        "num_feature_levels": 4,
    }


def refining_options(width: int) -> dict[str, Any]:
    return {**deformable_options(width), "with_box_refine": True}


def two_stage_options(width: int) -> dict[str, Any]:
    return {**refining_options(width), "two_stage": True, "two_stage_num_proposals": QUERIES}


def rt_detr_options(width: int) -> dict[str, Any]:
    backbone = transformers.RTDetrResNetConfig(
        embedding_size=16,
        hidden_sizes=[16, 16, 32, 32],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    return {
        **COMMON,
        "backbone_config": backbone,
        "encoder_in_channels": [16, 32, 32],
        "encoder_hidden_dim": width,
        "decoder_in_channels": [width] * 3,
        "d_model": width,
        "num_denoising": 8,
    }


def d_fine_options(width: int) -> dict[str, Any]:
    backbone = transformers.HGNetV2Config(
        stem_channels=[3, 16, 16],
        stage_in_channels=[16, 16, 32, 32],
        stage_mid_channels=[8, 8, 16, 16],
        stage_out_channels=[16, 32, 32, 32],
        stage_num_blocks=[1, 1, 1, 1],
        stage_numb_of_layers=[1, 1, 1, 1],
        embedding_size=16,
        hidden_sizes=[16, 32, 32, 32],
        depths=[1, 1, 1, 1],
        out_features=["stage2", "stage3", "stage4"],
        return_idx=[1, 2, 3],
    )
    return {**rt_detr_options(width), "backbone_config": backbone, "encoder_in_channels": [32, 32, 32]}


def group_detr_options(width: int) -> dict[str, Any]:
    return {
        "num_queries": QUERIES,
        "num_labels": CLASSES,
        "d_model": width,
        "decoder_layers": LAYERS,
        "decoder_ffn_dim": 64,
        "decoder_self_attention_heads": 4,
        "decoder_cross_attention_heads": 4,
        "group_detr": 2,
    }


def lw_detr_options(width: int) -> dict[str, Any]:
    backbone = transformers.LwDetrViTConfig(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=128,
        pretrain_image_size=128,
        patch_size=16,
        window_block_indices=[0, 2],
        num_windows=4,
        out_indices=[1, 2, 3, 4],
    )
    return {**group_detr_options(width), "backbone_config": backbone, "projector_scale_factors": [1.0]}


def rf_detr_options(width: int) -> dict[str, Any]:
    backbone = transformers.RfDetrDinov2Config(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=112,
        patch_size=14,
        num_windows=2,
        out_features=["stage2", "stage4"],
    )
    return {**group_detr_options(width), "backbone_config": backbone}


# Name: prefix of the classes in transformers, and options of the configuration for a width.
FAMILIES: dict[str, tuple[str, Callable[[int], dict[str, Any]]]] = {
    "detr": ("Detr", detr_options),
    "table_transformer": ("TableTransformer", detr_options),
    "conditional": ("ConditionalDetr", detr_options),
    "dab": ("DabDetr", dab_options),
    "deformable": ("DeformableDetr", deformable_options),
    "deformable_refine": ("DeformableDetr", refining_options),
    "deformable_two_stage": ("DeformableDetr", two_stage_options),
    "rt_detr": ("RTDetr", rt_detr_options),
    "rt_detr_v2": ("RTDetrV2", rt_detr_options),
    "d_fine": ("DFine", d_fine_options),
    "deimv2": ("Deimv2", d_fine_options),
    "lw_detr": ("LwDetr", lw_detr_options),
    "rf_detr": ("RfDetr", rf_detr_options),
}


def build(name: str, *, seed: int = 0, width: int = WIDTH, **options: Any) -> nn.Module:
    """Build a model of FAMILIES in evaluation mode; its weights depend on the seed alone."""
    torch.manual_seed(seed)
    prefix, defaults = FAMILIES[name]
    config = getattr(transformers, f"{prefix}Config")(**(defaults(width) | options))
    model = getattr(transformers, f"{prefix}ForObjectDetection")(config)
    strengthen(model, seed)
    return model.eval()


@torch.no_grad()
def strengthen(model: nn.Module, seed: int) -> None:
    """Draw the weights at the scale of a trained model.

    As initialised, all queries of a model are nearly the same, and a test of what one query sees of another would
    pass whatever happens.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal_(tensor: Tensor, std: float, mean: float = 0.0) -> None:
        tensor.copy_(mean + std * torch.randn(tensor.shape, generator=generator))

    for module in model.modules():
        if isinstance(module, nn.Linear):
            normal_(module.weight, module.in_features**-0.5)
            if module.bias is not None:
                normal_(module.bias, 0.1)
        elif isinstance(module, nn.Embedding):
            normal_(module.weight, 0.5 if module.embedding_dim == 4 else 1.0)
        elif isinstance(module, nn.LayerNorm):
            normal_(module.weight, 0.3, mean=1.0)
            normal_(module.bias, 0.2)


def images(model: nn.Module, *, batch: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """Draw a batch; the right third of the last image is padding, where the model can be told so."""
    height, width = (112, 112) if model.config.model_type == "rf_detr" else (128, 96)
    generator = torch.Generator().manual_seed(seed)
    inputs = {"pixel_values": torch.randn(batch, 3, height, width, generator=generator)}
    if model.config.model_type in PADDED:
        mask = torch.ones(batch, height, width, dtype=torch.int64)
        mask[-1, :, width * 2 // 3 :] = 0
        inputs["pixel_mask"] = mask
    return inputs


def labels(*, batch: int = 2, seed: int = 0) -> list[dict[str, Tensor]]:
    """Draw targets as transformers takes them, another number for each image."""
    generator = torch.Generator().manual_seed(seed)
    counts = [3 - image % 3 for image in range(batch)]
    return [
        {
            "class_labels": torch.randint(CLASSES, (count,), generator=generator),
            "boxes": torch.cat(
                [
                    0.3 + 0.4 * torch.rand(count, 2, generator=generator),
                    0.1 + 0.2 * torch.rand(count, 2, generator=generator),
                ],
                -1,
            ),
        }
        for count in counts
    ]
