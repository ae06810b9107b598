"""Two gloo processes: the gradients of one process on the whole batch, and none waits for the other for ever."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import detr_kd_losses as dkl

from support.replicas import WORLD_SIZE, replicas
from support.steps import D, leaves, make_output, make_targets, over_tensors

replicas = pytest.fixture(scope="module")(replicas)

STUDENT_HEADS = {"sigmoid": 5, "softmax": 6}
PARTS = "class", "bbox", "giou"
NAMES = {
    "logits": {f"loss_kd_{part}" for part in PARTS},
    "feature": {"loss_kd_feature"},
    "query_group": {f"loss_kd_group_{part}" for part in PARTS},
}


def part(output, rank):
    """One image of a batch of two; the batch is dimension 1 behind decoder layers, else dimension 0."""

    def one(tensor):
        staged = tensor.ndim == 4 and tensor.shape[1] == WORLD_SIZE
        piece = tensor[:, rank : rank + 1] if staged else tensor[rank : rank + 1]
        return piece.detach().requires_grad_(tensor.requires_grad)

    return over_tensors(one, output)


def batch(head="sigmoid", counts=(3, 1), dtype=torch.float32):
    """Student, teacher and targets, so many objects an image, with a padded image."""
    student = make_output(0, 3, 7, group=9, channels=STUDENT_HEADS[head], requires_grad=True, dtype=dtype)
    masks = [torch.ones(2, *level.shape[-2:]).bool() for level in student.features]
    masks[0][0, :, 5:] = False
    return student, make_output(1, 3, 9, dtype=dtype)._replace(padding_mask=masks), make_targets(counts)


def gradients(criterion, student, teacher, targets):
    losses = criterion(student, teacher, targets)
    return torch.autograd.grad(sum(losses.values()), leaves(student), allow_unused=True, materialize_grads=True)


def joined(parts):
    """Gradients of the whole batch, from those of one image each, as DistributedDataParallel averages them."""
    return [torch.cat(pair, dim=1 if pair[0].ndim == 4 and len(pair[0]) == 3 else 0) / WORLD_SIZE for pair in parts]


def replica_gradients(rank, preset, head, counts):
    criterion = dkl.DETRDistillationLoss(preset, student_activation=head)
    return gradients(criterion, *(part(record, rank) for record in batch(head, counts)))


@pytest.mark.parametrize(
    ("preset", "head", "counts"),
    # The last two have fewer targets than there are processes.
    [
        ("official", "sigmoid", (3, 1)),
        ("paper", "softmax", (3, 1)),
        ("paper", "sigmoid", (0, 1)),
        ("paper", "softmax", (0, 0)),
    ],
)
def test_gradients_do_not_depend_on_the_number_of_processes(replicas, preset, head, counts):
    parts = zip(*replicas(replica_gradients, preset, head, counts), strict=True)
    criterion = dkl.DETRDistillationLoss(preset, student_activation=head)
    assert_close(joined(parts), list(gradients(criterion, *batch(head, counts))))


def mixed_gradients(rank, first, second):
    """Rank 0 computes in another precision than rank 1."""
    dtype, autocast = (first, second)[rank]
    records = [part(record, rank) for record in batch(dtype=dtype)]
    with torch.autocast("cpu", autocast) if autocast else contextlib.nullcontext():
        return [gradient.double() for gradient in gradients(dkl.DETRDistillationLoss(), *records)]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((torch.float32, None), (torch.float64, None)),
        ((torch.float64, None), (torch.bfloat16, None)),
        ((torch.float32, torch.bfloat16), (torch.float64, None)),
    ],
    ids=["float32 and float64", "float64 and bfloat16", "autocast and float64"],
)
def test_replicas_of_different_precision(replicas, first, second):
    """Counts have one dtype on their way, whatever a replica computes in."""
    half = torch.bfloat16 in (first[0], second[0])
    parts = zip(*replicas(mixed_gradients, first, second), strict=True)
    expected = gradients(dkl.DETRDistillationLoss(), *batch(dtype=torch.float64))
    assert_close(joined(parts), list(expected), rtol=0.1 if half else 1e-4, atol=0.05 if half else 1e-6)


def losses_without(rank, term, how):
    """Rank 0 has no such term in this step: its weight is 0, or what it needs is not there."""
    student, teacher, targets = (part(record, rank) for record in batch())
    criterion = dkl.DETRDistillationLoss()
    if rank == 0 and how == "weight":
        criterion.terms[term].weight = 0.0
    elif rank == 0 and how == "absent":
        none = {"feature": {"features": None, "padding_mask": None}, "query_group": {"group": None}}[term]
        student, teacher = student._replace(**none), teacher._replace(**none)
    losses = criterion(student, teacher, targets)
    sum(losses.values()).backward()
    return {name: loss.detach() for name, loss in losses.items()}


@pytest.mark.parametrize(
    ("term", "how"),
    [
        ("logits", "weight"),
        ("feature", "weight"),
        ("query_group", "weight"),
        ("feature", "absent"),
        ("query_group", "absent"),
    ],
)
def test_a_term_that_one_replica_lacks(replicas, term, how):
    """A schedule that differs by a step, a batch without features: the other terms stay what they are."""
    lacking, having = replicas(losses_without, term, how)
    assert having.keys() >= NAMES[term]
    assert {name: lacking.get(name) for name in NAMES[term]} == dict.fromkeys(
        NAMES[term], 0 if how == "weight" else None
    )
    for losses, expected in zip((lacking, having), replicas(losses_without, term, "nothing"), strict=True):
        others = expected.keys() - NAMES[term]
        assert_close({name: losses[name] for name in others}, {name: expected[name] for name in others})


def plain_losses(rank, weights, distance):
    term = dkl.PlainFeatureTerm(distance=distance, weight=weights[rank])
    losses = dkl.DETRDistillationLoss([term])(*(part(record, rank) for record in batch()))
    sum(losses.values()).backward()
    return losses["loss_kd_plain_feature"].item()


@pytest.mark.parametrize("distance", ["mse", "pearson"])
def test_plain_features_that_one_replica_does_not_weigh(replicas, distance):
    """Also with statistics of all replicas, which the other one needs."""
    both = replicas(plain_losses, (1.0, 1.0), distance)
    one = replicas(plain_losses, (0.0, 1.0), distance)
    assert one[0] == 0
    if distance == "pearson":
        assert one[1] == pytest.approx(both[1], rel=1e-5)


def losses_of_sizes(rank, change):
    """Rank 1 has another number of levels, or of decoder layers, than rank 0."""
    student, teacher, targets = (part(record, rank) for record in batch())
    if rank == 1 and change == "levels":
        student, teacher = (
            output._replace(features=output.features[:1], padding_mask=output.padding_mask and output.padding_mask[:1])
            for output in (student, teacher)
        )
    if rank == 1 and change == "layers":
        student = student._replace(logits=student.logits[:1], boxes=student.boxes[:1])
    losses = dkl.DETRDistillationLoss()(student, teacher, targets)
    return {name: loss.detach() for name, loss in losses.items()}


@pytest.mark.parametrize("change", ["levels", "layers"])
def test_counts_of_another_number(replicas, change):
    term = {"levels": "feature", "layers": "logits"}[change]
    for losses, expected in zip(replicas(losses_of_sizes, change), replicas(losses_of_sizes, None), strict=True):
        others = expected.keys() - NAMES[term]
        assert_close({name: losses[name] for name in others}, {name: expected[name] for name in others})
        assert all(loss.isfinite() for loss in losses.values())


class Student(nn.Module):
    """A student under DistributedDataParallel whose criterion has a projection."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(5, 5)
        self.neck = nn.Conv2d(D, 3, 1)
        feature = dkl.FeatureTerm([3, 3], [D, D])
        self.criterion = dkl.DETRDistillationLoss([dkl.LogitsTerm(), feature, dkl.QueryGroupTerm()])

    def forward(self, student, teacher, targets):
        group = student.group._replace(logits=self.head(student.group.logits))
        features = student.features and [self.neck(level) for level in student.features]
        student = student._replace(logits=self.head(student.logits), group=group, features=features)
        return sum(self.criterion(student, teacher, targets).values())


