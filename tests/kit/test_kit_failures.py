"""What a broken law says: one error, and calls that repeat it."""

from __future__ import annotations

import re

import pytest
import scipy.optimize
import torch
from hypothesis import strategies as st

import detr_kd_losses as dkl
from detr_kd_losses import testing
from detr_kd_losses.testing import makers, replicas
from detr_kd_losses.testing.arguments import Arguments
from detr_kd_losses.testing.law import law
from detr_kd_losses.testing.makers import make_cost_arguments, make_distillation_arguments

LAWS = testing.HUNGARIAN_DISTILLATION_LAWS


def failure(law, function, max_examples=100):
    with pytest.raises(AssertionError, match=f"^law broken: {law.name}: {re.escape(law.sentence)}\n") as error:
        law(function, max_examples=max_examples)
    assert type(error.value) is AssertionError
    return error.value


def padded_matters(student_logits, student_boxes, teacher_logits, teacher_boxes, assignment, *, teacher_positive=None):
    return {"loss": student_logits.nan_to_num().mean() ** 2 + 0 * student_boxes.nan_to_num().sum()}


def first_query(student_logits, *others, **options):
    return {"loss": student_logits[..., 0, :].square().sum()}


def mean_of_stages(student_logits, *others, weight=1.0, **options):
    return {"loss": weight * student_logits.square().mean()}


def low_precision(student_logits, *others, **options):
    return student_logits.square().sum()


# What the last call was made by, for laws that change arguments.
@pytest.mark.parametrize(
    ("name", "function", "changes"),
    [
        ("student_permutation", first_query, [".permuted('N')", ""]),
        ("unmatched_students", padded_matters, ["", ".padded('N', 1e+30)"]),
        ("stages_add", mean_of_stages, ["", ".entry('L', 0)", ".entry('L', 1)"]),
        ("images_join", lambda logits, *others, **options: logits.square().mean((2, 3)).sum(), [".joined()", ""]),
        ("half_precision", low_precision, [".cast(torch.float16)", ".cast(torch.float16).cast(torch.float32)"]),
        ("no_pairs", low_precision, [".unpaired()", ".unpaired().taken('M', [])"]),
        ("zero_at_teacher", low_precision, [".at_teacher()"]),
    ],
)
def test_the_calls_that_were_seen_can_be_repeated(name, function, changes):
    seen = []

    def watched(*args, **options):
        seen.append([*args, *options.values()])
        return function(*args, **options)

    lines = str(failure(LAWS[name], watched)).splitlines()
    start = next(index for index, line in enumerate(lines) if " that watched saw, where arguments = make_" in line)
    assert [line.split(".call(")[0] for line in lines[start + 1 :]] == [f"  arguments{change}" for change in changes]
    # The code is run: it passes the tensors that the function saw last, at the end of the search.
    arguments = eval(lines[start].split("where arguments = ")[1].removesuffix(":"), vars(makers))
    recent = seen[-len(changes) :]
    for line, tensors in zip(lines[start + 1 :], recent, strict=True):
        code, shapes = line.strip().split(": ", 1)
        seen.clear()
        eval(code, {"arguments": arguments, "torch": torch, "watched": watched})
        for tensor, repeated in zip(tensors, seen[0], strict=True):
            torch.testing.assert_close(repeated, tensor, rtol=0, atol=0, equal_nan=True)
        sizes = re.findall(r"(\w+) (\([\d, ]*\)) (\w+)", shapes)
        assert [(eval(shape), f"torch.{dtype}") for _, shape, dtype in sizes] == [
            (tuple(tensor.shape), str(tensor.dtype)) for tensor in tensors
        ]


def test_options_are_part_of_the_call():
    def loss(*args, weight_class=1.0, weight_bbox=5.0, weight_giou=2.0, **options):
        weights = {"weight_class": weight_class, "weight_bbox": weight_giou, "weight_giou": weight_giou}
        return dkl.hungarian_distillation_loss(*args, **weights, **options)

    message = str(failure(LAWS["weights_linear"], loss, 300))
    assert re.search(
        r"arguments\.call\(loss, weight_class=1\.0, weight_bbox=3\.0, weight_giou=1\.0\): student_", message
    )


def test_a_keyword_that_is_not_taken_is_not_in_the_call():
    message = str(failure(LAWS["zero_at_teacher"], lambda a, b, c, d, e: (a + 1).abs().sum() + b.sum()))
    assert "teacher_positive" not in message


def test_many_calls_are_cut_to_the_last():
    @law("one_by_one", "every entry is there")
    def one_by_one(function, arguments):
        for _ in range(2):
            for index in range(7):
                arguments.taken("N", [0] * index).call(function)
        msg = "gone"
        raise AssertionError(msg)

    message = str(failure(one_by_one.on(makers.cost_arguments()), lambda cost, **masks: cost))
    assert message.splitlines()[1].startswith("gone")
    assert "the last 4 of 7 calls that <lambda> saw" in message
    assert message.count(".call(<lambda>)") == 4


