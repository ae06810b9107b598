"""What distillation adds to the compute of teacher and student: Table 3 of the paper, on real architectures.

    pip install -r examples/hf_transformers/requirements.txt
    PYTHONPATH=examples python examples/benchmarks/kd_cost_table.py      # half a minute on a CPU, without weights

A detector of transformers with a ResNet-101 teaches the one with a ResNet-50. Counted is the forward pass of one image,
a multiply-add as one operation, as in the paper: of both readings of "GFLOPs" only this one gives its numbers.

- Basic cost: a detector with its heads after every decoder layer, as it trains. Matrix products and convolutions alone,
  which makes it smaller and our share larger.
- Cost of distillation: the query group's way through the student's decoder, and the whole criterion, matching costs
  included. In the criterion every other operation counts as well, one per element, copies included. With all queries
  of the teacher in the group, and with the best third of them, the choice included.

Left out are deformable sampling and solving the assignments; a bound of either is in the results. Writes
results/kd_cost_table--cpu.json.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from math import ceil, prod
from typing import Any, NamedTuple

import torch
import transformers
from measure import save
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import detr_kd_losses as dkl
from criterion import Case, make_step
from detr_kd_losses.taps import Tap

Image = tuple[int, int]
# The second is the paper's, as far as ResNet-101 minus ResNet-50 tells: 76.1 in two of its three columns.
IMAGES: tuple[Image, Image] = ((800, 1333), (800, 1280))
DEPTHS = {"teacher": [3, 4, 23, 3], "student": [3, 4, 6, 3]}
TARGETS = 20
# How many of the teacher's queries are in the group.
GROUPS = {"all queries": 1.0, "best third": 1 / 3}
CRITERIA: dict[str, Callable[[], list[dkl.Term] | str]] = {
    "default": lambda: "paper",
    "Eq. 9": lambda: [dkl.LogitsTerm(), dkl.FeatureTerm(normalize=None), dkl.QueryGroupTerm()],
    "official": lambda: "official",
}
# The counter of PyTorch knows this product, but not in place.
flop_registry[torch.ops.aten.baddbmm_] = flop_registry[torch.ops.aten.baddbmm]


class Published(NamedTuple):
    """A column of the paper's Table 3: of teacher and student in millions and in G, of distillation in G."""

    parameters: tuple[float, float]
    basic: tuple[float, float]
    distillation: float
    share: float


PAPER = {
    "Deformable DETR": Published((58.78, 39.84), (287.34, 192.26), 51.10, 0.0963),
    "Conditional DETR": Published((62.13, 43.19), (171.40, 95.32), 18.35, 0.0643),
    "AdaMixer": Published((153.56, 134.57), (178.95, 102.88), 24.49, 0.0799),
}


class ElementCounter(TorchDispatchMode):
    """Counts what `FlopCounterMode` leaves out: one operation per element of whatever is no product and no view."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(
        self, operator: Any, types: Any, arguments: tuple[Any, ...] = (), options: dict[str, Any] | None = None
    ) -> Any:
        output = operator(*arguments, **(options or {}))
        # The solver is an operator of the package; its work is not one operation per element.
        if operator.namespace == "aten" and not operator.is_view and operator.overloadpacket not in flop_registry:
            tensors = [leaf for leaf in tree_leaves((arguments, options, output)) if isinstance(leaf, Tensor)]
            self.operations += max((tensor.numel() for tensor in tensors), default=0)
        return output


def multiply_adds(function: Callable[[], object]) -> int:
    """Multiply-adds of the matrix products and convolutions of a call."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops() // 2


