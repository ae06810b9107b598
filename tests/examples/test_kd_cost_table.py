"""The table of costs: what its counters count, and what it must show."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch._subclasses import FakeTensorMode

pytest.importorskip("transformers", reason="the cost table is counted on detectors of transformers")

BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"
FAMILIES = ("Deformable DETR", "Conditional DETR")
WIDTH, DECODER_LAYERS = 32, 3
TINY = {
    "backbone": {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 16]},
    "d_model": WIDTH,
    "encoder_layers": 1,
    "encoder_ffn_dim": 16,
    "encoder_attention_heads": 4,
    "decoder_layers": DECODER_LAYERS,
    "decoder_ffn_dim": 16,
    "decoder_attention_heads": 4,
}
# Maps of the encoder's memory in each decoder layer: values, or content keys, position keys and values.
MEMORY_PROJECTIONS = {"Deformable DETR": 1, "Conditional DETR": 3}


@pytest.fixture(scope="module")
def table() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        return importlib.import_module("kd_cost_table")


def test_products_count_multiply_adds(table):
    a, b, bias = torch.ones(5, 3), torch.ones(3, 7), torch.ones(7)
    assert table.multiply_adds(lambda: a @ b) == table.multiply_adds(lambda: torch.addmm(bias, a, b)) == 5 * 3 * 7
    stack, total = torch.ones(2, 5, 3), torch.ones(2, 5, 5)
    assert table.multiply_adds(lambda: total.baddbmm_(stack, stack.mT)) == 2 * 5 * 3 * 5
    images, kernels = torch.ones(2, 3, 8, 8), torch.ones(4, 3, 3, 3)
    assert table.multiply_adds(lambda: torch.conv2d(images, kernels)) == 2 * 4 * 6 * 6 * 3 * 3 * 3
    assert table.multiply_adds(lambda: a + a) == 0


def test_elements_count_what_is_no_product_and_no_view(table):
    a = torch.ones(3, 4)
    for function, expected in (
        (lambda: a.mT.unsqueeze(0).expand(5, 4, 3), 0),
        (lambda: a @ a.mT, 0),
        (lambda: torch.ones(2, 3, 3).baddbmm_(a.expand(2, 3, 4), a.mT.expand(2, 4, 3)), 2 * 3 * 3),  # the ones
        (lambda: a * 2 + a, 2 * 12),
        (a.sum, 12),
        (lambda: a.unsqueeze(1) - a, 3 * 3 * 4),
    ):
        with table.ElementCounter() as counter:
            function()
        assert counter.operations == expected


@pytest.mark.parametrize(("name", "maps"), [("official", "directions"), ("Eq. 9", "one form"), ("default", "targets")])
def test_products_of_the_criterion(name, maps, table):
    """Matching multiplies logits by scores; a mask is a sum over queries, multiplied by every cell of the features."""
    layers, images, rows, columns, classes, channels, targets = 3, 2, 5, 7, 4, 8, 2
    levels = ((6, 5), (3, 3))
    case = table.Case(images, layers, rows, columns, classes, channels, targets, levels)
    cells = images * sum(height * width for height, width in levels)
    matching = layers * images * rows * columns * classes
    sums = layers * images * columns * channels
    mask = {
        "directions": sums + layers * channels * cells,
        "one form": sums * channels + channels**2 * cells,
        # The queries of the targets alone, each multiplied by every cell, then summed by quality.
        "targets": layers * targets * (channels + 1) * cells,
    }[maps]
    cost = table.count_criterion(table.CRITERIA[name], case)
    assert cost["products"] == matching + mask
    assert cost["total"] == cost["products"] + cost["elements"] > cost["feature"] > mask


@pytest.mark.parametrize("family", FAMILIES)
def test_ways_of_the_query_group_differ_by_what_they_repeat(family, table):
    own, extra, image = 5, 7, (64, 96)
    with FakeTensorMode():
        model = table.detector(family, [1, 1, 1, 1], num_queries=own, **TINY)
        tap, basic = table.count_forward(model, image)
        cells = sum(level.shape[-2:].numel() for level in tap.features()[0])
        ways = table.count_query_group(tap, own, extra)
    across_groups = DECODER_LAYERS * 2 * own * extra * (2 * WIDTH)
    memory = DECODER_LAYERS * MEMORY_PROJECTIONS[family] * cells * WIDTH**2
    least = ways["replay, memory kept"]
    assert ways["concatenation"] - least == across_groups
    assert ways["replay"] - least == memory
    assert 0 < least < ways["replay"] < basic["total"]


@pytest.mark.parametrize("family", FAMILIES)
def test_adapter_replays_at_the_least_cost(family, table):
    """Beside it the heads, which the models have run by themselves."""
    image = (64, 96)
    with FakeTensorMode():
        models = {role: table.detector(family, [1, 1, 1, 1], num_queries=7, **TINY) for role in table.DEPTHS}
        tap, basic = table.count_forward(models["student"], image)
        least = table.count_query_group(tap, 7, 7)["replay, memory kept"]
        step = table.count_adapter(**models, image=image)
    assert basic["heads_of_model"] > 0
    assert step == 2 * (basic["total"] + basic["heads_of_model"]) + least


def test_share(table):
    basic = {"teacher": {"total": 60}, "student": {"total": 30}}
    paper = table.Published((0, 0), (2e-9, 3e-9), 0, 0)
    assert table.shares(10, basic, paper) == {"distillation": 10, "share": 0.1, "share_with_published_basic": 10 / 15}


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_those_of_the_paper(family, table):
    with FakeTensorMode():
        counts = [table.count_parameters(table.detector(family, depths)) for depths in table.DEPTHS.values()]
    for count, published in zip(counts, table.PAPER[family].parameters, strict=True):
        assert count["trained"] / 1e6 == pytest.approx(published, abs=0.01)
        assert count["all"] / 1e6 == pytest.approx(published, rel=0.03)


@pytest.fixture(scope="module", params=FAMILIES)
def counted(request, table):
    return request.param, table.count_family(request.param, table.IMAGES[0])


@pytest.mark.parametrize("criterion", ["Eq. 9", "official", "default"])
@pytest.mark.parametrize("way", ["concatenation", "replay by the adapter"])
def test_share_is_at_most_a_third_of_the_papers(way, criterion, counted, table):
    family, counts = counted
    assert len(counts["levels"]) == (4 if family == "Deformable DETR" else 1)
    assert counts["groups"]["all queries"]["share"][criterion][way]["share"] <= table.PAPER[family].share / 3


@pytest.mark.parametrize("criterion", ["Eq. 9", "official", "default"])
@pytest.mark.parametrize("way", ["concatenation", "replay, memory kept", "replay by the adapter"])
def test_share_with_the_best_third_of_the_queries(way, criterion, counted):
    """A fifth of the paper's share in Conditional DETR; the choice of the queries is counted."""
    family, counts = counted
    most = {"Conditional DETR": 0.0129, "Deformable DETR": 0.006}[family]
    assert counts["groups"]["best third"]["share"][criterion][way]["share"] <= most


