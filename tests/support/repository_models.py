"""Models and criteria of repositories that are no packages, as they lie in the folder where a script was started.

No line of a repository is changed; what is missing on a CPU is replaced around it: their kernel of deformable attention
by their own version in Python, `.cuda()` by nothing. It is for a process that does nothing else.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from support.real_trainers import images, targets

LINEAGE = {
    "rt_detr": ("src", "configs/rtdetr/rtdetr_r18vd_6x_coco.yml"),
    "rt_detr_v2": ("src", "configs/rtdetrv2/rtdetrv2_r18vd_120e_coco.yml"),
    "d_fine": ("src", "configs/dfine/dfine_hgnetv2_n_coco.yml"),
    "deim": ("engine", "configs/deim_dfine/deim_hgnetv2_n_coco.yml"),
    "deimv2": ("engine", "configs/deimv2/deimv2_hgnetv2_pico_coco.yml"),
}
LIBREYOLO = {  # of the package libreyolo, in the folder where it was installed
    "libreyolo_rt_detr": ("rtdetr", "RTDETRModel", {"config": "r18", "backbone_pretrained": False}),
    "libreyolo_rt_detr_v2": ("rtdetrv2", "RTDETRv2Model", {}),
    "libreyolo_d_fine": ("dfine", "LibreDFINEModel", {"config": "n"}),
    "libreyolo_deim": ("deim", "LibreDEIMModel", {"config": "n"}),
}
MAINS = ("detr", "conditional", "deformable", "dab", "dn", "dino")
KINDS = (*LINEAGE, *LIBREYOLO, *MAINS)
# What follows the encoder: all that a student may inherit of its decoder, as far as a model has it.
AFTER_THE_ENCODER = {
    **dict.fromkeys((*LINEAGE, *LIBREYOLO), ("decoder",)),
    **dict.fromkeys(
        MAINS,
        (
            "transformer.decoder",
            "transformer.reference_points",
            "transformer.tgt_embed",
            "transformer.enc_output",
            "transformer.enc_output_norm",
            "transformer.enc_out_bbox_embed",
            "transformer.enc_out_class_embed",
            "transformer.pos_trans",
            "transformer.pos_trans_norm",
            "query_embed",
            "refpoint_embed",
            "tgt_embed",
            "label_enc",
            "class_embed",
            "bbox_embed",
        ),
    ),
}
SMALL = "--device cpu --enc_layers 1 --dec_layers 3 --num_queries 20 --dropout 0"


class Subject(NamedTuple):
    """What a repository trains, and how.

    Attributes:
        build: A model of other weights each time.
        call: Runs a model on a fixed batch in evaluation.
        train: The same in training, with what denoising needs.
        classes: How many a target can have.
        loss: The repository's own, of what a model answers in training, as its engine sums it. None: of no use here.
        rate: Its learning rate; the optimizer is AdamW everywhere, with gradients clipped at 0.1.
        teacher_call: How a teacher is called, if not with the images.
    """

    build: Callable[[], nn.Module]
    call: Callable[[nn.Module], Any]
    train: Callable[[nn.Module], Any]
    classes: int
    loss: Callable[[Any], Tensor] | None = None
    rate: float = 1e-4
    teacher_call: Callable[..., Any] | None = None


def build_subject(kind: str, options: list[str]) -> Subject:
    """What `kind` names, in the current folder, with options of its main.py."""
    if kind in LINEAGE:
        return build_lineage(kind)
    return build_libreyolo(kind) if kind in LIBREYOLO else build_main(kind, options)


def build_lineage(kind: str) -> Subject:
    """With the repository's own configuration, at another size of images than it has in evaluation."""
    package, path = LINEAGE[kind]
    if kind == "rt_detr":  # its data part is for an older torchvision
        sys.modules["src.data"] = types.ModuleType("src.data")
    yaml_config = importlib.import_module(f"{package}.core").YAMLConfig

    def configured() -> Any:
        configuration = yaml_config(path)
        for backbone in {"PResNet", "HGNetv2"} & configuration.yaml_cfg.keys():
            configuration.yaml_cfg[backbone]["pretrained"] = False
        if kind == "rt_detr":  # its model draws a size for each step, which is no fixed batch
            configuration.yaml_cfg["RTDETR"]["multi_scale"] = None
        return configuration

    configuration, pixels, truth = configured(), images(256), targets(80)
    criterion = configuration.criterion.train()
    about = {} if kind == "rt_detr" else {"epoch": 0, "step": 0, "global_step": 0, "epoch_step": 1}
    return Subject(
        build=lambda: configured().model,
        call=lambda model: model(pixels),
        train=lambda model: model(pixels, targets=truth),
        classes=80,
        loss=lambda outputs: torch.stack(list(criterion(outputs, truth, **about).values())).sum(),
        rate=configuration.yaml_cfg["optimizer"]["lr"],
    )


