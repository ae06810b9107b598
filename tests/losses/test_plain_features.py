"""Plain distances of features, and the cells that boxes touch."""

from __future__ import annotations

import gc
import weakref
from functools import partial

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import detr_kd_losses as dkl
from detr_kd_losses.testing.replicas import run_replicas

from support import cases, oracles
from support.comparisons import (
    assert_agrees_with_oracle,
    assert_rejects,
    assert_same_evaluation,
    assert_vanishes,
    to_meta,
    to_tensors,
)
from support.tolerances import TOLERANCES

STUDENT = ("student_features",)
DISTANCES = ("mse", "cosine", "pearson", "channel")
loss = dkl.feature_distillation_loss
every_distance = pytest.mark.parametrize("distance", DISTANCES)


def assert_agrees(case, dtype, **options):
    return assert_agrees_with_oracle(loss, oracles.feature_distillation_loss, case, dtype, wrt=STUDENT, **options)


def of(distance, **options):
    return cases.plain_features(weighted=distance != "channel", **options)


@every_distance
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("padded", [True, False], ids=["padded", "not padded"])
@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "not weighted"])
def test_agrees_with_the_oracle(weighted, padded, distance, dtype):
    if weighted and distance == "channel":
        return
    case = cases.plain_features(weighted=weighted, padded=padded)
    assert_agrees(case, dtype, distance=distance, temperature=2.0)


@every_distance
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_a_single_level(distance, dtype):
    case = {name: levels[0] for name, levels in of(distance, sizes=((3, 5),)).items()}
    assert_agrees(case, dtype, distance=distance)


@pytest.mark.parametrize("distance", ["mse", "cosine", "pearson"])
def test_the_mask_of_good_queries_is_a_weight(distance):
    case = cases.features(stages=None)
    given = to_tensors(case)
    pairs = zip(given["teacher_features"], given["padding_mask"], strict=True)
    queries = given["teacher_queries"], given["quality"]
    masks = [dkl.target_aware_mask(level, *queries, padding_mask=mask).numpy() for level, mask in pairs]
    features = {name: case[name] for name in ("student_features", "teacher_features", "padding_mask")}
    assert_agrees({**features, "weight": masks}, torch.float64, distance=distance)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_channels_and_cells_without_variance_or_length(dtype):
    case = of("pearson")
    for name, channels in (("student_features", (0, 1)), ("teacher_features", (1, 2))):
        for level in case[name]:
            level[:, channels] = 0.3
    assert_agrees(case, dtype, distance="pearson")
    case = of("cosine")
    for name, cells in (("student_features", (0, 1)), ("teacher_features", (1, 2))):
        for level in case[name]:
            for cell in cells:
                level.reshape(*level.shape[:2], -1)[:, :, cell] = 0.0
    arguments = to_tensors(case, dtype)
    value = loss(**arguments, distance="cosine")
    assert value.item() == pytest.approx(oracles.feature_distillation_loss(**case, distance="cosine"), rel=1e-5)
    value.backward()
    assert all(level.grad.isfinite().all() for level in arguments["student_features"])


@every_distance
def test_equal_features_have_exactly_no_loss(distance):
    case = of(distance)
    case["teacher_features"] = case["student_features"]
    arguments = to_tensors(case, torch.float32)
    value = loss(**arguments, distance=distance)
    value.backward()
    assert value == 0
    for level in arguments["student_features"]:
        assert level.grad.abs().max() < 1e-8


@pytest.mark.parametrize("distance", ["pearson", "cosine"])
def test_scale_does_not_matter(distance):
    arguments = to_tensors(of(distance))
    scaled = [3 * level + (distance == "pearson") for level in arguments["student_features"]]
    expected = loss(**arguments, distance=distance)
    assert_close(loss(**{**arguments, "student_features": scaled}, distance=distance), expected)


