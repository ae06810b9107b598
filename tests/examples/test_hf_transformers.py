"""The adapter for transformers: it reads what the models say, and its query group is a group apart."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

pytest.importorskip("transformers", reason="the Hugging Face adapter needs transformers")


import detr_kd_losses as dkl
from detr_kd_losses.taps import QueryGroup, QueryProjection, Tap, distillation_loss

from support import zoo

FAMILIES = list(zoo.FAMILIES)
GROUP_DETR = ("lw_detr", "rf_detr")
DENOISING = ("rt_detr", "rt_detr_v2", "d_fine", "deimv2")
EXACT = {"rtol": 0, "atol": 1e-6}
CONTROL = 1e-4  # what must differ does so by a hundred times the tolerance
families = pytest.mark.parametrize("family", FAMILIES)


def run(model: nn.Module, *, group: QueryGroup | None = None, **inputs: Any) -> tuple[Any, dkl.DetectorOutput]:
    """The model's own answer and what the adapter reads."""
    with Tap(model) as tap:
        answer = model(**inputs)
    return answer, tap.output(group=group)


@families
@torch.no_grad()
def test_predictions_are_those_of_the_model(family: str) -> None:
    model = zoo.build(family)
    inputs = zoo.images(model)
    expected = model(**inputs)
    answer, output = run(model, **inputs)
    for actual in (answer, output):
        logits, boxes = (
            (answer.logits, answer.pred_boxes) if actual is answer else (output.logits[-1], output.boxes[-1])
        )
        assert_close(logits, expected.logits, **EXACT)
        assert_close(boxes, expected.pred_boxes, **EXACT)
    assert output.logits.shape[:3] == output.boxes.shape[:3] == (zoo.LAYERS, 2, zoo.QUERIES)
    assert output.queries.shape == (zoo.LAYERS, 2, zoo.QUERIES, zoo.WIDTH)
    between_layers = (output.boxes[1:] - output.boxes[:-1]).abs().amax((1, 2, 3))
    between_queries = output.boxes.std(dim=2).amax((1, 2))
    assert (between_layers > 1e-3).all(), "a test of layers needs layers that differ"
    assert (between_queries > 1e-3).all(), "a test of queries needs queries that differ"


@families
@torch.no_grad()
def test_earlier_layers_are_the_auxiliary_outputs(family: str) -> None:
    model = zoo.build(family, auxiliary_loss=True)
    answer, output = run(model, **zoo.images(model), labels=zoo.labels())
    auxiliary = answer.auxiliary_outputs[: zoo.LAYERS - 1]
    assert len(auxiliary) == zoo.LAYERS - 1
    if family in {"d_fine", "deimv2"}:
        auxiliary = answer.auxiliary_outputs[1 : zoo.LAYERS - 1]  # entry 0 is the prediction before the first layer
    for layer, expected in enumerate(auxiliary):
        assert_close(output.logits[layer], expected["logits"], **EXACT)
        assert_close(output.boxes[layer], expected["pred_boxes"], **EXACT)


@families
def test_frozen_teacher_shows_all_layers(family: str) -> None:
    """It puts itself into evaluation mode at each call, where D-FINE and DEIMv2 answer their last layer alone."""
    teacher = dkl.FrozenTeacher(zoo.build(family))
    with Tap(teacher.module) as tap:
        teacher(**zoo.images(teacher.module))
    assert len(tap.output().logits) == zoo.LAYERS


@families
@torch.no_grad()
def test_replay_of_own_queries_reproduces_the_predictions(family: str) -> None:
    model = zoo.build(family)
    with Tap(model) as tap:
        model(**zoo.images(model))
    output = tap.output(group=tap.query_group())
    assert_close(output.group.logits, output.logits, **EXACT)
    assert_close(output.group.boxes, output.boxes, **EXACT)