def detector(family: str, depths: list[int], *, backbone: dict[str, Any] | None = None, **options: Any) -> nn.Module:
    """The paper's detector, as its parameters tell: 300 queries, 6 + 6 layers, 80 classes, no box refinement."""
    config_class, model_class, stages = {
        "Deformable DETR": (
            transformers.DeformableDetrConfig,
            transformers.DeformableDetrForObjectDetection,
            (2, 3, 4),
        ),
        "Conditional DETR": (transformers.ConditionalDetrConfig, transformers.ConditionalDetrForObjectDetection, (4,)),
    }[family]
    config = config_class(
        backbone_config=transformers.ResNetConfig(
            depths=depths,
            layer_type="bottleneck",
            out_features=[f"stage{stage}" for stage in stages],
            **(backbone or {}),
        ),
        use_timm_backbone=False,
        attn_implementation="eager",  # attention as matrix products, which can be counted
        **{"num_labels": 80, "num_queries": 300, **options},
    )
    return model_class(config).eval().requires_grad_(False)


def count_parameters(model: nn.Module) -> dict[str, int]:
    """All parameters, and those that are trained: stem and first stage of the backbone usually are not."""
    backbone = model.model.backbone.model
    frozen = [*backbone.embedder.parameters(), *backbone.encoder.stages[0].parameters()]
    total = sum(parameter.numel() for parameter in model.parameters())
    return {"all": total, "trained": total - sum(parameter.numel() for parameter in frozen)}


def count_forward(model: nn.Module, image: Image) -> tuple[Tap, dict[str, int]]:
    """Cost of a detector, and the tap that has seen it run: a frozen one, so that nothing is kept for a replay."""
    pixels = torch.empty(1, 3, *image)
    with Tap(model) as tap:
        without_heads = multiply_adds(lambda: model.model(pixel_values=pixels))
    heads = multiply_adds(tap.output)
    return tap, {
        "total": without_heads + heads,
        "heads": heads,
        "backbone": multiply_adds(lambda: model.model.backbone(pixels, torch.ones(1, *image))),
        # A tap runs the heads of all layers. Those that the model has run by itself have then run twice.
        "heads_of_model": multiply_adds(lambda: model(pixel_values=pixels)) - without_heads,
    }


def count_decoder(tap: Tap, queries: int) -> int:
    """Cost of decoder and heads for so many queries, on the image that the model has seen."""
    group = tap.query_group().map(lambda part: part[:, :1].expand(-1, queries, *part.shape[2:]))
    return multiply_adds(lambda: tap.replay(group))


def count_query_group(tap: Tap, own: int, extra: int) -> dict[str, int]:
    """Cost of a teacher's `extra` queries in the decoder of a student with its `own`, by the way they are run.

    ``"concatenation"``: one longer run under a block mask, with a self-attention over all queries.
    ``"replay"``: a second run, which projects the memory of the encoder once more.
    ``"replay, memory kept"``: a second run that finds these projections done, the least there is.
    """
    cost = partial(count_decoder, tap)
    # The cost is a parabola in the number of queries. Its value at none is that of the memory's projections.
    memory = 3 * cost(1) - 3 * cost(2) + cost(3)
    return {
        "concatenation": cost(own + extra) - cost(own),
        "replay": cost(extra),
        "replay, memory kept": cost(extra) - memory,
    }


def count_adapter(teacher: nn.Module, student: nn.Module, image: Image, share: float = 1.0) -> int:
    """Cost of a step of examples/hf_transformers before its criterion; the student trains from here on."""
    pixels = torch.empty(1, 3, *image)
    student.requires_grad_()

    def step() -> None:
        with torch.no_grad(), Tap(teacher) as teacher_tap:
            teacher(pixel_values=pixels)
        with Tap(student) as student_tap:
            student(pixel_values=pixels)
        logits = teacher_tap.output().logits
        index = None if share == 1 else dkl.best_queries(logits[-1], share, activation="sigmoid")
        student_tap.output(group=teacher_tap.query_group(index))

    return multiply_adds(step)


def with_best_queries(student: dkl.DetectorOutput, teacher: dkl.DetectorOutput, share: float) -> dkl.DetectorOutput:
    """The student with that share of the teacher's queries in its group."""
    index = dkl.best_queries(teacher.logits[-1], share)
    best = (said[:, :, : index.shape[1]] for said in student.group)
    return student._replace(group=dkl.Predictions(*best), group_index=index)