@every_distance
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("empty", ["no valid cell", "no cells", "no images"])
def test_nothing_to_distil(empty, distance, dtype):
    case = of(distance)
    if empty == "no valid cell":
        case["padding_mask"] = [np.zeros_like(mask) for mask in case["padding_mask"]]
    else:
        cut = (slice(None), slice(None), slice(0)) if empty == "no cells" else slice(0)
        features = {name: [level[cut] for level in case[name]] for name in ("student_features", "teacher_features")}
        case = {**case, **features}
        for name in set(case) - set(features):
            case[name] = [level[cut[1:] if empty == "no cells" else cut] for level in case[name]]
    assert_vanishes(loss, to_tensors(case, dtype), wrt=STUDENT, distance=distance)


@every_distance
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_what_padding_holds_does_not_matter(value, distance):
    case = of(distance)
    broken = {name: [level.copy() for level in levels] for name, levels in case.items()}
    for level, mask in enumerate(case["padding_mask"]):
        for name in ("student_features", "teacher_features"):
            np.moveaxis(broken[name][level], 1, -1)[~mask] = value
        if "weight" in case:
            broken["weight"][level][~mask] = value
    assert_same_evaluation(loss, case, broken, torch.float32, wrt=STUDENT, distance=distance)


@pytest.mark.parametrize("distance", ["mse", "cosine"])
def test_what_a_cell_without_weight_holds_does_not_matter(distance):
    case = of(distance)
    broken = {name: [level.copy() for level in levels] for name, levels in case.items()}
    for level, weight in enumerate(case["weight"]):
        for name in ("student_features", "teacher_features"):
            np.moveaxis(broken[name][level], 1, -1)[weight == 0] = np.nan
    assert_same_evaluation(loss, case, broken, torch.float32, wrt=STUDENT, distance=distance)


@every_distance
def test_replicas_have_the_gradients_of_the_whole_batch(distance):
    """Data-parallel training averages them; of "pearson" the statistics are those of all replicas, too."""
    arguments = to_tensors({name: levels[0] for name, levels in of(distance).items()})

    def gradient(images):
        mine = {name: tensor[images].detach() for name, tensor in arguments.items()}
        mine["student_features"].requires_grad_()
        loss(**mine, distance=distance).backward()
        return mine["student_features"].grad

    parts = run_replicas([partial(gradient, slice(0, 1)), partial(gradient, slice(1, 2))])
    assert_close(torch.cat(parts) / 2, gradient(slice(None)))


class Peak(TorchDispatchMode):
    """The most bytes that tensors made inside are alive with at a time."""

    def __init__(self):
        super().__init__()
        self.alive, self.now, self.most = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor.untyped_storage())
        return result

    def _see(self, storage):
        key = storage._cdata
        if key not in self.alive:
            self.alive[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key):
        self.now -= self.alive.pop(key, 0)


@every_distance
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_memory_is_at_most_four_times_that_of_the_inputs(dtype, distance):
    """Of half precision at most four times what they take in float32, in which they are computed."""
    student, teacher = torch.randn(2, 16, 40, 40, dtype=dtype).requires_grad_(), torch.randn(2, 16, 40, 40, dtype=dtype)
    mask = torch.ones(2, 40, 40, dtype=torch.bool)
    gc.collect()
    with Peak() as peak:
        loss(student, teacher, distance=distance, padding_mask=mask).backward()
    inputs = 2 * student.numel() * max(student.element_size(), 4)
    assert 0 < peak.most <= 4 * inputs, peak.most / inputs