def step_of_students(rank, change):
    model = nn.parallel.DistributedDataParallel(Student())
    student, teacher, targets = (part(record, rank) for record in batch(counts=(0, 2)))
    term = model.module.criterion.terms["feature"]
    if change == "weight 0" or (change == "weight 0 on a rank" and rank == 0):
        term.weight = 0.0
    if change == "no images on a rank" and rank == 0:
        student, teacher, targets = (
            over_tensors(lambda tensor: tensor[:, :0] if len(tensor) == 3 else tensor[:0], record)
            for record in (student, teacher, targets)
        )
    model(student, teacher, targets).backward()
    return [None if parameter.grad is None else parameter.grad.clone() for parameter in term.parameters()]


@pytest.mark.parametrize("change", ["nothing", "weight 0", "weight 0 on a rank", "no images on a rank"])
def test_a_projection_has_a_gradient_on_every_replica(replicas, change):
    first, second = replicas(step_of_students, change)
    assert_close(first, second)
    assert all(gradient is not None and gradient.isfinite().all() for gradient in first)
    assert any(gradient.any() for gradient in first) == (change != "weight 0")


def projection_without_features(rank):
    student, teacher, targets = (part(record, rank) for record in batch())
    criterion = dkl.DETRDistillationLoss([dkl.LogitsTerm(), dkl.FeatureTerm([D, 3], [D, D])])
    if rank == 0:
        student, teacher = (output._replace(features=None, padding_mask=None) for output in (student, teacher))
    else:
        student = student._replace(features=[student.features[0], student.features[1][:, :3]])
    model = nn.parallel.DistributedDataParallel(criterion)
    losses = model(student, teacher, targets)
    sum(losses.values()).backward()
    return sorted(losses), [parameter.grad for parameter in criterion.parameters()]


