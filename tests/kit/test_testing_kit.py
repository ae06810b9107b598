"""The kit itself: a correct loss written without the package passes, and every law catches who breaks it."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from detr_kd_losses import testing
from detr_kd_losses.testing import strategies
from detr_kd_losses.testing.replicas import run_replicas

from support import oracles
from support.edits import edited


def naive_loss(
    student_logits,
    student_boxes,
    teacher_logits,
    teacher_boxes,
    assignment,
    *,
    teacher_positive=None,
    weight_class=1.0,
    weight_bbox=5.0,
    weight_giou=2.0,
):
    """Eq. 3-5 for sigmoid heads, pair by pair."""
    if assignment.ndim == 2:
        student_logits, student_boxes = student_logits[None], student_boxes[None]
        teacher_logits, teacher_boxes, assignment = teacher_logits[None], teacher_boxes[None], assignment[None]
        teacher_positive = None if teacher_positive is None else teacher_positive[None]
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    student_logits, student_boxes = student_logits.to(dtype), student_boxes.to(dtype)
    teacher_logits, teacher_boxes = teacher_logits.detach().to(dtype), teacher_boxes.detach().to(dtype)
    loss_class = loss_bbox = loss_giou = student_logits[:0].sum() + student_boxes[:0].sum()
    for stage in range(len(assignment)):
        image, query = (assignment[stage] >= 0).nonzero(as_tuple=True)
        partner = assignment[stage][image, query]
        z, box = student_logits[stage, image, query], student_boxes[stage, image, query]
        teacher_z, teacher_box = teacher_logits[stage, image, partner], teacher_boxes[stage, image, partner]
        positive = torch.ones_like(image).bool()
        if teacher_positive is not None:
            positive = teacher_positive[stage, image, partner]
        entropy = bernoulli_cross_entropy(teacher_z, teacher_z)
        divergence = (bernoulli_cross_entropy(z, teacher_z) - entropy).sum(-1)
        distance = (box - teacher_box).abs().sum(-1)
        overlap = giou(box, teacher_box)
        for pairs, teaches_class in ((positive, 1.0), (~positive, 0.0)):
            number = replica_mean(pairs.sum().to(dtype)).clamp(min=1)
            loss_class = loss_class + weight_class * teaches_class * divergence[pairs].sum() / number
            loss_bbox = loss_bbox + weight_bbox * distance[pairs].sum() / number
            loss_giou = loss_giou + weight_giou * (1 - overlap)[pairs].sum() / number
    return {"loss_class": loss_class, "loss_bbox": loss_bbox, "loss_giou": loss_giou}


def bernoulli_cross_entropy(z, teacher_z):
    return F.binary_cross_entropy_with_logits(z, teacher_z.sigmoid(), reduction="none")


def giou(boxes, others):
    (x, y, w, h), (other_x, other_y, other_w, other_h) = boxes.unbind(-1), others.unbind(-1)
    lefts, rights = (x - w / 2, other_x - other_w / 2), (x + w / 2, other_x + other_w / 2)
    tops, bottoms = (y - h / 2, other_y - other_h / 2), (y + h / 2, other_y + other_h / 2)
    inner_w = (torch.minimum(*rights) - torch.maximum(*lefts)).clamp(min=0)
    inner_h = (torch.minimum(*bottoms) - torch.maximum(*tops)).clamp(min=0)
    hull = (torch.maximum(*rights) - torch.minimum(*lefts)) * (torch.maximum(*bottoms) - torch.minimum(*tops))
    union = w * h + other_w * other_h - inner_w * inner_h
    same = (boxes == others).all(-1).to(boxes.dtype)
    return ratio(inner_w * inner_h, union, same) - 1 + ratio(union, hull, same)


def ratio(part, whole, otherwise):
    return torch.where(whole > 0, part / torch.where(whole > 0, whole, 1.0), otherwise)


def replica_mean(count):
    if not dist.is_initialized():
        return count
    dist.all_reduce(count)
    return count / dist.get_world_size()


NUMBER = "replica_mean(pairs.sum().to(dtype))"
# What each law is for, as the line of code that breaks it: right, wrong.
BROKEN = {
    "zero_at_teacher": (" - entropy)", ")"),
    "zero_at_empty_boxes": ("(1 - overlap)", "(1 - overlap * (box[:, 2:] > 0).all(-1))"),
    "non_negative": ("(box - teacher_box).abs()", "(box - teacher_box)"),
    "finite": ("divergence[pairs]", "(divergence + (1 - z.sigmoid()).log().sum(-1))[pairs]"),
    "student_permutation": ("divergence[pairs]", "(divergence * query)[pairs]"),
    "teacher_permutation": ("divergence[pairs]", "(divergence * partner)[pairs]"),
    "unmatched_students": ("assignment[stage] >= 0", "assignment[stage] >= -1"),
    "unmatched_teachers": (NUMBER, "z.new_tensor(teacher_logits.shape[2])"),
    "images_join": (NUMBER, "z.new_tensor(teacher_logits.shape[1])"),
    "stages_add": ('"loss_bbox": loss_bbox', '"loss_bbox": loss_bbox / len(assignment)'),
    "replicas": (NUMBER, "pairs.sum().to(dtype)"),
    "weights_linear": ("weight_giou * (1", "weight_bbox * (1"),
    "negatives_by_box": ("(~positive, 0.0)", "(~positive, 1.0)"),
    "no_pairs": (".clamp(min=1)", ""),
    "teacher_detached": ("teacher_logits.detach()", "teacher_logits"),
    "half_precision": ("torch.promote_types(student_logits.dtype, torch.float32)", "student_logits.dtype"),
    "gradients": ("giou(box, teacher_box)", "giou(box.detach(), teacher_box)"),
}


def test_a_correct_loss_passes():
    testing.check_hungarian_distillation_loss(naive_loss)


@pytest.mark.parametrize("law", testing.HUNGARIAN_DISTILLATION_LAWS.values(), ids=str)
def test_a_broken_loss_fails_by_name(law):
    broken = edited(naive_loss, *BROKEN[law.name])
    with pytest.raises(AssertionError, match=f"^law broken: {law.name}: {re.escape(law.sentence)}\n") as failure:
        law(broken, max_examples=200)
    # The smallest arguments stand in it, as a call that makes them again.
    assert "where arguments = make_distillation_arguments(" in str(failure.value)


@pytest.mark.parametrize("name", ["zero_at_teacher", "stages_add", "weights_linear", "teacher_detached"])
def test_the_whole_check_names_the_law(name):
    with pytest.raises(AssertionError, match=f"^law broken: {name}: "):
        testing.check_hungarian_distillation_loss(edited(naive_loss, *BROKEN[name]), max_examples=20)


def test_a_law_may_be_skipped():
    cross_entropy = edited(naive_loss, *BROKEN["zero_at_teacher"])
    testing.check_hungarian_distillation_loss(
        cross_entropy, skip=("zero_at_teacher", "zero_at_empty_boxes"), max_examples=5
    )
    with pytest.raises(ValueError, match=r"`skip` must have names among .*, got \['zero'\]"):
        testing.check_hungarian_distillation_loss(cross_entropy, skip=("zero",))


def test_a_failure_shrinks_to_one_query():
    broken = edited(naive_loss, *BROKEN["unmatched_students"])
    with pytest.raises(AssertionError) as failure:
        testing.HUNGARIAN_DISTILLATION_LAWS["unmatched_students"](broken, max_examples=200)
    sizes = re.findall(r"(?:stages|images|students|teachers)=(\d)", str(failure.value))
    assert sizes == ["1"] * 4


@given(st.sampled_from(strategies.BOX_KINDS), strategies.SEEDS)
def test_boxes_are_of_their_kind(kind, seed):
    boxes = strategies.make_boxes((2, 3), kind=kind, seed=seed)
    center, size = boxes[..., :2], boxes[..., 2:]
    assert boxes.dtype == torch.float64
    assert (center - size / 2).min() >= -1e-12
    assert (center + size / 2).max() <= 1 + 1e-12
    assert {
        "generic": (size > 0).all(),
        "degenerate": (size.prod(-1) == 0).all(),
        "touching": (torch.cat((center - size / 2, size), -1) * 4 % 1 == 0).all(),
        "identical": (boxes == boxes[0, 0]).all(),
        "tiny": (size < 1e-6).all() & (size > 0).all(),
        "full": (size == 1).all(),
    }[kind]


@pytest.mark.parametrize("kind", strategies.COST_KINDS)
def test_costs_are_of_their_kind(kind):
    costs = torch.stack(
        [strategies.make_costs(problems=2, rows=4, columns=5, kind=kind, seed=seed) for seed in range(20)]
    )
    finite = costs[torch.isfinite(costs)]
    if kind == "non_finite":
        assert costs.isnan().any()
        assert (costs == float("inf")).any()
        assert (costs == -float("inf")).any()
        assert 0 < len(finite) < costs.numel()
    else:
        assert len(finite) == costs.numel()
        distinct = len(finite.unique())
        assert distinct <= 3 if kind == "ties" else distinct == costs.numel()
        assert (finite.abs().max() > 1e6) == (kind == "wide")


@given(strategies.planted_costs())
def test_a_planted_optimum_is_the_only_one(case):
    cost, planted = case
    assert torch.equal(cost.float().double(), cost)
    rows = (planted >= 0).nonzero().squeeze(-1)
    best = cost[rows, planted[rows]].sum()
    assert best == oracles.optimal_cost(cost.numpy())[1]
    for row in rows.tolist():
        # Another optimum would do without one of the planted pairs.
        without = cost.clone()
        without[row, planted[row]] = float("nan")
        wrong, total = oracles.optimal_cost(without.numpy())
        assert wrong or total > best


@given(strategies.targets())
def test_targets_are_ragged_and_valid(targets):
    assert targets.mask.shape == targets.labels.shape == targets.boxes.shape[:-1]
    # Valid ones come first.
    assert (targets.mask.int().diff(dim=-1) <= 0).all()


@given(strategies.feature_pyramids())
def test_pyramids_keep_a_valid_cell(pyramid):
    for level, mask in zip(pyramid.levels, pyramid.padding_masks, strict=True):
        assert level.shape[-2:] == mask.shape[-2:]
        assert mask.flatten(1).any(-1).all()


@given(strategies.predictions(), strategies.boxes(), strategies.logits())
def test_predictions_belong_together(predictions, boxes, logits):
    assert predictions.logits.shape[:-1] == predictions.boxes.shape[:-1]
    assert predictions.logits.ndim == 4
    assert predictions.boxes.shape[-1] == boxes.shape[-1] == 4
    assert {tensor.dtype for tensor in (*predictions, boxes, logits)} == {torch.float64}
    assert logits.isfinite().all()


@given(st.data())
def test_shapes_may_be_given(data):
    shape = st.just((2, 3))
    assert data.draw(strategies.boxes(shape=shape)).shape == (2, 3, 4)
    assert data.draw(strategies.logits(shape=shape)).shape == (2, 3)


@given(strategies.costs(kinds=("ties",)))
def test_kinds_may_be_chosen(cost):
    assert cost.ndim == 3
    assert set(cost.unique().tolist()) <= {0.0, 1.0, 2.0}


@given(strategies.assignments())
def test_assignments_are_one_to_one(assignment):
    partners = assignment.sort(-1).values
    assert ((partners.diff(dim=-1) > 0) | (partners[..., 1:] == -1)).all()


def test_strategies_leave_the_global_generator_alone():
    state = torch.get_rng_state()
    testing.check_hungarian_distillation_loss(naive_loss, max_examples=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_replicas_pass_on_errors():
    def fail():
        msg = "rank 1"
        raise OSError(msg)

    with pytest.raises(OSError, match="rank 1"):
        run_replicas([lambda: dist.all_reduce(torch.ones(())), fail])
    assert not dist.is_initialized()


def test_the_package_does_not_import_the_kit():
    script = """if True:
        import sys, detr_kd_losses
        print([m for m in sys.modules if m.startswith(("hypothesis", "detr_kd_losses.testing"))])
    """
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