@pytest.mark.parametrize(
    ("argument", "change", "error", "match"),
    [
        ("student_features", lambda x: [x[0]], ValueError, "`teacher_features` must have as many levels as `student_f"),
        (
            "student_features",
            lambda x: [x[0][:, 1:], x[1]],
            ValueError,
            "`student_features` and `teacher_features` must",
        ),
        ("student_features", None, TypeError, "`student_features` must be a tensor or a sequence of levels, got None"),
        ("teacher_features", 3, TypeError, "`teacher_features` must be a tensor or a sequence of levels, got 3"),
        ("weight", 3, TypeError, "`weight` must be a tensor or a sequence of levels, got 3"),
        ("padding_mask", True, TypeError, "`padding_mask` must be a tensor or a sequence of levels, got True"),
        ("sync_normalizer", None, TypeError, "`sync_normalizer` must be True or False, got None"),
        ("student_features", lambda x: [x[0].long(), x[1]], TypeError, "`student_features` must have a floating-point"),
        ("teacher_features", lambda x: [x[0].long(), x[1]], TypeError, "`teacher_features` must have a floating-point"),
        (
            "teacher_features",
            lambda x: [to_meta(x[0]), x[1]],
            ValueError,
            "`teacher_features` must be on the device of",
        ),
        (
            "weight",
            lambda x: x[0],
            ValueError,
            "`weight` must have as many levels as `student_features`, at least 1; got 1",
        ),
        (
            "weight",
            lambda x: [x[0].long(), x[1]],
            TypeError,
            "`weight` must have a floating-point dtype, got torch.int64",
        ),
        (
            "weight",
            lambda x: [x[1], x[1]],
            ValueError,
            r"`weight` and `teacher_features` must have the same dimensions",
        ),
        ("weight", lambda x: [to_meta(x[0]), x[1]], ValueError, "`weight` must be on the device of `teacher_features`"),
        ("padding_mask", lambda x: [x[0].int(), x[1]], TypeError, "`padding_mask` must have dtype torch.bool, got"),
        ("padding_mask", lambda x: x[:1], ValueError, "`padding_mask` must have as many levels as `student_features`"),
        ("distance", "l1", ValueError, "`distance` must be one of 'mse', 'cosine', 'pearson', 'channel', got 'l1'"),
        ("distance", "channel", ValueError, "`weight` must be None for the distance 'channel', whose softmax weighs"),
        ("temperature", 0.0, ValueError, "`temperature` must be greater than 0, got 0.0"),
    ],
)
def test_errors(argument, change, error, match):
    case = cases.plain_features()
    if argument in case:
        assert_rejects(loss, case, argument, change, error, match)
    else:
        with pytest.raises(error, match=match):
            loss(**to_tensors(case), **{argument: change})


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("size", [(5, 7), (1, 1), (3, 16)])
def test_box_mask(size, dtype):
    """A box smaller than a cell counts, and one that ends at an edge goes no further."""
    rng = np.random.default_rng(0)
    boxes = np.concatenate((cases.random_boxes(rng, 2, 3), [[[0.3, 0.6, 0.01, 0.02], [0.25, 0.5, 0.5, 1.0]]] * 2), 1)
    mask = np.array([[True, False, False, True, False], [False, False, False, False, True]])
    boxes[~mask] = np.nan
    cells = dkl.box_mask(torch.tensor(boxes, dtype=dtype), torch.tensor(mask), size)
    assert cells.dtype == dtype
    assert np.array_equal(cells, oracles.box_mask(boxes, mask, size))
    none = dkl.box_mask(torch.zeros(2, 0, 4), torch.zeros(2, 0, dtype=torch.bool), size)
    assert none.shape == (2, *size)
    assert none.eq(0).all()


@pytest.mark.parametrize(
    ("argument", "change", "error", "match"),
    [
        ("boxes", lambda x: x[..., :3], ValueError, r"`boxes` must have shape \(\.\.\., N, 4\), got"),
        ("mask", lambda x: x.int(), TypeError, "`mask` must have dtype torch.bool, got torch.int32"),
        ("mask", lambda x: x[:, 1:], ValueError, "`boxes` and `mask` must have the same dimensions"),
        ("mask", to_meta, ValueError, "`mask` must be on the device of `boxes` cpu, got meta"),
        ("size", (4,), ValueError, r"`size` must be H and W, got \(4,\)"),
        ("size", (4, 0), ValueError, "`size` must be greater than 0, got 0"),
        ("size", (4, 2.5), TypeError, "`size` must be two whole numbers, got 2.5"),
    ],
)
def test_errors_of_box_mask(argument, change, error, match):
    targets = cases.targets(np.random.default_rng(0))
    case = {"boxes": targets["target_boxes"], "mask": targets["target_mask"]}
    function = partial(dkl.box_mask, size=(4, 4)) if argument != "size" else dkl.box_mask
    if argument != "size":
        assert_rejects(function, case, argument, change, error, match)
        return
    with pytest.raises(error, match=match):
        function(**to_tensors(case), size=change)