def count_criterion(terms: Callable[[], list[dkl.Term] | str], case: Case, share: float = 1.0) -> dict[str, int]:
    """Cost of the whole criterion with padding masks, as a detector gives them, and of its feature loss."""
    student, teacher, targets = make_step(case)
    valid = [torch.ones(case.images, *level, dtype=torch.bool) for level in case.levels]
    student, teacher = (output._replace(padding_mask=valid) for output in (student, teacher))

    def count(*, features: bool = True) -> tuple[int, int]:
        criterion = dkl.DETRDistillationLoss(terms())
        if not features:
            del criterion.terms["feature"]
        choose = (lambda: student) if share == 1 else partial(with_best_queries, student, teacher, share)
        with ElementCounter() as elements:
            products = multiply_adds(lambda: criterion(choose(), teacher, targets))
        return products, elements.operations

    products, elements = count()
    total = products + elements
    return {
        "total": total,
        "feature": total - sum(count(features=False)),
        "products": products,
        "elements": elements,
    }


def bound_assignment(case: Case) -> int:
    """Visits of cost entries at worst, by shortest augmenting paths: each row looks at each column once per row."""
    few, many = sorted((case.student_queries, case.teacher_queries))
    return case.layers * case.images * few**2 * many


def deformable_sampling(model: nn.Module, levels: list[Image]) -> dict[str, int]:
    """Multiply-adds of sampling: for each level, point and channel of a query four neighbours and one weight."""
    config = model.config
    per_point = 5 * config.num_feature_levels * config.d_model
    decoder = config.decoder_layers * config.num_queries * config.decoder_n_points * per_point
    encoder = config.encoder_layers * sum(map(prod, levels)) * config.encoder_n_points * per_point
    return {"detector": encoder + decoder, "query group": decoder}


def count_family(family: str, image: Image) -> dict[str, Any]:
    """Everything about one family: basic costs, and distillation by criterion and way of running the query group."""
    with FakeTensorMode():
        models = {role: detector(family, depths) for role, depths in DEPTHS.items()}
        taps, basic = {}, {}
        for role, model in models.items():
            taps[role], basic[role] = count_forward(model, image)
        config = models["student"].config
        # The basic costs have the heads once. The models run them by themselves, and the taps once more.
        once, groups = sum(cost["total"] for cost in basic.values()), {}
        for name, share in GROUPS.items():
            extra = ceil(round(share * models["teacher"].config.num_queries, 6))
            groups[name] = count_query_group(taps["student"], config.num_queries, extra)
            groups[name]["replay by the adapter"] = count_adapter(**models, image=image, share=share) - once
        levels = [tuple(level.shape[-2:]) for level in taps["student"].features()[0]]
    case = Case(images=1, classes=config.num_labels, channels=config.d_model, targets=TARGETS, levels=tuple(levels))
    return {
        "levels": levels,
        "parameters": {role: count_parameters(model) for role, model in models.items()},
        "basic": basic,
        "groups": {
            name: distillation(groups[name], case, share, basic, PAPER[family]) for name, share in GROUPS.items()
        },
        "left_out": {
            "assignment, at most": bound_assignment(case),
            "deformable sampling": deformable_sampling(models["student"], levels) if len(levels) > 1 else None,
        },
    }


def distillation(
    ways: dict[str, int], case: Case, share: float, basic: dict[str, dict[str, int]], paper: Published
) -> dict[str, Any]:
    """Cost of a query group by the way it is run, of each criterion, and the share of both together."""
    criteria = {name: count_criterion(terms, case, share) for name, terms in CRITERIA.items()}
    return {
        "query_group": ways,
        "criterion": criteria,
        "share": {
            name: {way: shares(group + losses["total"], basic, paper) for way, group in ways.items()}
            for name, losses in criteria.items()
        },
    }


