"""Target-aware feature distillation."""

from __future__ import annotations

import itertools
import weakref
from functools import partial

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from detr_kd_losses import query_quality, target_aware_feature_loss, target_aware_mask, testing

from support import cases, oracles
from support.comparisons import (
    assert_agrees_with_oracle,
    assert_rejects,
    assert_same_evaluation,
    assert_vanishes,
    to_meta,
    to_tensors,
)
from support.tolerances import TOLERANCES, assert_close

STUDENT = ("student_features",)
OPTIONS = [
    {"variant": variant, "normalize": normalize}
    for variant, normalize in itertools.product(["paper", "official"], [None, "queries", "max", "mean"])
]
LOSS_OPTIONS = [*OPTIONS, *({**options, "relative": True} for options in OPTIONS)]


def assert_agrees(case, dtype, **options):
    return assert_agrees_with_oracle(
        target_aware_feature_loss, oracles.target_aware_feature_loss, case, dtype, wrt=STUDENT, **options
    )


def one_level(case):
    return {name: value[0] if isinstance(value, list) else value for name, value in case.items()}


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("options", LOSS_OPTIONS, ids=str)
@pytest.mark.parametrize("stages", [None, 2])
@pytest.mark.parametrize("padded", [True, False], ids=["padded", "not padded"])
def test_loss(padded, stages, options, dtype):
    assert_agrees(cases.features(stages=stages, padded=padded), dtype, **options)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("options", LOSS_OPTIONS, ids=str)
@pytest.mark.parametrize("queries", [1, 2, cases.CHANNELS - 1, cases.CHANNELS])
def test_loss_with_few_queries(queries, options, dtype):
    """Fewer queries than channels are multiplied one by one, several stages at a time; more through their form."""
    assert_agrees(cases.features(stages=4, queries=queries), dtype, **options)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("variant", ["paper", "official"])
def test_loss_of_a_single_level(variant, dtype):
    assert_agrees(one_level(cases.features(sizes=((3, 5),))), dtype, variant=variant)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("padded", [True, False], ids=["padded", "not padded"])
def test_mask(padded, options, dtype):
    """With stages in front of the batch, each stage has the mask that it has alone."""
    case = one_level(cases.features(padded=padded))
    features, queries, quality = (
        torch.tensor(case[name], dtype=dtype) for name in ("teacher_features", "teacher_queries", "quality")
    )
    padding_mask = case.get("padding_mask")
    given = None if padding_mask is None else torch.tensor(padding_mask)
    mask = target_aware_mask(features.requires_grad_(), queries, quality, padding_mask=given, **options)
    assert mask.dtype == dtype
    assert not mask.requires_grad
    assert mask.shape == (cases.STAGES, cases.IMAGES, 4, 3)
    rounded = [tensor.detach().double().numpy() for tensor in (features, queries, quality)]
    for stage in range(cases.STAGES):
        expected = oracles.target_aware_mask(
            rounded[0], rounded[1][stage], rounded[2][stage], padding_mask=padding_mask, **options
        )
        assert_close(mask[stage], expected)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("topk", [3, 100])
def test_public_code(topk, dtype):
    """Official quality and official mask give the numbers of the paper's public code, over levels and stages."""
    teacher = cases.of_teacher(cases.detection(queries=6, count=2))
    case = {
        **cases.features(padded=False),
        **{name: teacher[name] for name in ("teacher_logits", "teacher_boxes", "target_boxes", "target_mask")},
    }
    del case["quality"]

    def loss(student_features, teacher_features, teacher_queries, *teacher_and_targets, topk):
        logits, boxes, target_boxes, target_mask = teacher_and_targets
        labels, assignment = (torch.tensor(teacher[name]) for name in ("target_labels", "teacher_assignment"))
        targets = (labels, target_boxes, target_mask)
        quality = query_quality(logits, boxes, *targets, assignment, variant="official", topk=topk)
        return target_aware_feature_loss(
            student_features, teacher_features, teacher_queries, quality, variant="official"
        )

    assert_agrees_with_oracle(
        lambda **arguments: loss(*(arguments[name] for name in case), topk=topk),
        lambda **arguments: oracles.official_feature_loss(**arguments, topk=topk),
        case,
        dtype,
        wrt=STUDENT,
    )


def without_quality(case):
    return {**case, "quality": np.zeros_like(case["quality"])}


def without_valid_cells(case):
    return {**case, "padding_mask": [np.zeros_like(mask) for mask in case["padding_mask"]]}


