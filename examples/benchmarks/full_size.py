"""What distillation costs at full size: operations of a training image, and memory kept for the backward pass.

    pip install -r examples/hf_transformers/requirements.txt
    PYTHONPATH=examples python examples/benchmarks/full_size.py      # minutes on a CPU, 8 GB, without weights

Pairs of teacher and student as people train them on COCO, built of transformers, in float32, one image. The criterion
is that of the page "Distilling at full size": features, and shared queries for the quarter of the teacher's queries of
which it is surest, whose way through the student's decoder is a replay that finds the memory projected.

- Operations: multiply-adds of forward passes; of the criterion every other operation as well, one per element.
- Memory: bytes of the tensors that a forward pass saves for the backward pass, each storage once, no parameters.

DINO is in no package of transformers: a Deformable DETR with box refinement and two stages has its backbone, encoder
and decoder. Writes results/full_size--cpu.json.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib.metadata import version
from math import ceil
from typing import Any, NamedTuple

import torch
import transformers
from kd_cost_table import DEPTHS, ElementCounter, detector, multiply_adds
from measure import save
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import detr_kd_losses as dkl
from criterion import Case, make_step
from detr_kd_losses.taps import Tap

SHARE = 0.25  # of the teacher's queries
TARGETS = 20


class Pair(NamedTuple):
    """Teacher and student, and the size of their images."""

    teacher: Callable[[], nn.Module]
    student: Callable[[], nn.Module]
    image: tuple[int, int]


def dino(role: str, queries: int) -> nn.Module:
    """What of DINO is in transformers."""
    stages = {"with_box_refine": True, "two_stage": True, "two_stage_num_proposals": queries}
    return detector("Deformable DETR", DEPTHS[role], num_queries=queries, **stages)


def rt_detr(depths: list[int], layer: str, channels: list[int], **options: Any) -> nn.Module:
    """RT-DETR with a ResNet."""
    backbone = transformers.RTDetrResNetConfig(
        depths=depths, layer_type=layer, hidden_sizes=channels, out_features=["stage2", "stage3", "stage4"]
    )
    return lineage(transformers.RTDetrConfig, transformers.RTDetrForObjectDetection, backbone, channels, **options)


def d_fine(channels: list[int], layers: int, *, large: bool, **options: Any) -> nn.Module:
    """D-FINE with an HGNetV2, B5 if it is large, else B0."""
    middle = 64 if large else 16
    backbone = transformers.HGNetV2Config(
        stem_channels=[3, 32, 64] if large else [3, 16, 16],
        stage_in_channels=[64 if large else 16, *channels[:-1]],
        stage_mid_channels=[middle, 2 * middle, 4 * middle, 8 * middle],
        stage_out_channels=channels,
        stage_num_blocks=[1, 2, 5, 2] if large else [1, 1, 2, 1],
        stage_downsample=[False, True, True, True],
        stage_light_block=[False, False, True, True],
        stage_kernel_size=[3, 3, 5, 5],
        stage_numb_of_layers=[layers] * 4,
        hidden_sizes=channels,
        embedding_size=64 if large else 16,
        out_features=["stage2", "stage3", "stage4"],
    )
    return lineage(transformers.DFineConfig, transformers.DFineForObjectDetection, backbone, channels, **options)


def lineage(
    config_class: type, model_class: type, backbone: Any, channels: list[int], *, width: int, decoder_layers: int,
    **options: Any,
) -> nn.Module:  # fmt: skip
    """RT-DETR or an heir of it, with 300 queries and without denoising ones, which only training has."""
    config = config_class(
        backbone_config=backbone,
        encoder_in_channels=channels[1:],
        encoder_hidden_dim=width,
        encoder_ffn_dim=1024 if width == 256 else 2048,
        decoder_in_channels=[width] * 3,
        decoder_layers=decoder_layers,
        num_queries=300,
        num_denoising=0,
        num_labels=80,
        **options,
    )
    config._attn_implementation = "eager"  # attention as matrix products, which can be counted
    return model_class(config).eval().requires_grad_(False)


PAIRS = {
    "Deformable DETR, R101 to R50": Pair(
        lambda: detector("Deformable DETR", DEPTHS["teacher"]),
        lambda: detector("Deformable DETR", DEPTHS["student"]),
        (800, 1333),
    ),
    "DINO, R101 with 900 queries to R50 with 300": Pair(
        lambda: dino("teacher", 900), lambda: dino("student", 300), (800, 1333)
    ),
    "RT-DETR, R101 to R18": Pair(
        lambda: rt_detr([3, 4, 23, 3], "bottleneck", [256, 512, 1024, 2048], width=384, decoder_layers=6),
        lambda: rt_detr([2] * 4, "basic", [64, 128, 256, 512], width=256, decoder_layers=3, hidden_expansion=0.5),
        (640, 640),
    ),
    "D-FINE, X to S": Pair(
        lambda: d_fine([128, 512, 1024, 2048], 6, large=True, width=384, decoder_layers=6, reg_scale=8.0),
        lambda: d_fine(
            [64, 256, 512, 1024], 3, large=False, width=256, decoder_layers=3, hidden_expansion=0.5, depth_mult=0.34
        ),
        (640, 640),
    ),
}


def kept_bytes(function: Callable[[], object], parameters: Iterable[Tensor] = ()) -> int:
    """What a call saves for its backward pass, beside parameters."""
    others = {parameter.untyped_storage()._cdata for parameter in parameters}
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in others:
            storages[storage._cdata] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        kept = function()  # held until all is counted, so that no storage takes the place of another
    total = sum(storages.values())
    del kept
    return total


def count_pair(pair: Pair) -> dict[str, Any]:
    """Operations of teacher, student, group and criterion, and the bytes that student, group and criterion keep."""
    teacher, student = pair.teacher(), pair.student()
    pixels = torch.zeros(1, 3, *pair.image)
    with torch.no_grad(), Tap(teacher) as teacher_tap:
        teacher_cost = multiply_adds(lambda: teacher(pixel_values=pixels))
    with Tap(student) as student_tap:
        student_cost = multiply_adds(lambda: student(pixel_values=pixels))
    seen, said = teacher_tap.output(), student_tap.output()
    number = ceil(SHARE * seen.logits.shape[2])
    group = student_tap.query_group().map(lambda part: part[:, :1].expand(-1, number, *part.shape[2:]))
    student.requires_grad_()
    with Tap(student) as tap:
        student_bytes = kept_bytes(lambda: student(pixel_values=pixels), student.parameters())
    # Only what trains keeps the projections of the memory, which the replay then finds.
    group_cost = multiply_adds(lambda: tap.replay(group))
    group_bytes = kept_bytes(lambda: tap.replay(group), student.parameters())
    levels = tuple(tuple(level.shape[-2:]) for level in said.features)
    case = Case(
        images=1,
        layers=len(said.logits),
        student_queries=said.logits.shape[2],
        teacher_queries=number,
        classes=80,
        channels=said.features[0].shape[1],
        targets=TARGETS,
        levels=levels,
    )
    criterion_cost, criterion_bytes = count_criterion(case)
    distillation = group_cost + criterion_cost
    return {
        "teacher": teacher_cost,
        "student": student_cost,
        "group": group_cost,
        "criterion": criterion_cost,
        "share": distillation / (teacher_cost + student_cost + distillation),
        "parameters": [sum(part.numel() for part in model.parameters()) for model in (teacher, student)],
        "kept": {"student": student_bytes, "group": group_bytes, "criterion": criterion_bytes},
        "teacher's outputs": sum(tensor.numel() * 4 for tensor in (seen.logits, seen.boxes, seen.queries))
        + sum(level.numel() * 4 for level in seen.features),
        "levels": levels,
        "queries": [seen.logits.shape[2], said.logits.shape[2], number],
    }


def count_criterion(case: Case) -> tuple[int, int]:
    """Operations of features and shared queries on tensors of these shapes, and the bytes that they keep."""
    student, teacher, targets = make_step(case)
    index = dkl.best_queries(teacher.logits[-1], 1.0)
    student = student._replace(group_index=index)
    criterion = dkl.DETRDistillationLoss([dkl.FeatureTerm(), dkl.SharedQueryTerm()])
    with ElementCounter() as elements:
        products = multiply_adds(lambda: criterion(student, teacher, targets))
    return products + elements.operations, kept_bytes(lambda: criterion(student, teacher, targets))


def main() -> None:
    torch.set_num_threads(1)
    rows = {}
    columns = ("teacher", "student", "group", "criterion")
    print(f"{'G':44}{''.join(f'{name:>11}' for name in columns)}{'share':>8}   kept, MB: student, group, criterion")
    for name, pair in PAIRS.items():
        row = rows[name] = count_pair(pair)
        kept = ", ".join(f"{number / 1e6:.0f}" for number in row["kept"].values())
        print(f"{name:44}{''.join(f'{row[key] / 1e9:11.2f}' for key in columns)}{row['share']:8.2%}   {kept}")
    print(save("full_size", {"transformers": version("transformers"), "share": SHARE, "pairs": rows}))


if __name__ == "__main__":
    main()
