"""The teacher's queries as an extra group of the student's decoder."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from detr_kd_losses import match_targets, query_group_attention_mask, select_stages, teacher_assigned_query_loss

from support import cases, oracles
from support.comparisons import assert_agrees_with_oracle, assert_rejects, assert_same_evaluation, to_meta, to_tensors
from support.tolerances import TOLERANCES, assert_close

GROUP = ("group_logits", "group_boxes")
HEADS = {"focal": "sigmoid", "cross_entropy": "softmax"}


def group_case(**options):
    return cases.of_teacher(cases.detection(**options), "group")


def oracle(**arguments):
    names = {"group_logits": "logits", "group_boxes": "boxes", "teacher_assignment": "assignment"}
    return oracles.teacher_assigned_query_loss(**{names.get(name, name): x for name, x in arguments.items()})


def assert_agrees(case, dtype, **options):
    return assert_agrees_with_oracle(teacher_assigned_query_loss, oracle, case, dtype, wrt=GROUP, **options)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"alpha": 0.7, "gamma": 0.5},
        {"no_object_weight": 0.4},
        {"weight_class": 0.3, "weight_bbox": 1.5, "weight_giou": 0.7},
    ],
    ids=str,
)
@pytest.mark.parametrize("class_loss", HEADS)
@pytest.mark.parametrize("stages", [None, 3])
def test_options(stages, class_loss, options, dtype):
    case = group_case(stages=stages, activation=HEADS[class_loss])
    assert_agrees(case, dtype, class_loss=class_loss, **options)


@pytest.mark.parametrize(("queries", "count"), [(8, 3), (3, 8), (5, 0), (0, 3)])
def test_sizes(queries, count):
    assert_agrees(group_case(queries=queries, count=count), torch.float64)


@pytest.mark.parametrize("student_depth", [3, 6])
def test_the_teachers_assignment_is_kept(student_depth):
    """The group learns what the teacher's queries were given, though its own best matching is another."""
    depth = 9 - student_depth
    teacher, group = cases.detection(stages=depth), group_case(stages=student_depth, seed=1)
    predictions = [torch.tensor(teacher[name]) for name in ("logits", "boxes")]
    targets = {name: array for name, array in teacher.items() if name.startswith("target")}
    of_teacher = match_targets(*predictions, **to_tensors(targets))
    stages = [1, 3, 5] if student_depth == 3 else [0, 0, 1, 1, 2, 2]
    case = {**group, **targets, "teacher_assignment": of_teacher[stages].numpy()}
    terms = assert_agrees(case, torch.float64)

    afresh = match_targets(*(torch.tensor(case[name]) for name in GROUP), **to_tensors(targets))
    rematched = oracle(**{**case, "teacher_assignment": afresh.numpy()})
    assert sum(rematched.values()) < 0.9 * sum(terms.values())
    by_select = to_tensors(case) | {"teacher_assignment": select_stages(of_teacher, student_depth)}
    for name, term in teacher_assigned_query_loss(**by_select).items():
        assert_close(term, terms[name].item())


@pytest.mark.parametrize("value", [np.nan, 1e30])
def test_padding_and_unmatched_boxes_do_not_matter(value):
    case = group_case()
    broken = cases.filled(case, "group_boxes", case["teacher_assignment"] == -1, value)
    broken = cases.filled(broken, "target_boxes", ~case["target_mask"], value)
    assert_same_evaluation(teacher_assigned_query_loss, case, broken, torch.float32, wrt=GROUP)


@pytest.mark.parametrize(
    ("argument", "change", "error", "match"),
    [
        (
            "teacher_assignment",
            lambda x: x[..., 1:],
            ValueError,
            "`teacher_assignment` and `group_logits` must have the same dimensions",
        ),
        (
            "teacher_assignment",
            lambda x: x[:1],
            ValueError,
            r"`teacher_assignment` and `group_logits` must have the same dimensions",
        ),
        (
            "teacher_assignment",
            lambda x: x.int(),
            TypeError,
            "assignment` must have dtype torch.int64, got torch.int32",
        ),
        ("teacher_assignment", to_meta, ValueError, "assignment` must be on the device of .* cpu, got meta"),
        ("teacher_assignment", [0], TypeError, "assignment` must be a torch.Tensor, got list"),
        ("group_logits", [1.0], TypeError, "logits` must be a torch.Tensor, got list"),
        ("group_boxes", lambda x: x[..., :3], ValueError, r"boxes` must have shape \(\.\.\., N, 4\), got"),
        ("target_boxes", to_meta, ValueError, "`target_boxes` must be on the device of .* cpu, got meta"),
        ("class_loss", "bce", ValueError, "`class_loss` must be one of 'focal', 'cross_entropy', got 'bce'"),
    ],
)
def test_errors(argument, change, error, match):
    assert_rejects(teacher_assigned_query_loss, group_case(), argument, change, error, match)


@pytest.mark.parametrize("sizes", [[2, 3], [1], [4, 0, 2], [0], [], [2, 2, 1]], ids=str)
def test_attention_mask(sizes):
    group = [index for index, size in enumerate(sizes) for _ in range(size)]
    mask = query_group_attention_mask(sizes)
    assert mask.dtype == torch.bool
    assert mask.shape == (len(group), len(group))
    assert mask.tolist() == [[a != b for b in group] for a in group]


def test_attention_mask_keeps_groups_apart():
    """As `attn_mask` of torch's attention, it makes each group attend as if it were alone."""
    attention = torch.nn.MultiheadAttention(8, 2, batch_first=True).double()
    queries = torch.tensor(np.random.default_rng(0).normal(size=(1, 5, 8)))
    together, _ = attention(queries, queries, queries, attn_mask=query_group_attention_mask([2, 3]))
    apart = [attention(part, part, part)[0] for part in queries.split([2, 3], dim=1)]
    assert_close(together, torch.cat(apart, dim=1).detach().numpy())


def test_attention_mask_device():
    assert query_group_attention_mask([1, 2], device="meta").device.type == "meta"


def test_attention_mask_rejects_a_negative_size():
    with pytest.raises(ValueError, match=r"`group_sizes` must not be negative, got \[2, -1\]"):
        query_group_attention_mask([2, -1])