def test_a_third_of_the_queries_costs_at_most_a_third_of_all(counted):
    groups = counted[1]["groups"]
    few, many = (groups[name]["query_group"] for name in ("best third", "all queries"))
    for way in ("concatenation", "replay, memory kept"):
        assert 0.2 * many[way] < few[way] < many[way] / 3
    few, many = (groups[name]["criterion"]["default"] for name in ("best third", "all queries"))
    assert few["products"] == many["products"]
    assert few["elements"] < many["elements"]


def test_replay_of_the_adapter_is_the_least_beside_its_heads(counted):
    counts = counted[1]
    heads = sum(cost["heads_of_model"] for cost in counts["basic"].values())
    for distilled in counts["groups"].values():
        group = distilled["query_group"]
        assert group["replay by the adapter"] == group["replay, memory kept"] + heads


def test_kept_bytes_are_those_of_each_storage_once(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    full_size = importlib.import_module("full_size")
    a, b = torch.ones(10, requires_grad=True), torch.ones(10, requires_grad=True)
    assert full_size.kept_bytes(lambda: a * b) == 2 * 40
    assert full_size.kept_bytes(lambda: a * b, [a]) == 40
    assert full_size.kept_bytes(lambda: a[:5] * a[5:]) == 40
    assert full_size.kept_bytes(lambda: a + b) == 0