@families
@pytest.mark.usefixtures("float64")
@torch.no_grad()
def test_replay_equals_concatenation_under_a_block_mask(family: str) -> None:
    student, teacher = (zoo.build(family, seed=seed) for seed in (0, 1))
    inputs = zoo.images(student)
    with Tap(teacher) as teacher_tap:
        teacher(**inputs)
    group = teacher_tap.query_group()
    if family not in GROUP_DETR:  # which cannot keep groups of different sizes apart themselves
        group = group.map(lambda part: torch.cat([part, part[:, :5].flip(1)], 1))
    with Tap(student) as tap:
        student(**inputs)
    output = tap.output(group=group)
    own = tap.query_group()
    both = QueryGroup(**{role: torch.cat([own.parts[role], group.parts[role]], 1) for role in own.parts}, unit=own.unit)
    sizes = [own.content.shape[1], group.content.shape[1]]

    with self_attention_within(student, sizes):
        masked = tap.replay(both)
    for actual, mine, teachers in (
        (masked.logits, output.logits, output.group.logits),
        (masked.boxes, output.boxes, output.group.boxes),
    ):
        assert_close(actual[:, :, : sizes[0]], mine, **EXACT)
        assert_close(actual[:, :, sizes[0] :], teachers, **EXACT)

    unmasked = tap.replay(both)
    assert (unmasked.logits[-1, :, : sizes[0]] - output.logits[-1]).abs().max() > CONTROL, "the mask must matter"
    assert (unmasked.logits[-1, :, sizes[0] :] - output.group.logits[-1]).abs().max() > CONTROL, "the mask must matter"