def test_a_projection_without_features_on_one_replica(replicas):
    """The term has the same names and gradients everywhere, where it has something to learn."""
    (names, first), (other_names, second) = replicas(projection_without_features)
    assert names == other_names
    assert_close(first, second)
    assert all(gradient.any() for gradient in first)


def validate_alone(rank, mode):
    records = [part(record, rank) for record in batch()]
    criterion = dkl.DETRDistillationLoss()
    training = copy.deepcopy(criterion)
    alone = {}
    if rank == 0:
        with mode if isinstance(mode, torch.no_grad | torch.inference_mode) else contextlib.nullcontext():
            alone = (criterion.eval() if mode == "eval" else criterion)(*records)
    losses = training(*records)
    return [{name: loss.detach().clone() for name, loss in losses.items()} for losses in (alone, losses)]


@pytest.mark.parametrize(
    "mode", ["eval", torch.no_grad(), torch.inference_mode()], ids=["eval", "no_grad", "inference"]
)
def test_one_replica_may_validate_alone(replicas, mode):
    """It has the losses of its own images, and training goes on as if nothing had been."""
    (alone, losses), (_, others) = replicas(validate_alone, mode)
    assert_close(alone, {n: v.detach() for n, v in dkl.DETRDistillationLoss()(*(part(r, 0) for r in batch())).items()})
    whole = dkl.DETRDistillationLoss()(*batch())
    assert_close(
        {name: (losses[name] + others[name]) / WORLD_SIZE for name in whole}, {n: v.detach() for n, v in whole.items()}
    )
