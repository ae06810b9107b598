"""A detector's logits in the classes of another one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from detr_kd_losses import map_class_logits

from support import cases, oracles
from support.comparisons import assert_rejects, to_meta
from support.tolerances import TOLERANCES, assert_close

CLASS_MAPS = [class_map for class_map in cases.CLASS_MAPS.values() if class_map is not None] + [[2, 0, 3, 1]]


def head_logits(class_map, activation):
    rng = np.random.default_rng(0)
    return 3 * rng.normal(size=(2, 5, cases.num_channels(len(class_map), activation)))


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
@pytest.mark.parametrize("class_map", CLASS_MAPS, ids=str)
def test_scores(class_map, activation, dtype):
    """Merged, dropped and new classes have the oracle's scores, whether the map is a list or a tensor."""
    logits = torch.tensor(head_logits(class_map, activation), dtype=dtype)
    scores = [
        oracles.teacher_scores(
            query,
            cases.num_channels(cases.CLASSES, activation),
            student_activation=activation,
            teacher_activation=activation,
            class_map=class_map,
        )[0]
        for query in logits.double().flatten(0, 1).numpy()
    ]
    for given in (class_map, torch.tensor(class_map)):
        mapped = map_class_logits(logits, given, cases.CLASSES, activation=activation)
        assert mapped.dtype == dtype
        assert mapped.isfinite().all()
        mapped_scores = mapped.sigmoid() if activation == "sigmoid" else mapped.softmax(-1)
        assert_close(mapped_scores, np.reshape(scores, (2, 5, -1)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_half_precision_is_computed_in_float32(activation, dtype):
    class_map = [1, 1, 0, -1]
    logits = torch.tensor(head_logits(class_map, activation)).to(dtype)
    mapped = map_class_logits(logits, class_map, 3, activation=activation)
    assert mapped.dtype == torch.float32
    expected = map_class_logits(logits.float(), class_map, 3, activation=activation)
    torch.testing.assert_close(mapped, expected, rtol=0, atol=0)


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_order_of_classes_is_all_a_permutation_changes(activation):
    logits = torch.tensor(head_logits([2, 0, 1], activation))
    mapped = map_class_logits(logits, [2, 0, 1], 3, activation=activation)
    order = [1, 2, 0] if activation == "sigmoid" else [1, 2, 0, 3]
    expected = logits[..., order] if activation == "sigmoid" else logits[..., order].log_softmax(-1)
    assert_close(mapped, expected)


@pytest.mark.parametrize(
    ("argument", "change", "error", "match"),
    [
        ("logits", [1.0], TypeError, "`logits` must be a torch.Tensor, got list"),
        ("logits", torch.zeros(2, 3).int(), TypeError, "`logits` must have a floating-point dtype, got torch.int32"),
        ("activation", "tanh", ValueError, "`activation` must be one of 'sigmoid', 'softmax', got 'tanh'"),
        ("activation", "softmax", ValueError, "`class_map` must have one entry for each of the 2 teacher classes, got"),
        ("class_map", [0, 1], ValueError, "`class_map` must have one entry for each of the 3 teacher classes, got"),
        ("class_map", [0, 1, 4], ValueError, r"`class_map` must have entries in \[-1, 4\), got 4"),
        ("class_map", [0, -2, 1], ValueError, r"`class_map` must have entries in \[-1, 4\), got -2"),
        ("class_map", [0.7, 1, 2], TypeError, "`class_map` must be whole numbers, got 0.7 of type float"),
        (
            "class_map",
            3,
            TypeError,
            "`class_map` must be a sequence of classes, or a tensor of them, got 3 of type int",
        ),
        ("class_map", torch.zeros(3), TypeError, "`class_map` must have dtype torch.int64, got torch.float32"),
        ("class_map", torch.zeros(3, 1).long(), ValueError, r"`class_map` must have one entry .* shape \(3, 1\)"),
        ("class_map", to_meta, ValueError, "`class_map` must be on the device of `logits` cpu, got meta"),
    ],
)
def test_errors(argument, change, error, match):
    case = {"logits": np.zeros((2, 3)), "class_map": np.array([0, 1, -1])}

    def function(logits, class_map, activation="sigmoid"):
        return map_class_logits(logits, class_map, cases.CLASSES, activation=activation)

    assert_rejects(function, case, argument, change, error, match)
