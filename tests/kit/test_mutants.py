"""Every deliberate fault is noticed, by the check that is named for it."""

from __future__ import annotations

import pytest

from support.edits import edit, edited, occurrences
from support.mutants import MUTANTS


@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.name for mutant in MUTANTS])
def test_a_mutant_dies(mutant):
    mutant.check(max_examples=10)
    # A law stops at the first arguments that break it: many examples cost time only if the mutant lives.
    with edit(mutant.function, mutant.old, mutant.new), pytest.raises(AssertionError):
        mutant.check(max_examples=500)


def test_there_are_enough():
    assert len({(mutant.function, mutant.old, mutant.new) for mutant in MUTANTS}) >= 25


def test_an_edit_ends_with_its_block():
    mutant = MUTANTS[0]
    code = mutant.function.__code__
    with edit(mutant.function, mutant.old, mutant.new):
        assert mutant.function.__code__ != code
    assert mutant.function.__code__ == code


def test_an_edit_must_fit_the_source():
    with pytest.raises(ValueError, match="must have 'not in there' once in its source, got it 0 times"):
        edited(MUTANTS[0].function, "not in there", "")


def wrapped(values):
    """A sum, as a formatter wraps a long one."""
    return sum(
        values,
        0.0,
    )


@pytest.mark.parametrize("quoted", ["sum(values, 0.0)", "sum(\n values,\n 0.0,\n)", "sum( values,\n        0.0 )"])
def test_an_edit_does_not_depend_on_how_the_source_is_wrapped(quoted):
    assert edited(wrapped, quoted, "max(values)")([1.0, 2.0]) == 2.0


def test_an_edit_must_fit_one_place():
    assert occurrences("f(a, b); f(\n    a,\n    b,\n)", "f(a, b)") == [(0, 7), (9, 27)]
    assert occurrences("f(a,) + g(a, b)", "(a, b") == [(9, 14)]
    assert occurrences("f(a)", "f(b)") == []
    with pytest.raises(ValueError, match="must have 'values' once in its source, got it 2 times"):
        edited(wrapped, "values", "")