def shares(distillation: int, basic: dict[str, dict[str, int]], paper: Published) -> dict[str, float]:
    """Distillation / (teacher + student + distillation), with our basic costs and with the paper's."""
    both, published = sum(cost["total"] for cost in basic.values()), 1e9 * sum(paper.basic)
    return {
        "distillation": distillation,
        "share": distillation / (both + distillation),
        "share_with_published_basic": distillation / (published + distillation),
    }


def count_adamixer(backbone: int) -> dict[str, Any]:
    """AdaMixer, which no package has: its losses on tensors of its shapes, 100 queries on P2 to P5.

    Its query group can cost no more than all that its student has beside the `backbone`.
    """
    paper = PAPER["AdaMixer"]
    height, width = IMAGES[0]
    levels = tuple((ceil(height / stride), ceil(width / stride)) for stride in (4, 8, 16, 32))
    case = Case(images=1, student_queries=100, teacher_queries=100, targets=TARGETS, levels=levels)
    published = 1e9 * sum(paper.basic)
    group = 1e9 * paper.basic[1] - backbone
    result: dict[str, Any] = {"levels": levels, "query_group, at most": group}
    for name, terms in CRITERIA.items():
        losses = count_criterion(terms, case)
        result[name] = {
            "criterion": losses,
            "share of losses": losses["total"] / (published + losses["total"]),
            "share, at most": (losses["total"] + group) / (published + losses["total"] + group),
        }
    return result


def report(family: str, image: Image, counts: dict[str, Any]) -> None:
    """Print one family beside the paper."""
    paper = PAPER[family]
    print(f"\n{family}, {image[0]} x {image[1]}{'teacher':>26}{'student':>10}{'paper':>18}")
    trained = [counts["parameters"][role]["trained"] / 1e6 for role in DEPTHS]
    basic = [counts["basic"][role]["total"] / 1e9 for role in DEPTHS]
    for what, ours, theirs in (("parameters, M", trained, paper.parameters), ("basic, G", basic, paper.basic)):
        print(f"{what:40}{ours[0]:10.2f}{ours[1]:10.2f}{theirs[0]:10.2f}{theirs[1]:8.2f}")
    print(f"{'distillation':40}{'G':>10}{'share':>10}{paper.distillation:10.2f}{paper.share:8.2%}{'a third?':>12}")
    for group, distilled in counts["groups"].items():
        print(f" {group} in the group")
        for name, ways in distilled["share"].items():
            losses = distilled["criterion"][name]
            print(f"  {name}: criterion {losses['total'] / 1e9:.2f} G, {losses['feature'] / 1e9:.2f} of it features")
            for way, row in ways.items():
                verdict = "yes" if row["share"] <= paper.share / 3 else f"no, > {paper.share / 3:.2%}"
                print(f"    {way:36}{row['distillation'] / 1e9:10.2f}{row['share']:10.2%}{verdict:>30}")


def main() -> None:
    torch.set_num_threads(1)
    results: dict[str, Any] = {"transformers": version("transformers"), "targets": TARGETS, "images": {}}
    for image in IMAGES:
        families = results["images"][f"{image[0]} x {image[1]}"] = {}
        for family in ("Deformable DETR", "Conditional DETR"):
            families[family] = count_family(family, image)
            report(family, image, families[family])
    # The backbone on the paper's own image.
    results["AdaMixer"] = count_adamixer(families["Conditional DETR"]["basic"]["student"]["backbone"])
    print(f"\nAdaMixer, on the paper's basic costs; paper {PAPER['AdaMixer'].share:.2%}")
    for name in CRITERIA:
        row = results["AdaMixer"][name]
        print(
            f"  {name:10} losses {row['criterion']['total'] / 1e9:.2f} G, {row['share of losses']:.2%}; "
            f"with a query group of at most {results['AdaMixer']['query_group, at most'] / 1e9:.2f} G "
            f"{row['share, at most']:.2%}"
        )
    results["paper"] = {family: column._asdict() for family, column in PAPER.items()}
    print(save("kd_cost_table", results))


if __name__ == "__main__":
    main()
