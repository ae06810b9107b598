"""The controller of shares: it arrives, stays in its bounds, goes on after a stop, and is one on all replicas."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

import detr_kd_losses as dkl

from support.replicas import replicas
from support.steps import make_output, make_targets

replicas = pytest.fixture(scope="module")(replicas)

SHARES = {"logits": 0.2, "feature": 0.3}


class Problem:
    """A student that is a table of numbers, under the criterion and a loss of its own."""

    def __init__(self, seed=0):
        self.student = make_output(seed, 2, 6, group=7, requires_grad=True)
        self.teacher, self.targets = make_output(seed + 1, 2, 7), make_targets()
        self.criterion = dkl.DETRDistillationLoss()
        self.parameters = [self.student.logits, self.student.boxes, *self.student.features]

    def losses(self):
        return self.criterion(self.student, self.teacher, self.targets)

    def task(self):
        return sum(parameter.square().mean() for parameter in self.parameters)

    def update(self, controller):
        return controller.update(self.losses(), self.task(), self.parameters)


def norm(loss, parameters):
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in gradients]).norm().item()


def test_measures_the_terms_together():
    problem = Problem()
    measured = problem.update(dkl.ShareController(problem.criterion, SHARES))
    fresh = Problem()
    norms = {"task": norm(fresh.task(), fresh.parameters)}
    for name, term in fresh.criterion.terms.items():
        losses = fresh.losses()
        norms[name] = norm(sum(losses[part] for part in term.names), fresh.parameters)
    for name, said in measured.items():
        assert said.share == pytest.approx(norms[name] / sum(norms.values()), rel=1e-5)
        assert said.wanted == SHARES.get(name)
        assert said.weight == problem.criterion.terms[name].weight


@pytest.mark.parametrize(("rate", "updates"), [(1.0, 8), (0.5, 16)])
def test_shares_converge(rate, updates):
    problem = Problem()
    group = problem.criterion.terms["query_group"].weight
    controller = dkl.ShareController(problem.criterion, SHARES, every=1, rate=rate)
    distances = []
    for _ in range(updates):
        measured = problem.update(controller)
        distances.append(max(abs(measured[name].share - share) for name, share in SHARES.items()))
    assert distances[-1] < 0.01
    assert distances[0] > 5 * distances[-1]
    assert problem.criterion.terms["query_group"].weight == group


def test_one_update_goes_only_part_of_the_way():
    problem, ahead = Problem(), Problem()
    before = {name: problem.criterion.terms[name].weight for name in SHARES}
    problem.update(dkl.ShareController(problem.criterion, SHARES, rate=0.1))
    ahead.update(dkl.ShareController(ahead.criterion, SHARES, rate=1.0))
    for name, weight in before.items():
        whole = math.log(ahead.criterion.terms[name].weight / weight)
        assert math.log(problem.criterion.terms[name].weight / weight) == pytest.approx(0.1 * whole)
        assert abs(whole) <= math.log(10) + 1e-9


def test_bounds_hold():
    problem = Problem()
    controller = dkl.ShareController(problem.criterion, {"logits": 0.98}, every=1, rate=1.0, bounds=(0.5, 1.5))
    for _ in range(3):
        problem.update(controller)
    assert problem.criterion.terms["logits"].weight == 1.5
    controller = dkl.ShareController(problem.criterion, {"logits": 1e-6}, every=1, rate=1.0, bounds=(0.5, 1.5))
    for _ in range(3):
        problem.update(controller)
    assert problem.criterion.terms["logits"].weight == 0.5


def test_only_every_so_many_steps():
    """Between them it looks at nothing, so that nothing waits for a device."""
    problem = Problem()
    controller = dkl.ShareController(problem.criterion, SHARES, every=3)
    updates = []
    for step in range(7):
        due = step % 3 == 0
        updates.append(problem.update(controller) if due else controller.update(None, None, None))
    assert [update is not None for update in updates] == [True, False, False, True, False, False, True]


def test_a_weight_of_0_stays_and_comes_back():
    problem = Problem()
    problem.criterion.terms["logits"].weight = 0
    controller = dkl.ShareController(problem.criterion, SHARES, every=1)
    assert problem.update(controller)["logits"] == (0.0, 0.2, 0)
    problem.criterion.terms["logits"].weight = 1.0
    assert problem.update(controller)["logits"].share > 0


def test_a_term_that_does_not_apply_keeps_its_weight():
    problem = Problem()
    problem.student = problem.student._replace(features=None)
    problem.teacher = problem.teacher._replace(features=None)
    problem.parameters = problem.parameters[:2]
    weight = problem.criterion.terms["feature"].weight
    measured = problem.update(dkl.ShareController(problem.criterion, SHARES))
    assert measured["feature"] == (0.0, 0.3, weight)
    assert measured["logits"].weight != 1.0


@pytest.mark.parametrize("number", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["task", "term"])
def test_what_is_not_finite_changes_nothing(number, where):
    problem = Problem()
    controller = dkl.ShareController(problem.criterion, SHARES)
    losses, task = problem.losses(), problem.task()
    if where == "task":
        task = task * number
    else:
        losses["loss_kd_class"] = losses["loss_kd_class"] * number
    measured = controller.update(losses, task, problem.parameters)
    fresh = Problem().criterion
    assert all(said.weight == fresh.terms[name].weight for name, said in measured.items())


def test_no_gradient_at_all_changes_nothing():
    problem = Problem()
    controller = dkl.ShareController(problem.criterion, SHARES)
    measured = controller.update({}, torch.tensor(1.0), problem.parameters)
    assert {said.share for said in measured.values()} == {0.0}


def test_training_goes_on():
    problem = Problem()
    losses, task = problem.losses(), problem.task()
    dkl.ShareController(problem.criterion, SHARES).update(losses, task, problem.parameters)
    assert problem.student.logits.grad is None
    (sum(losses.values()) + task).backward()
    assert problem.student.logits.grad is not None


def test_goes_on_where_it_stopped():
    whole, stopped = Problem(), Problem()
    controller = dkl.ShareController(whole.criterion, SHARES, every=2)
    other = dkl.ShareController(stopped.criterion, SHARES, every=2)
    for _ in range(3):
        whole.update(controller)
        stopped.update(other)
    resumed = Problem()
    again = dkl.ShareController(resumed.criterion, SHARES, every=2)
    again.load_state_dict(other.state_dict())
    for _ in range(4):
        assert whole.update(controller) == resumed.update(again)
    assert controller.state_dict() == again.state_dict()
    assert controller.state_dict()["steps"] == 7


def of_replica(rank):
    """Three updates on other images than the other replica's; one has no features."""
    problem = Problem(10 * rank)
    if rank == 1:
        problem.student = problem.student._replace(features=None)
        problem.teacher = problem.teacher._replace(features=None)
        problem.parameters = problem.parameters[:2]
    controller = dkl.ShareController(problem.criterion, SHARES, every=2)
    measured = [problem.update(controller) for _ in range(5)]
    return measured, controller.state_dict()


