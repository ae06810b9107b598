"""What a mutant is, and the checks by which it is noticed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np

import detr_kd_losses as dkl
from detr_kd_losses import testing
from detr_kd_losses.testing.arguments import Arguments

from support import oracles
from support.registry import LOSSES

Check = Callable[..., None]


class Mutant(NamedTuple):
    """`old` becomes `new` in the source of `function`, and `check(max_examples=...)` must raise AssertionError."""

    name: str
    function: Callable
    old: str
    new: str
    check: Check


def faults(function: Callable, *rows: tuple[str, str, str, Check]) -> list[Mutant]:
    """Mutants of one function, from (name, old, new, check)."""
    return [Mutant(name, function, *row) for name, *row in rows]


def law(laws: Mapping[str, testing.Law], function: Callable, name: str, **options: Any) -> Check:
    """The check by one law."""
    return partial(laws[name], partial(function, **options))


def law_of(function: Callable) -> Callable[..., Check]:
    """The checks of a public loss by its laws: give it the name of a law, and options."""
    return partial(law, LOSSES[function.__name__].laws, function)


def oracle(name: str, arguments: Arguments, **options: Any) -> Check:
    """The check by the values of the oracle of that name."""

    def check(max_examples: int) -> None:
        actual = arguments.call(getattr(dkl, name), **options)
        arrays = arguments.replaced(**{key: tensor.numpy() for key, tensor in arguments.tensors.items()})
        expected = arrays.call(getattr(oracles, name), **options)
        for key in expected if isinstance(expected, dict) else [()]:
            value, truth = (actual[key], expected[key]) if key else (actual, expected)
            np.testing.assert_allclose(value.numpy(), truth, rtol=1e-9, atol=1e-9, err_msg=str(key))

    return check
