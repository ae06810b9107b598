"""Read and distil a model of a repository as it is, and print one line about it, for docs/how-to/trainers.md.

    python tests/trainers/repositories.py d_fine /path/to/D-FINE
    python tests/trainers/repositories.py deformable /path/to/Deformable-DETR --with_box_refine --two_stage

With PYTHONPATH=src:tests, and what the repository imports: torchvision (on a CPU, it is made to import), and for some
timm, pycocotools, faster-coco-eval, tensorboard, yapf. No line of a repository is changed; what is missing on a CPU is
replaced around it: their kernel of deformable attention by their own version in Python, `.cuda()` by nothing.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import inspect
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import detr_kd_losses as dkl
from detr_kd_losses.taps import DistillationCriterion, Tap, random_queries

from support.real_trainers import images, targets
from support.torchvision_on_cpu import import_torchvision

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
SMALL = "--device cpu --enc_layers 1 --dec_layers 3 --num_queries 20 --dropout 0"


class Subject(NamedTuple):
    """A model, how it is called in evaluation and in training, and the number of its classes."""

    model: nn.Module
    call: Callable[[nn.Module], Any]
    train: Callable[[nn.Module], Any]
    classes: int
    teacher_call: Callable[..., Any] | None = None


def build_lineage(kind: str) -> Subject:
    """With the repository's own configuration, at another size of images than it has in evaluation."""
    package, config = LINEAGE[kind]
    if kind == "rt_detr":  # its data part is for an older torchvision
        sys.modules["src.data"] = types.ModuleType("src.data")
    configuration = importlib.import_module(f"{package}.core").YAMLConfig(config)
    for backbone in {"PResNet", "HGNetv2"} & configuration.yaml_cfg.keys():
        configuration.yaml_cfg[backbone]["pretrained"] = False
    pixels, truth = images(256), targets(80)
    return Subject(configuration.model, lambda model: model(pixels), lambda model: model(pixels, targets=truth), 80)


def build_libreyolo(kind: str) -> Subject:
    """Models of one package with the shapes of the lineage."""
    module, name, options = LIBREYOLO[kind]
    function = getattr(importlib.import_module(f"libreyolo.models.{module}.nn"), name)
    known = inspect.signature(function).parameters
    model = function(**{option: value for option, value in options.items() if option in known})
    pixels, truth = images(256), targets(80)
    return Subject(model, lambda model: model(pixels), lambda model: model(pixels, targets=truth), 80)


def build_main(kind: str, options: list[str]) -> Subject:
    """With the arguments of the repository's own main.py; the second image has padding."""
    replace_cuda()
    misc = importlib.import_module("util.misc")
    main = importlib.import_module("main")
    required = {"dab": "--modelname dab_detr --coco_path .", "dn": "--modelname dn_dab_detr --coco_path ."}
    words = f"{SMALL} {required.get(kind, '')}".split()
    if kind == "dino":
        words = ["-c", "config/DINO/DINO_4scale.py", "--device", "cpu"]
    elif kind != "deformable":
        words += ["--backbone", "resnet18"]
    arguments = main.get_args_parser().parse_args([*words, *options])
    if kind == "dino":
        config = importlib.import_module("util.slconfig").SLConfig.fromfile(arguments.config_file)
        for name, value in config._cfg_dict.to_dict().items():
            setattr(arguments, name, value)
        small = {"enc_layers": 1, "dec_layers": 3, "num_queries": 30, "num_select": 30, "dn_number": 6}
        for name, value in small.items():
            setattr(arguments, name, value)
    if kind in {"dab", "dn"}:
        arguments.num_patterns = 0
    build = getattr(main, "build_model_main", None) or main.build_model
    model = build(arguments)[0]
    pixels, truth = images(128), targets(91)
    padding = torch.zeros(2, 128, 128, dtype=torch.bool)
    padding[1, :, 96:] = True
    samples = misc.NestedTensor(pixels * ~padding[:, None], padding)
    if kind == "dn":
        noisy = (truth, 5, 0.2, 0.4, 0)
        plain = lambda model, samples=samples, **_: model(samples, dn_args=0)  # noqa: E731
        return Subject(model, plain, lambda model: model(samples, dn_args=noisy), 91, plain)
    given = (samples, truth) if kind == "dino" else (samples,)
    return Subject(model, lambda model: model(samples), lambda model: model(*given), 91)


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