def build_libreyolo(kind: str) -> Subject:
    """Models of one package with the shapes of the lineage."""
    module, name, options = LIBREYOLO[kind]
    function = getattr(importlib.import_module(f"libreyolo.models.{module}.nn"), name)
    known = {option: value for option, value in options.items() if option in inspect.signature(function).parameters}
    pixels, truth = images(256), targets(80)
    return Subject(
        lambda: function(**known), lambda model: model(pixels), lambda model: model(pixels, targets=truth), 80
    )


def build_main(kind: str, options: list[str]) -> Subject:
    """With the arguments of the repository's own main.py; the second image has padding."""
    replace_cuda()
    misc = importlib.import_module("util.misc")
    main = importlib.import_module("main")
    arguments = arguments_of(kind, options, main)
    build = getattr(main, "build_model_main", None) or main.build_model
    criterion = build(arguments)[1].train()
    pixels, truth = images(128), targets(91)
    padding = torch.zeros(2, 128, 128, dtype=torch.bool)
    padding[1, :, 96:] = True
    samples = misc.NestedTensor(pixels * ~padding[:, None], padding)

    def loss(outputs: Any) -> Tensor:
        given = outputs if isinstance(outputs, tuple) else (outputs,)
        losses, weights = criterion(given[0], truth, *given[1:]), criterion.weight_dict
        return torch.stack([losses[name] * weights[name] for name in losses if name in weights]).sum()

    subject = Subject(
        build=lambda: build(arguments)[0],
        call=lambda model: model(samples),
        train=lambda model: model(samples, truth) if kind == "dino" else model(samples),
        classes=91,
        loss=loss,
        rate=arguments.lr,
    )
    if kind != "dn":
        return subject
    plain, noisy = {"dn_args": 0}, {"dn_args": (truth, 5, 0.2, 0.4, 0)}
    return subject._replace(
        call=lambda model: model(samples, **plain),
        train=lambda model: model(samples, **noisy),
        teacher_call=lambda teacher, samples, **_: teacher(samples, **plain),
    )


def arguments_of(kind: str, options: list[str], main: Any) -> Any:
    """Those of main.py for a small model."""
    required = {"dab": "--modelname dab_detr --coco_path .", "dn": "--modelname dn_dab_detr --coco_path ."}
    words = f"{SMALL} {required.get(kind, '')}".split()
    if kind == "dino":
        words = ["-c", "config/DINO/DINO_4scale.py", "--device", "cpu"]
    elif kind != "deformable":
        words += ["--backbone", "resnet18"]
    arguments = main.get_args_parser().parse_args([*words, *options])
    if kind == "dino":
        config = importlib.import_module("util.slconfig").SLConfig.fromfile(arguments.config_file)
        small = {"enc_layers": 1, "dec_layers": 3, "num_queries": 30, "num_select": 30, "dn_number": 6, "dropout": 0.0}
        for name, value in (config._cfg_dict.to_dict() | small).items():
            setattr(arguments, name, value)
    if kind in {"dab", "dn"}:
        arguments.num_patterns = 0
    return arguments


def replace_cuda() -> None:
    """Let what is written for one GPU run without."""
    import torchvision

    torchvision.__version__ = "0.9.0"  # Deformable DETR reads "0.28" as a very old one
    for name in ("resnet18", "resnet50"):
        function = getattr(torchvision.models, name)
        setattr(torchvision.models, name, lambda *_, function=function, pretrained=False, **k: function(**k))
    Tensor.cuda = nn.Module.cuda = lambda self, *_, **__: self
    to = Tensor.to
    Tensor.to = lambda self, *a, **k: self if a and a[0] == "cuda" else to(self, *a, **k)
    names = ("MultiScaleDeformableAttention", "timm", "timm.models", "timm.models.layers", "torch._overrides")
    modules = {name: types.ModuleType(name) for name in names}
    modules["timm.models.layers"].DropPath = modules["timm.models.layers"].to_2tuple = None
    modules["timm.models.layers"].trunc_normal_ = None
    modules["torch._overrides"] = torch.overrides
    sys.modules.update(modules)
    torch.nn.modules.linear._LinearWithBias = nn.Linear
    folder = next(iter(Path("models").glob("**/ops")), None)
    if folder is not None:
        path = ".".join(folder.parts)
        core = importlib.import_module(f"{path}.functions.ms_deform_attn_func").ms_deform_attn_core_pytorch
        attention = importlib.import_module(f"{path}.modules.ms_deform_attn")
        attention.MSDeformAttnFunction = types.SimpleNamespace(
            apply=lambda value, shapes, _, places, weights, __: core(value, shapes.tolist(), places, weights)
        )