def test_two_kinds_of_failure_are_one_error():
    def fails(cost, *, row_mask=None, column_mask=None):
        if cost.shape[-1] > cost.shape[-2]:
            msg = "wide"
            raise KeyError(msg)
        if cost.shape[0] > 1:
            msg = "many"
            raise IndexError(msg)
        msg = "other"
        raise OSError(msg)

    for number in (1, 20, 200):
        failure(testing.ASSIGNMENT_LAWS["optimal"], fails, number)


def test_the_solver_of_scipy_is_told_apart():
    error = failure(testing.ASSIGNMENT_LAWS["optimal"], scipy.optimize.linear_sum_assignment)
    assert "\nValueError: expected a matrix (2-D array), got a 3 array\n" in str(error)
    assert str(error).count("cost (") == 1


def test_an_answer_that_is_no_tensor():
    error = failure(testing.ASSIGNMENT_LAWS["optimal"], lambda cost, **masks: ([0], [0]))
    assert "\nthe answer must be a tensor of partners, got tuple\n" in str(error)


def test_a_function_that_draws_numbers_is_told_so():
    answers = iter([torch.tensor(-1.0), *[torch.tensor(1.0)] * 1000])
    error = failure(LAWS["non_negative"], lambda *args, **options: next(answers))
    assert "<lambda> answers the same call in two ways, once with loss must be at least 0, got -1.0" in str(error)


@pytest.mark.parametrize("laws", [LAWS, testing.FEATURE_LAWS], ids=["tensors", "levels"])
def test_a_function_that_changes_its_arguments_is_told_so(laws):
    """What it is called with next would not be what the law says of it."""

    def halves(*args, **options):
        tensors = [level for argument in args for level in (argument if isinstance(argument, list) else [argument])]
        with torch.no_grad():
            next(reversed([tensor for tensor in tensors if tensor.is_floating_point()])).mul_(0.5)
        return torch.zeros(())

    error = failure(laws["non_negative"], halves)
    assert re.fullmatch(
        r"halves must leave its arguments as they are, got argument \d changed in place", str(error).splitlines()[1]
    )


def test_nan_is_named():
    error = failure(LAWS["student_permutation"], lambda *args, **options: torch.tensor(float("nan")))
    assert "\nloss is NaN in both calls, and must be a number\n" in str(error)


def test_numbers_are_compared_in_one_line():
    error = failure(LAWS["student_permutation"], first_query)
    assert re.fullmatch(r"loss must be [\d.e-]+, got [\d.e-]+", str(error).splitlines()[1])
    error = failure(LAWS["half_precision"], low_precision)
    assert str(error).splitlines()[1].startswith("loss: The values for attribute 'dtype' do not match: torch.float16")


def test_replicas_that_wait_for_each_other_are_told_so(monkeypatch):
    monkeypatch.setattr(replicas, "_TIMEOUT_SECONDS", 0.05)

    def alone(student_logits, student_boxes, teacher_logits, teacher_boxes, assignment):
        if student_logits.shape[1] > 1 and torch.distributed.is_initialized():
            torch.distributed.all_reduce(torch.zeros(()))
        return 0 * student_logits.sum()

    error = failure(LAWS["replicas"], alone, 30)
    assert "BrokenBarrierError: some ranks wait for a call of all_reduce that the others never make" in str(error)


def test_an_error_of_the_function_is_the_cause():
    def fails(*args, **options):
        msg = "disk"
        raise OSError(msg)

    error = failure(LAWS["finite"], fails)
    assert isinstance(error.__cause__, OSError)
    assert "\nOSError: disk\n" in str(error)


def test_an_assertion_without_words_has_its_name():
    @law("silent", "nothing is said")
    def silent(function, arguments):
        raise AssertionError

    # No call of the function was made by arguments that know how they were made: Hypothesis says what they were.
    error = failure(silent.on(st.tuples(st.integers())), sum)
    assert str(error).endswith("\nAssertionError: ")
    assert "arguments=(0,)" in "\n".join(error.__notes__)


def test_the_message_is_all():
    assert failure(LAWS["student_permutation"], first_query).__notes__ == []


def test_steps_are_in_the_repr():
    arguments = make_cost_arguments(problems=1, rows=2, columns=2, kind="ties", ragged=True, seed=3)
    made = "make_cost_arguments(problems=1, rows=2, columns=2, kind='ties', ragged=True, seed=3)"
    assert repr(arguments) == made
    assert repr(arguments.taken("N", [1]).padded("T", float("inf")).without("row_mask")) == (
        f"{made}.taken('N', [1]).padded('T', float('inf')).without('row_mask')"
    )
    assert repr(arguments.replaced(cost=torch.zeros(1, 2, 2))) == f"{made}.replaced(cost=...)"
    assert repr(Arguments(arguments.signature, {})) == "Arguments(...)"


def test_permuting_what_is_not_in_the_call_moves_the_assignment_alone():
    """The partners of an assignment may be in arguments that were left out."""
    arguments = make_distillation_arguments(stages=1, images=1, students=2, teachers=3, classes=2, split=False)
    moved = arguments.permuted("M")
    matched = arguments["assignment"] >= 0
    assert torch.equal(moved["assignment"][matched], (arguments["assignment"][matched] + 1) % 3)
    assert torch.equal(moved["teacher_boxes"], arguments["teacher_boxes"].roll(1, -2))