class NoLoss(nn.Module):
    """Distillation alone."""

    def forward(self, outputs: Any, targets: Any) -> dict[str, Tensor]:
        return {}


def worst(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(one, other, strict=True))


def look(subject: Subject) -> dict[str, str]:
    """What the table says of a repository."""
    model = subject.model.eval()
    with torch.no_grad():
        with Tap(model) as tap:
            subject.call(model)
        output = tap.output(group=tap.query_group())
        drawn = random_queries(tap.query_group(), 20, generator=torch.Generator().manual_seed(0))
        with Tap(copy.deepcopy(model)) as other:
            subject.call(other.model)
        terms = [dkl.LogitsTerm(), dkl.FeatureTerm(), dkl.SharedQueryTerm(stage_map="even")]
        head = dict.fromkeys(("student_activation", "teacher_activation"), tap.activation)
        truth = dkl.pad_targets(targets(subject.classes))
        equal = dkl.DETRDistillationLoss(terms, **head)(tap.output(drawn), other.output(drawn), truth)
    model.train()
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    with Tap(model) as tap:
        answer = subject.train(model)
    trained = tap.output(group=tap.query_group())
    said = answer[0] if isinstance(answer, tuple) else answer
    layers = [*said["aux_outputs"][: len(trained.logits) - 1], said]
    logits, boxes = (torch.stack([layer[name] for layer in layers]) for name in ("pred_logits", "pred_boxes"))
    number = trained.logits.shape[2]
    return {
        "layers": f"{len(output.logits)} of {len(tap.call.decoder.layers)}",
        "queries": str(number),
        "maps": str(len(output.features)),
        "tap = model": f"{worst((logits[:, :, :number], boxes[:, :, :number]), (trained.logits, trained.boxes)):.0e}",
        "replay = own": f"{worst(tuple(output.group), (output.logits, output.boxes)):.0e}",
        "in training": f"{worst(tuple(trained.group), (trained.logits, trained.boxes)):.0e}",
        "teacher = student": f"{max(equal.values()).item():.0e}",
        "distributions": "no" if output.distributions is None else "yes",
    }


def fall(subject: Subject, steps: int) -> str:
    """How many terms are lower after some steps of distillation alone, on one batch, with the default weights."""
    student, teacher = copy.deepcopy(subject.model).train(), copy.deepcopy(subject.model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in teacher.parameters():
            if parameter.ndim > 1:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.3 * parameter.std(correction=0) * noise)
    criterion = DistillationCriterion(NoLoss(), student, teacher, teacher_call=subject.teacher_call)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)
    history = []
    for _ in range(steps + 1):
        torch.manual_seed(0)
        losses = criterion(subject.train(student), targets(subject.classes))
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        nn.utils.clip_grad_norm_(student.parameters(), 0.1)
        optimizer.step()
        history.append({name: loss.item() for name, loss in losses.items()})
    lower = [name for name, first in history[0].items() if history[-1][name] < first]
    higher = [f"{name} {history[0][name]:.3g} -> {history[-1][name]:.3g}" for name in history[0] if name not in lower]
    return f"{len(lower)} of {len(history[0])}" + (f" ({', '.join(higher)})" if higher else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=[*LINEAGE, *LIBREYOLO, *MAINS])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=25)
    arguments, options = parser.parse_known_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    import_torchvision()
    commit = subprocess.run(
        ["git", "-C", arguments.folder, "rev-parse", "--short=7", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    os.chdir(arguments.folder)
    sys.path.insert(0, "")
    kind = arguments.kind
    builders = dict.fromkeys(LINEAGE, build_lineage) | dict.fromkeys(LIBREYOLO, build_libreyolo)
    subject = builders[kind](kind) if kind in builders else build_main(kind, options)
    found = look(subject) | {"lower after distillation": fall(subject, arguments.steps)}
    shown = [f"{kind} {' '.join(options)}".strip(), commit, *(f"{what} {seen}" for what, seen in found.items())]
    print(" | ".join(shown))  # noqa: T201


if __name__ == "__main__":
    main()
