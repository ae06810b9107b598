"""What holds for every family: hooks that go, tensors that go, queries of all kinds, errors with a remedy."""

from __future__ import annotations

import copy
import gc
import io
import subprocess
import sys
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import detr_kd_losses as dkl
from detr_kd_losses.taps import (
    Call,
    Description,
    Layers,
    QueryGroup,
    QueryProjection,
    Tap,
    query_channels,
    random_queries,
)

from support import lineage
from support.decoder_parts import WIDTH, images, targets


def tapped(kind: str = "v2", *, training: bool = True, **options: Any) -> tuple[nn.Module, Tap]:
    model = lineage.build(kind, **options).train(training)
    with Tap(model) as tap:
        model(images(), targets() if training else None)
    return model, tap


def hooks_of(model: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def test_package_does_not_import_it() -> None:
    code = "import sys, detr_kd_losses; sys.exit('detr_kd_losses.taps' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_nothing_stays_on_the_model() -> None:
    model, tap = tapped()
    tap.output(group=tap.query_group()).group.logits.sum().backward()
    assert hooks_of(model) == 0
    copied, file = copy.deepcopy(model), io.BytesIO()
    torch.save(model, file)
    assert vars(model).keys() == vars(lineage.build("v2")).keys()
    assert vars(copied.decoder.decoder).keys() == vars(lineage.build("v2").decoder.decoder).keys()


def test_nothing_stays_where_the_model_raises() -> None:
    model = lineage.build("v2").eval()
    before = {name: module.training for name, module in model.named_modules()}
    with pytest.raises(RuntimeError, match="Given groups"), Tap(model):
        model(torch.zeros(2, 4, 32, 32))
    assert hooks_of(model) == 0
    assert before == {name: module.training for name, module in model.named_modules()}
    assert model.decoder.eval_spatial_size == lineage.EVAL_SIZE


def test_no_tensor_outlives_the_tap() -> None:
    """Not even until the garbage collector comes by."""
    gc.disable()
    try:
        _, tap = tapped()
        output = tap.output(group=tap.query_group())
        kept = [weakref.ref(tensor) for tensor in (output.logits, output.group.logits, tap.call.argument("memory"))]
        del tap, output
        assert [reference() for reference in kept] == [None] * 3
    finally:
        gc.enable()


def test_teacher_holds_no_graph_and_no_projections() -> None:
    model = lineage.build("v2").eval()
    with torch.no_grad(), Tap(model) as tap:
        model(images())
    assert tap.call.projections == {}
    assert not tap.output().logits.requires_grad


def test_entering_twice_reads_the_last_call() -> None:
    model, tap = tapped(training=False)
    first = tap.output()
    with tap:
        model(images(seed=1))
    assert not torch.equal(tap.output().logits, first.logits)
    assert hooks_of(model) == 0


def test_surest_queries() -> None:
    _, teacher = tapped(seed=1, queries=10, training=False)
    _, student = tapped()
    group = teacher.query_group(share=0.3)
    logits = teacher.output().logits
    assert_close(group.selected, dkl.best_queries(logits[-1], 0.3))
    whole = teacher.query_group()
    for image, chosen in enumerate(group.selected.tolist()):
        assert_close(group.content[image], whole.content[image, chosen], rtol=0, atol=0)
        assert_close(group.reference[image], whole.reference[image, chosen], rtol=0, atol=0)
    output = student.output(group=group)
    assert_close(output.group_index, group.selected)
    assert output.group.logits.shape == (3, 2, 3, lineage.CLASSES)
    assert_close(output.group.logits, student.output(group=teacher.query_group(group.selected)).group.logits)


def test_random_queries_run_through_both() -> None:
    _, teacher = tapped(seed=1, training=False)
    _, student = tapped()
    group = random_queries(teacher.query_group(), 7, generator=torch.Generator().manual_seed(3))
    again = random_queries(teacher.query_group(), 7, generator=torch.Generator().manual_seed(3))
    assert_close(group.content, again.content, rtol=0, atol=0)
    assert group.shapes == {"content": (2, 7, WIDTH), "reference": (2, 7, 4)}
    assert_close(group.content[0], group.content[1], rtol=0, atol=0)
    assert group.reference.sigmoid().amin() > 0
    terms = dkl.DETRDistillationLoss([dkl.SharedQueryTerm()])
    losses = terms(student.output(group=group), teacher.output(group=group), dkl.pad_targets(targets()))
    sum(losses.values()).backward()
    with pytest.raises(ValueError, match="`count` must be positive, got 0"):
        random_queries(group, 0)
    boxes = QueryGroup(torch.ones(2, 3, 8), torch.ones(2, 3, 8), torch.rand(2, 3, 4), "box")
    drawn = random_queries(boxes, 1000, generator=torch.Generator().manual_seed(0))
    assert 0 <= drawn.reference.min() < drawn.reference.max() <= 1
    assert_close(drawn.content.square().mean(), torch.tensor(1.0), rtol=0.1, atol=0)
    assert not torch.equal(drawn.content, drawn.position)


def test_projection_to_the_width_of_the_student() -> None:
    _, teacher = tapped(seed=1, width=24, training=False)
    student, tap = tapped()
    with pytest.raises(ValueError, match=r"`group.content` must have 16 channels .* got 24; map it with a QueryPro"):
        tap.output(group=teacher.query_group())
    projection = QueryProjection(student, teacher.model)
    assert [name for name, _ in projection.named_parameters()] == ["maps.content.weight"]
    group = projection(teacher.query_group(share=0.5))
    assert group.selected is not None
    tap.output(group=group).group.logits.sum().backward()
    assert projection.maps["content"].weight.grad.abs().sum() > 0
    assert not list(QueryProjection(student, student).parameters())
    zero = QueryProjection(8, 16)(QueryGroup(torch.zeros(1, 2, 16), torch.ones(1, 2, 16)))
    assert zero.content.abs().max() == 0
    assert zero.shapes == {"content": (1, 2, 8), "position": (1, 2, 8)}


@pytest.mark.parametrize(
    ("group", "message"),
    [
        (QueryGroup(position=torch.zeros(2, 3, 16)), r"must have the parts \['content', 'reference'\] .* got \['posi"),
        (QueryGroup(torch.zeros(2, 3, 16), reference=torch.zeros(2, 3, 2)), r"`group.reference` must have 4 .* leave"),
        (QueryGroup(torch.zeros(3, 3, 16), reference=torch.zeros(3, 3, 4)), r"same batch, 2 images, got 3"),
    ],
)
def test_groups_that_do_not_fit(group: QueryGroup, message: str) -> None:
    _, tap = tapped(training=False)
    with pytest.raises(ValueError, match=message):
        tap.output(group=group)


def test_references_in_another_unit() -> None:
    """A repository that hands boxes to its decoder, and one that hands what comes before the sigmoid."""
    _, tap = tapped(training=False)
    group = tap.query_group()
    boxes = group._replace(reference=group.reference.sigmoid(), unit="box")
    expected = tap.output().logits
    assert_close(tap.output(group=boxes).group.logits, expected, rtol=0, atol=1e-4)


def test_levels_that_do_not_exist() -> None:
    _, tap = tapped(training=False)
    with pytest.raises(ValueError, match=r"`levels` must be of the 2 feature levels of Lineage, got \[2\]"):
        tap.output(levels=[2])


def test_what_was_not_called_is_told() -> None:
    tap = Tap(lineage.build("v2"))
    for method in (tap.output, tap.query_group, tap.features):
        with pytest.raises(RuntimeError, match=r"must be called inside `with Tap\(model\)` first"):
            method()
    with tap:
        tap.model.train()(images())
        tap.query_group()
        with pytest.raises(RuntimeError, match=r"must be called after the `with Tap\(model\)` block"):
            tap.replay(tap.query_group())


@pytest.mark.parametrize("path", ["", "decoder", "decoder.decoder"])
def test_compiled_around_the_decoder(path: str) -> None:
    model = lineage.build("v2")
    model.get_submodule(path).compile(backend="eager")
    with pytest.raises(RuntimeError, match=r"uncompiled, got a compiled \w+; compile what is inside them instead"):
        Tap(model).__enter__()
    assert hooks_of(model) == 0


def test_compiled_as_a_whole() -> None:
    model = lineage.build("v2").eval()
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(RuntimeError, match="compiled"), Tap(compiled):
        compiled(images())
    with Tap(compiled._orig_mod) as tap:
        model(images())
    assert len(tap.output().logits) == 3


def test_compiled_backbone() -> None:
    model = lineage.build("v2").train()
    model.backbone.compile(backend="eager")
    with Tap(model) as tap:
        model(images(), targets())
    assert len(tap.output().logits) == 3


def test_replay_under_the_autocast_of_the_call() -> None:
    model = lineage.build("v2").train()
    with torch.autocast("cpu", torch.bfloat16), Tap(model) as tap:
        model(images(), targets())
    output = tap.output(group=tap.query_group())
    assert output.group.logits.dtype is torch.bfloat16
    assert_close(output.group.logits, output.logits, rtol=0, atol=0.1)


def test_wrapped_models_are_unwrapped() -> None:
    class DistributedDataParallel(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    model = lineage.build("v2")
    assert Tap(DistributedDataParallel(model)).model is model


def test_copies_of_data_parallel_are_refused() -> None:
    """As `nn.DataParallel` makes them for each GPU: they share their hooks, and run in threads."""
    model = lineage.build("v2")
    replica, transformer = (module._replicate_for_data_parallel() for module in (model, model.decoder))
    replica._modules["decoder"] = transformer
    transformer._modules["decoder"] = model.decoder.decoder._replicate_for_data_parallel()
    with Tap(model), pytest.raises(RuntimeError, match=r"DecoderV2 must not run in torch\.nn\.DataParallel"):
        replica(images())


def test_models_without_a_known_decoder() -> None:
    with pytest.raises(
        ValueError, match=r"arguments are those of one of D-FINE, RT-DETR, RF-DETR.*; Linear has none: write a D"
    ):
        Tap(nn.Linear(2, 2))
    two = nn.ModuleList([lineage.build("v2"), lineage.build("v1")])
    with pytest.raises(ValueError, match=r"one decoder, ModuleList has \['0.decoder.decoder', '1.decoder.decoder'\]"):
        Tap(two)
    with pytest.raises(ValueError, match="width of the queries of Own must be in `hidden_dim` or `d_model`"):
        query_channels(Own(), OWN)


class OwnDecoder(nn.Module):
    """A decoder that no family knows: sequences first, a tuple of states."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, image: Tensor, *, queries: Tensor, hidden: Tensor | None = None) -> list[Tensor]:
        states = []
        for layer in self.layers:
            queries = layer(queries + image.mean(0, keepdim=True))
            states.append(queries)
        return states


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"decoder": OwnDecoder()})
        self.classes, self.boxes = nn.Linear(WIDTH, 3), nn.Linear(WIDTH, 4)
        self.queries = nn.Parameter(torch.randn(5, WIDTH))

    def forward(self, maps: Tensor) -> Tensor:
        memory = maps.flatten(2).permute(2, 0, 1)
        queries = self.queries.unsqueeze(1).expand(-1, len(maps), -1)
        return self.classes(self.inner["decoder"](memory, queries=queries, hidden=(maps == 0).all(1).flatten(1))[-1])


def predict_own(call: Call) -> Layers:
    states = torch.stack(call.output).transpose(1, 2)
    return Layers(call.find("classes")(states), call.find("boxes")(states).sigmoid(), states)


OWN = Description(
    "mine",
    {"content": ("queries",), "memory": ("image",), "padding": ("hidden",)},
    predict_own,
    path="inner.decoder",
    batch_first=False,
    sizes=lambda call: [(3, 2)],
)


def test_a_description_of_ones_own() -> None:
    model, maps = Own(), torch.randn(2, WIDTH, 3, 2)
    maps[1, :, :, 1] = 0
    with Tap(model, OWN) as tap:
        answer = model(maps)
    output = tap.output(group=tap.query_group())
    assert_close(output.logits[-1], answer.transpose(0, 1), rtol=0, atol=1e-6)
    assert_close(output.group.logits, output.logits, rtol=0, atol=1e-6)
    assert_close(output.features, [maps], rtol=0, atol=0)
    assert output.padding_mask[0].tolist() == [[[True, True]] * 3, [[True, False]] * 3]


def test_descriptions_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="decoder at 'nowhere', got Own"):
        Tap(Own(), OWN._replace(path="nowhere"))
    other = OWN._replace(arguments={**OWN.arguments, "reference": ("anchors", "boxes")})
    with pytest.raises(
        ValueError, match=r"argument of each of \{'reference': .*'anchors', 'boxes'.* OwnDecoder\(image"
    ):
        Tap(Own(), other)
    assert Tap(Own(), other._replace(optional=("reference",))).found.roles.keys() == {"content", "memory", "padding"}
    assert Tap(Own(), OWN._replace(path=None)).found.path == "inner.decoder"
    with Tap(Own(), OWN._replace(predict=lambda call: call.find("head"))) as tap:
        tap.model(torch.randn(1, WIDTH, 3, 2))
    with pytest.raises(AttributeError, match=r"mine decoder must be in a module with `head`, it is in \['ModuleDict',"):
        tap.output()
