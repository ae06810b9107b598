"""torch.compile takes the criterion whole, and computes what eager does."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

import detr_kd_losses as dkl

from support.steps import leaves, make_output, make_targets, over_tensors

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


# Tracing takes seconds for each term: what a preset shares with another is traced once.
TERMS = {
    "paper": lambda: "paper",
    "official": lambda: [dkl.LogitsTerm(matching="joint"), dkl.FeatureTerm(variant="official")],
    "a term from outside": lambda: [ScoreTerm(weight=2.0)],
    "beyond the paper": lambda: [
        dkl.LogitsTerm(matching="targets", negatives="by_box", weighting="overlap"),
        dkl.SharedQueryTerm(),
        dkl.PlainFeatureTerm(distance="pearson", cells="boxes"),
        dkl.BoxDistributionTerm(temperature=2.0),
        dkl.MaskTerm(),
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
        student = make_output(0, layers, queries, group=teacher_queries, bins=5, mask_size=(4, 5), requires_grad=True)
        inputs = (
            student,
            make_output(1, teacher_layers, teacher_queries, bins=7, mask_size=(5, 4)),
            make_targets((2, 0), padded),
        )
        assert_close(values_and_gradients(compiled, *inputs), values_and_gradients(criterion, *inputs))


def make_inputs():
    return make_output(0, 3, 7, group=9, requires_grad=True), make_output(1, 6, 9), make_targets()


@pytest.mark.parametrize("name", ["logits", "feature", "query_group"])
def test_a_weight_of_0_and_back(name):
    criterion, inputs = dkl.DETRDistillationLoss([dkl.DETRDistillationLoss().terms[name], ScoreTerm()]), make_inputs()
    compiled = torch.compile(criterion, fullgraph=True, backend="eager")
    for weight in (0.0, 2.0, 0.0):
        criterion.terms[name].weight = weight
        assert_close(compiled(*inputs), criterion(*inputs))


def test_a_weight_that_changes_in_every_step():
    """As schedules do, and more often than a compiler compiles anew."""
    criterion, inputs = dkl.DETRDistillationLoss([dkl.FeatureTerm(), ScoreTerm()]), make_inputs()
    compiled = torch.compile(criterion, fullgraph=True, backend="eager")
    for step in range(20):
        for term in criterion.terms.values():
            term.weight = 0.1 * step + 0.05
        assert_close(values_and_gradients(compiled, *inputs), values_and_gradients(criterion, *inputs))


@pytest.mark.parametrize(
    "options",
    [
        {"class_map": [4, 0, -1, 3, 3]},
        {"teacher_activation": "softmax", "class_map": [0, -1, 3, 3]},
        {"student_activation": "softmax", "class_map": [2, 0, -1, 3, 3]},
    ],
    ids=str,
)
def test_other_classes_and_heads(options):
    student, teacher, targets = make_inputs()
    inputs = student, teacher, targets._replace(labels=targets.labels.clamp(max=3))
    criterion = dkl.DETRDistillationLoss(**options)
    compiled = torch.compile(criterion, fullgraph=True, backend="eager")
    assert_close(values_and_gradients(compiled, *inputs), values_and_gradients(criterion, *inputs))


@pytest.mark.parametrize("variant", ["official", "paper"])
def test_padding_in_features_of_other_channels(variant):
    student, teacher, targets = make_inputs()
    padding = [torch.rand(2, *features.shape[-2:]) < 0.7 for features in teacher.features]
    student = student._replace(
        features=[torch.randn(2, 6, *features.shape[-2:], requires_grad=True) for features in teacher.features]
    )
    criterion = dkl.DETRDistillationLoss([dkl.FeatureTerm([6, 6], [8, 8], variant=variant)])
    compiled = torch.compile(criterion, fullgraph=True, backend="eager")
    inputs = student, teacher._replace(padding_mask=padding), targets
    results = []
    for function in (compiled, criterion):
        losses = function(*inputs)
        wrt = [*student.features, *criterion.parameters()]
        results.append((losses, torch.autograd.grad(sum(losses.values()), wrt)))
    assert_close(*results)


def test_one_layer_without_its_dimension():
    def last(output):
        output = over_tensors(torch.detach, output)
        group = None if output.group is None else dkl.Predictions(*(tensor[-1] for tensor in output.group))
        return output._replace(
            logits=output.logits[-1], boxes=output.boxes[-1], queries=output.queries[-1], group=group
        )

    student, teacher, targets = make_inputs()
    criterion = dkl.DETRDistillationLoss()
    compiled = torch.compile(criterion, fullgraph=True, backend="eager")
    assert_close(compiled(last(student), last(teacher), targets), criterion(last(student), last(teacher), targets))


# Inductor's own, the second in PyTorch 2.6.
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning", "ignore:Skipping serialization:UserWarning")
def test_inductor_equals_eager():
    criterion = dkl.DETRDistillationLoss("paper")
    compiled = torch.compile(criterion, fullgraph=True)
    inputs = make_output(0, 3, 7, group=9, requires_grad=True), make_output(1, 6, 9), make_targets()
    assert_close(
        values_and_gradients(compiled, *inputs), values_and_gradients(criterion, *inputs), rtol=1e-4, atol=1e-5
    )