def without_images(case):
    levels = {name: [level[:0] for level in value] for name, value in case.items() if isinstance(value, list)}
    return {**case, **levels, **{name: case[name][:, :0] for name in ("teacher_queries", "quality")}}


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("normalize", ["queries", "max", "mean"])
@pytest.mark.parametrize(
    ("case", "variant"),
    [
        (cases.features(queries=0), "paper"),
        (cases.features(queries=0, stages=None), "paper"),
        (without_quality(cases.features()), "paper"),
        (without_valid_cells(cases.features()), "paper"),
        (without_valid_cells(cases.features()), "official"),
        (without_images(cases.features()), "paper"),
        (without_images(cases.features()), "official"),
        (cases.features(stages=0), "paper"),
        (cases.features(stages=0), "official"),
        (cases.features(sizes=((0, 3),)), "paper"),
        (cases.features(sizes=((0, 3),), padded=False), "official"),
    ],
)
def test_nothing_to_distil(case, variant, normalize, relative, dtype):
    options = {"variant": variant, "normalize": normalize, "relative": relative}
    assert_vanishes(target_aware_feature_loss, to_tensors(case, dtype), wrt=STUDENT, **options)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("variant", ["paper", "official"])
def test_relative_to_a_teacher_without_features(variant, dtype):
    """Nothing is an error of 100 %: there is nothing to learn."""
    case = cases.features()
    case["teacher_features"] = [np.zeros_like(level) for level in case["teacher_features"]]
    assert_vanishes(target_aware_feature_loss, to_tensors(case, dtype), wrt=STUDENT, variant=variant, relative=True)


@pytest.mark.parametrize("law", testing.RELATIVE_FEATURE_LAWS.values(), ids=str)
@pytest.mark.parametrize("options", LOSS_OPTIONS[len(OPTIONS) :], ids=str)
def test_laws_of_the_relative_loss(options, law):
    law(partial(target_aware_feature_loss, **options), max_examples=20)


def test_a_sum_breaks_the_laws_of_a_mean():
    report = testing.law_report(testing.RELATIVE_FEATURE_LAWS, target_aware_feature_loss, max_examples=50)
    assert report.names("broken") == ("any_scale", "blank_student", "stages_repeat", "levels_repeat", "images_mean")


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_official_weight_without_queries_is_its_floor(dtype):
    """Also of an image in which no query is good: the public code's mask is never 0."""
    for case in (cases.features(queries=0), without_quality(cases.features())):
        assert assert_agrees(case, dtype, variant="official")["loss"] > 0


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("options", LOSS_OPTIONS, ids=str)
def test_equal_to_the_teacher(options, dtype):
    """Cells and queries of zeros included."""
    case = cases.features()
    for level in case["student_features"]:
        level[0, :, 0, 0] = 0.0
    case["teacher_queries"][..., 0, :] = 0.0
    case["teacher_features"] = case["student_features"]
    assert_vanishes(target_aware_feature_loss, to_tensors(case, dtype), wrt=STUDENT, **options)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("options", [{}, {"variant": "official"}, {"normalize": "mean", "relative": True}], ids=str)
def test_cells_and_queries_without_direction(options, dtype):
    """A vector of zeros is similar to nothing, in a cell or in a query, however good the query."""
    case = cases.features()
    case["teacher_features"][0][0, :, 1, 1] = 0.0
    case["teacher_queries"][..., 0, :] = 0.0
    case["quality"][..., 0] = 9.0
    assert_agrees(case, dtype, **options)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize("options", LOSS_OPTIONS, ids=str)
def test_padding_does_not_matter(options, value):
    case = cases.features()
    broken = case
    for name in ("student_features", "teacher_features"):
        levels = zip(case[name], case["padding_mask"], strict=True)
        broken = {**broken, name: [np.where(valid[:, None], level, value) for level, valid in levels]}
    assert_same_evaluation(target_aware_feature_loss, case, broken, torch.float32, wrt=STUDENT, **options)


class LiveTensors(TorchDispatchMode):
    """Sums the bytes that operators allocate for their outputs, while these live, and keeps the largest output."""

    def __init__(self, *inputs):
        super().__init__()
        self.live, self.peak, self.largest = 0, 0, 0
        self.known = weakref.WeakSet(tensor.untyped_storage() for tensor in inputs)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
                self.watch(tensor.untyped_storage())
        return result

    def watch(self, storage):
        if storage not in self.known:
            self.known.add(storage)
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.release, storage.nbytes())

    def release(self, size):
        self.live -= size


@pytest.mark.parametrize("options", [{}, {"normalize": "max", "relative": True}, {"variant": "official"}], ids=str)
def test_memory(options):
    """Forward and backward allocate less than 8 times the two feature maps, and nothing of M x H x W elements."""
    queries, channels, size = 900, 256, 200
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 1, channels, size, size, generator=generator)
    student.requires_grad_()
    queries_and_quality = (
        torch.randn(1, queries, channels, generator=generator),
        torch.rand(1, queries, generator=generator),
    )
    maps = 2 * teacher.nbytes
    with LiveTensors(student, teacher, *queries_and_quality) as memory:
        target_aware_feature_loss(student, teacher, *queries_and_quality, **options).backward()
    assert student.grad.isfinite().all()
    assert student.nbytes <= memory.peak < 8 * maps
    assert memory.largest < queries * size * size


