"""torch.compile takes the criterion whole, and computes what eager does."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

import detr_kd_losses as dkl

from support.steps import leaves, make_output, make_targets

# The compiler itself instantiates every autograd.Function that it traces.
pytestmark = pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*instantiated:DeprecationWarning")


def values_and_gradients(criterion, student, teacher, targets):
    losses = criterion(student, teacher, targets)
    return losses, torch.autograd.grad(sum(losses.values()), leaves(student), allow_unused=True, materialize_grads=True)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class ScoreTerm(dkl.Term):
    parts = ("score",)

    def compute(self, step):
        return {"score": (step.student.logits[-1].mean() - step.teacher_logits[-1].mean()).square()}


TERMS = {
    "official": lambda: "official",
    "paper": lambda: "paper",
    "a term from outside": lambda: [dkl.LogitsTerm(), ScoreTerm(weight=2.0)],
    "beyond the paper": lambda: [
        dkl.LogitsTerm(matching="targets", negatives="by_box", weighting="overlap"),
        dkl.SharedQueryTerm(),
        dkl.PlainFeatureTerm(distance="pearson", cells="boxes"),
    ],
    "a weight of 0": lambda: [dkl.LogitsTerm(weight=0), dkl.FeatureTerm([8, 8], [8, 8], weight=0), ScoreTerm()],
}


@pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS)
def test_no_graph_break_whatever_the_shapes(terms):
    criterion = dkl.DETRDistillationLoss(terms())
    compiled = torch.compile(criterion, fullgraph=True, backend="eager")
    for (layers, queries), (teacher_layers, teacher_queries), padded in [
        ((3, 7), (6, 9), 4),
        ((3, 9), (6, 7), 5),
        ((2, 9), (2, 9), 3),
    ]:
        student = make_output(0, layers, queries, group=teacher_queries, requires_grad=True)
        inputs = student, make_output(1, teacher_layers, teacher_queries), make_targets((2, 0), padded)
        assert_close(values_and_gradients(compiled, *inputs), values_and_gradients(criterion, *inputs))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # inductor's own
def test_inductor_equals_eager():
    criterion = dkl.DETRDistillationLoss("paper")
    compiled = torch.compile(criterion, fullgraph=True)
    inputs = make_output(0, 3, 7, group=9, requires_grad=True), make_output(1, 6, 9), make_targets()
    assert_close(
        values_and_gradients(compiled, *inputs), values_and_gradients(criterion, *inputs), rtol=1e-4, atol=1e-5
    )