def test_replicas_agree(replicas):
    (measured, state), other = replicas(of_replica)
    assert (measured, state) == other
    assert state["weights"]["logits"] != 1.0
    assert_close(measured[0]["query_group"].weight, 1.0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"criterion": torch.nn.Linear(1, 1)}, TypeError, "`criterion` must be a DETRDistillationLoss with terms, got"),
        ({"shares": {"logit": 0.1}}, ValueError, r"`shares` must name terms of the criterion, .*, got \['logit'\]"),
        ({"shares": {}}, ValueError, "`shares` must name terms of the criterion"),
        ({"shares": {"logits": 0.5, "feature": 0.5}}, ValueError, "together below 1, got 1.0"),
        ({"shares": {"logits": 0}}, ValueError, r"`shares\['logits'\]` must be greater than 0, got 0"),
        ({"shares": [0.1]}, TypeError, "`shares` must be a mapping"),
        ({"every": 0}, ValueError, "`every` must be greater than 0, got 0"),
        ({"rate": 0}, ValueError, "`rate` must be greater than 0, got 0"),
        ({"rate": 2}, ValueError, r"`rate` must be in \[0, 1\], got 2"),
        ({"bounds": (2, 1)}, ValueError, r"`bounds` must be the least and the greatest weight, got \(2, 1\)"),
        ({"bounds": (2, 30)}, ValueError, r"weight of term 'logits' must be 0 or in `bounds` \(2.0, 30.0\), got 1.0"),
    ],
)
def test_errors(options, error, message):
    with pytest.raises(error, match=message):
        dkl.ShareController(**{"criterion": dkl.DETRDistillationLoss(), "shares": SHARES, **options})


def test_state_of_other_terms():
    controller = dkl.ShareController(dkl.DETRDistillationLoss(), SHARES)
    with pytest.raises(ValueError, match=r"`state` must have the weights of \['feature', 'logits'\], got those of \["):
        controller.load_state_dict({"steps": 3, "weights": {"logits": 2.0}})
    with pytest.raises(ValueError, match=r"weight of term 'feature' must be 0 or in `bounds`"):
        controller.load_state_dict({"steps": 3, "weights": {"logits": 2.0, "feature": 1000.0}})
    assert controller.state_dict() == {"steps": 0, "weights": {"logits": 1.0, "feature": 10.0}}