def test_memory_is_measured():
    """The measure sees what a naive mask takes: M x H x W."""
    with LiveTensors() as memory:
        similarity = torch.rand(9, 5).matmul(torch.rand(5, 100))
        del similarity
    assert memory.peak == 4 * (9 * 5 + 5 * 100 + 9 * 100)
    assert memory.live == 0
    assert memory.largest == 900


@pytest.mark.parametrize(
    ("argument", "change", "error", "match"),
    [
        (
            "student_features",
            lambda x: [1.0, x[1]],
            TypeError,
            r"`student_features\[0\]` must be a tensor, got 1.0 of type float",
        ),
        ("student_features", lambda x: [x[0].long(), x[1]], TypeError, "`student_features` must have a floating-point"),
        ("student_features", lambda x: [x[0][0], x[1]], ValueError, r"`student_features` must have shape \(B, D, H, W"),
        ("student_features", lambda x: x[::-1], ValueError, "`student_features` and `teacher_features` must have the"),
        ("student_features", lambda x: x[:1], ValueError, "`teacher_features` must have as many levels as .* 2 and 1"),
        ("student_features", [], ValueError, "`teacher_features` must have as many levels as .* 2 and 0"),
        ("teacher_features", lambda x: x[:1], ValueError, "`teacher_features` must have as many levels as .* 1 and 2"),
        ("teacher_features", lambda x: x[0], ValueError, "`teacher_features` must have as many levels as .* 1 and 2"),
        ("teacher_features", lambda x: [x[0], to_meta(x[1])], ValueError, "`teacher_features` must be on the device"),
        ("teacher_queries", lambda x: x.long(), TypeError, "`teacher_queries` must have a floating-point dtype, got"),
        ("teacher_queries", lambda x: x[..., 1:], ValueError, r"`teacher_queries` must have shape \(B, M, D\) or"),
        ("teacher_queries", lambda x: x[:, 1:], ValueError, r"`teacher_queries` must have shape \(B, M, D\) or"),
        ("teacher_queries", lambda x: x[0, 0], ValueError, r"`teacher_queries` must have shape \(B, M, D\) or"),
        ("teacher_queries", to_meta, ValueError, "`teacher_queries` must be on the device of `teacher_features` cpu"),
        ("quality", lambda x: x.long(), TypeError, "`quality` must have a floating-point dtype, got torch.int64"),
        ("quality", lambda x: x[0], ValueError, "`quality` and `teacher_queries` must have the same dimensions"),
        ("quality", to_meta, ValueError, "`quality` must be on the device of `teacher_features` cpu, got meta"),
        ("padding_mask", lambda x: x[:1], ValueError, "`padding_mask` must have as many levels as .* 1 and 2"),
        ("padding_mask", lambda x: [x[0].int(), x[1]], TypeError, "`padding_mask` must have dtype torch.bool, got"),
        ("padding_mask", lambda x: x[::-1], ValueError, "`padding_mask` and `teacher_features` must have the same"),
        ("padding_mask", lambda x: [x[0], to_meta(x[1])], ValueError, "`padding_mask` must be on the device of"),
        ("variant", "mine", ValueError, "`variant` must be one of 'paper', 'official', got 'mine'"),
        ("normalize", "sum", ValueError, "`normalize` must be one of 'queries', 'max', 'mean', got 'sum'"),
    ],
)
def test_errors_of_the_loss(argument, change, error, match):
    assert_rejects(target_aware_feature_loss, cases.features(), argument, change, error, match)


def test_no_level_at_all():
    arguments = to_tensors(cases.features(padded=False)) | {"student_features": [], "teacher_features": []}
    with pytest.raises(ValueError, match=r"`teacher_features` must have as many levels as .*, at least 1; got 0 and 0"):
        target_aware_feature_loss(**arguments)


@pytest.mark.parametrize(
    ("argument", "change", "error", "match"),
    [
        ("features", lambda x: x[0], ValueError, r"`features` must have shape \(B, D, H, W\), got \(5, 4, 3\)"),
        ("features", to_meta, ValueError, "`queries` must be on the device of `features` meta, got cpu"),
        ("queries", lambda x: x[..., 1:], ValueError, r"`queries` must have shape \(B, M, D\) .* `features` \(2, 5, 4"),
        ("quality", lambda x: x[..., 1:], ValueError, "`quality` and `queries` must have the same dimensions"),
        ("padding_mask", lambda x: x[:1], ValueError, "`padding_mask` and `features` must have the same dimensions"),
        ("variant", "mine", ValueError, "`variant` must be one of 'paper', 'official', got 'mine'"),
        ("normalize", "sum", ValueError, "`normalize` must be one of 'queries', 'max', 'mean', got 'sum'"),
    ],
)
def test_errors_of_the_mask(argument, change, error, match):
    case = one_level(cases.features())
    case["features"], case["queries"] = case.pop("teacher_features"), case.pop("teacher_queries")
    del case["student_features"]
    assert_rejects(target_aware_mask, case, argument, change, error, match)