@contextmanager
def self_attention_within(model: nn.Module, sizes: list[int]) -> Iterator[None]:
    """Keep groups of queries apart in the decoder's self-attention, by the means that the model itself has."""
    mask = dkl.query_group_attention_mask(sizes)
    additive = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(mask, -torch.inf)[None, None]
    if model.config.model_type == "table-transformer":
        additive = additive.expand(2, -1, -1, -1)  # which wants the batch spelled out

    def set_mask(_: nn.Module, arguments: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return arguments, {**options, "attention_mask": additive}

    def split_groups(module: nn.Module, _: Any) -> None:
        module.training = True

    hooks = [
        layer.self_attn.register_forward_pre_hook(split_groups)
        if hasattr(model.config, "group_detr")
        else layer.self_attn.register_forward_pre_hook(set_mask, with_kwargs=True)
        for layer in model.model.decoder.layers
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@families
def test_training_step_of_the_student_is_not_disturbed(family: str) -> None:
    """The same loss, predictions, gradients and buffers with and without the extra group."""
    teacher = zoo.build(family, seed=1)
    with torch.no_grad(), Tap(teacher) as teacher_tap:
        teacher(**zoo.images(teacher))
    results = []
    for group in (None, teacher_tap.query_group()):
        student = zoo.build(family).train()
        torch.manual_seed(0)
        answer, output = run(student, group=group, **zoo.images(student), labels=zoo.labels())
        answer.loss.backward()
        gradients = {name: parameter.grad for name, parameter in student.named_parameters()}
        results.append((answer.loss, output.logits, output.boxes, gradients, dict(student.named_buffers())))
        assert output.logits.shape[:3] == (zoo.LAYERS, 2, zoo.QUERIES)
        at_last = answer.logits[:, -zoo.QUERIES :] if family in DENOISING else answer.logits[:, : zoo.QUERIES]
        assert_close(output.logits[-1], at_last, **EXACT)
    assert_close(results[0], results[1], rtol=0, atol=0)
    if family in DENOISING + GROUP_DETR:
        assert answer.logits.shape[1] > zoo.QUERIES, "a test of extra queries needs extra queries"


@families
@torch.no_grad()
def test_features_are_the_maps_that_the_decoder_attends_to(family: str) -> None:
    model = zoo.build(family)
    answer, output = run(model, **zoo.images(model), output_hidden_states=True)
    height = 8 if family in {"lw_detr", "rf_detr"} else 4
    width = {"rf_detr": 8, "lw_detr": 6}.get(family, 3)
    if len(output.features) == 1:
        assert output.features[0].shape == (2, zoo.WIDTH, height, width)
    else:
        expected = [(2, zoo.WIDTH, 16, 12), (2, zoo.WIDTH, 8, 6), (2, zoo.WIDTH, 4, 3), (2, zoo.WIDTH, 2, 2)]
        assert [level.shape for level in output.features] == expected[: model.config.num_feature_levels]
    cells = torch.cat([level.flatten(2) for level in output.features], 2).transpose(1, 2)
    if family in DENOISING:
        projected = zip(model.model.decoder_input_proj, answer.encoder_last_hidden_state, strict=True)
        assert_close(cells, torch.cat([project(level).flatten(2) for project, level in projected], 2).mT)
    elif family not in GROUP_DETR:
        assert_close(cells, answer.encoder_last_hidden_state)


@pytest.mark.parametrize("family", ["detr", "table_transformer", "conditional", "dab", "deformable"])
@torch.no_grad()
def test_padding_mask_is_that_of_the_images(family: str) -> None:
    model = zoo.build(family)
    output = run(model, **zoo.images(model))[1]
    for level, valid in zip(output.features, output.padding_mask, strict=True):
        assert valid.shape == (2, *level.shape[-2:])
        assert valid[0].all()
        width = level.shape[-1]
        is_image = torch.arange(width) < {12: 8, 6: 4, 3: 2, 2: 2}[width]  # two thirds; the centre of a cell counts
        assert_close(valid[1], is_image.expand_as(valid[1]))


@families
@pytest.mark.parametrize("preset", ["official", "paper"])
def test_distils_across_width_depth_and_number_of_queries(family: str, preset: str) -> None:
    more = {"two_stage_num_proposals": 20} if family == "deformable_two_stage" else {}
    teacher = zoo.build(family, seed=1, width=128, decoder_layers=4, num_queries=20, **more).requires_grad_(False)
    student = zoo.build(family).train()
    projection, loss = QueryProjection(student, teacher), distillation_loss(student, teacher)
    loss.terms["logits"].matching = "joint" if preset == "official" else "positives_first"
    loss.terms["feature"].variant = preset
    with Tap(teacher) as teacher_tap:
        teacher(**zoo.images(teacher))
    teacher_output, group = teacher_tap.output(), projection(teacher_tap.query_group())
    targets = seen_by(teacher_output)
    output = run(student, group=group, **zoo.images(student), labels=targets)[1]
    assert output.group.logits.shape[:3] == (zoo.LAYERS, 2, 20)
    terms = loss(output, teacher_output, dkl.pad_targets(targets))
    assert len(terms) == 7
    sum(terms.values()).backward()
    for name, term in terms.items():
        assert term.isfinite(), name
        assert term > 0, name
    learned = [*loss.parameters(), *projection.parameters()]
    assert all(parameter.grad.isfinite().all() for parameter in learned)
    content_is_zero = family in {"detr", "table_transformer", "conditional", "dab"}  # and its map has nothing to learn
    assert sum(bool(parameter.grad.any()) for parameter in learned) == len(learned) - content_is_zero
    assert any(parameter.grad.any() for parameter in student.model.decoder.layers[0].parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters())


def seen_by(teacher: dkl.DetectorOutput) -> list[dict[str, Tensor]]:
    """Targets that the teacher detects: its first three predictions for each image."""
    labels, boxes = teacher.logits[-1, :, :3, : zoo.CLASSES].argmax(-1), teacher.boxes[-1, :, :3].clamp(0.05, 0.95)
    return [{"class_labels": label, "boxes": box} for label, box in zip(labels, boxes, strict=True)]


@pytest.mark.parametrize(("student", "teacher"), [("rt_detr", "d_fine"), ("d_fine", "rt_detr_v2")])
def test_families_with_the_same_kind_of_queries_teach_each_other(student: str, teacher: str) -> None:
    student, teacher = zoo.build(student), zoo.build(teacher, seed=1)
    with torch.no_grad(), Tap(teacher) as teacher_tap:
        teacher(**zoo.images(teacher))
    output = run(student, group=teacher_tap.query_group(), **zoo.images(student))[1]
    terms = distillation_loss(student, teacher)(output, teacher_tap.output(), dkl.pad_targets(zoo.labels()))
    assert all(term.isfinite() for term in terms.values())


def test_softmax_teacher_of_a_sigmoid_student() -> None:
    student, teacher = zoo.build("deformable"), zoo.build("detr", seed=1)
    loss = distillation_loss(student, teacher, terms=[dkl.LogitsTerm()])
    with torch.no_grad():
        outputs = [run(model, **zoo.images(model))[1] for model in (student, teacher)]
    assert outputs[1].logits.shape[-1] == outputs[0].logits.shape[-1] + 1
    assert loss(*outputs, dkl.pad_targets(zoo.labels()))["loss_kd_class"] > 0


@pytest.mark.parametrize("family", ["detr", "d_fine", "lw_detr"])
def test_tap_leaves_no_trace(family: str) -> None:
    model = zoo.build(family).train()
    before = traces(model)
    with Tap(model) as tap:
        model(**zoo.images(model))
    group = tap.query_group()
    tap.output(group=group)
    assert traces(model) == before
    with pytest.raises(RuntimeError):
        tap.replay(group._replace(content=group.content[:, :5]))
    assert traces(model) == before


def traces(model: nn.Module) -> dict[str, tuple[bool, int, int]]:
    """Mode and number of hooks of each module."""
    return {
        name: (module.training, len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    }


class TestMistakes:
    """A user's mistake gets an error that says what to do."""

    def test_model_without_a_decoder(self) -> None:
        with pytest.raises(ValueError, match=r"Linear has none: write a Description"):
            Tap(nn.Linear(2, 2))

    def test_core_of_a_model(self) -> None:
        with pytest.raises(ValueError, match=r"must have its decoder at 'model.decoder', got DetrModel"):
            Tap(zoo.build("detr").model)

    def test_no_forward_pass(self) -> None:
        model = zoo.build("detr")
        with Tap(model) as tap:
            pass
        with pytest.raises(RuntimeError, match="the model must be called inside"):
            tap.output()

    def test_replay_inside_the_block(self) -> None:
        model = zoo.build("detr")
        with Tap(model) as tap:
            model(**zoo.images(model))
            with pytest.raises(RuntimeError, match=r"after the `with Tap\(model\)` block"):
                tap.replay(tap.query_group())

    @staticmethod
    def groups(student: str, teacher: str, **options: Any) -> tuple[Tap, QueryGroup]:
        taps = []
        for model in (zoo.build(student), zoo.build(teacher, **options)):
            with torch.no_grad(), Tap(model) as tap:
                model(**zoo.images(model))
            taps.append(tap)
        return taps[0], taps[1].query_group()

    def test_queries_of_another_kind(self) -> None:
        tap, group = self.groups("deformable", "detr")
        with pytest.raises(ValueError, match=r"teacher with the same kind of queries; .* with it QueryGroupTerm"):
            tap.replay(group)

    def test_queries_of_another_width(self) -> None:
        tap, group = self.groups("rt_detr", "rt_detr", width=128)
        with pytest.raises(ValueError, match=r"must have 64 channels .*, got 128; map it with a QueryProjection"):
            tap.replay(group)

    def test_points_for_boxes(self) -> None:
        tap, group = self.groups("deformable_two_stage", "deformable")
        with pytest.raises(ValueError, match=r"`group.reference` .* 4 channels .*, got 2; leave QueryGroupTerm out"):
            tap.replay(group)

    def test_another_batch(self) -> None:
        tap, group = self.groups("detr", "detr")
        with pytest.raises(ValueError, match="must be of the same batch, 2 images, got 3"):
            tap.replay(group.map(lambda part: part[[0, 1, 0]]))

    def test_group_of_another_number_of_queries(self) -> None:
        student, teacher = zoo.build("detr"), zoo.build("detr", seed=1)
        with torch.no_grad(), Tap(teacher) as teacher_tap:
            teacher(**zoo.images(teacher))
        group = teacher_tap.query_group().map(lambda part: part[:, :7])
        output = run(student, group=group, **zoo.images(student))[1]
        with pytest.raises(ValueError, match=r"`teacher_assignment`.*`group_logits`"):
            distillation_loss(student, teacher)(output, teacher_tap.output(), dkl.pad_targets(zoo.labels()))

    def test_layer_that_the_teacher_has_not(self) -> None:
        student, teacher = zoo.build("detr"), zoo.build("detr", seed=1)
        loss = distillation_loss(student, teacher, terms=[dkl.LogitsTerm(stage_map=[1, 2, 3])])
        outputs = [run(model, **zoo.images(model))[1] for model in (student, teacher)]
        with pytest.raises(ValueError, match=r"`stage_map` must have stages in \[-3, 3\), got \[1, 2, 3\]"):
            loss(*outputs, dkl.pad_targets(zoo.labels()))
