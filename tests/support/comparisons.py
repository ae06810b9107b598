"""How a loss is compared: with its oracle, and with itself on other arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from support import oracles
from support.cases import Case
from support.tolerances import assert_close

Gradients = dict[str, list[Tensor | None]]


def to_tensors(case: Case, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """The arguments as tensors; the floating ones are in `dtype` and all of them ask for a gradient."""
    return {name: _each(_to_tensor, value, dtype) for name, value in case.items()}


def _to_tensor(array: np.ndarray, dtype: torch.dtype) -> Tensor:
    tensor = torch.tensor(array)
    return tensor.to(dtype).requires_grad_() if tensor.is_floating_point() else tensor


def _each(function: Callable, value: Any, *arguments: Any) -> Any:
    """Apply to an argument, level by level if it has levels."""
    return [function(level, *arguments) for level in value] if isinstance(value, list) else function(value, *arguments)


def _levels(value: Any) -> list:
    return value if isinstance(value, list) else [value]


def _weighted_sum(terms: Any) -> Any:
    """One scalar of a loss's terms, with unequal weights: a gradient in the wrong term shows."""
    weights = {"loss_class": 1.0, "loss_bbox": 0.6, "loss_giou": 1.7, "loss": 1.0}
    return sum(weights[name] * term for name, term in _named(terms).items())


def _named(terms: Any) -> dict[str, Any]:
    return terms if isinstance(terms, dict) else {"loss": terms}


def evaluate(loss: Callable, arguments: dict[str, Any], **options: Any) -> tuple[dict[str, Tensor], Gradients]:
    """The terms of a loss, and the gradient of their weighted sum for each floating argument."""
    terms = loss(**arguments, **options)
    _weighted_sum(terms).backward()
    gradients = {
        name: [level.grad for level in _levels(value)]
        for name, value in arguments.items()
        if _levels(value)[0].is_floating_point()
    }
    return {name: term.detach() for name, term in _named(terms).items()}, gradients


def assert_agrees_with_oracle(
    loss: Callable,
    oracle: Callable,
    case: Case,
    dtype: torch.dtype,
    *,
    wrt: Sequence[str],
    **options: Any,
) -> dict[str, Tensor]:
    """Raise AssertionError unless the terms and their gradient equal the oracle's, computed from the rounded case.

    Only the arguments `wrt` may get a gradient, though all floating ones ask for it. Returns the terms.
    """
    arguments = to_tensors(case, dtype)
    rounded = {name: _each(_to_array, value) for name, value in arguments.items()}
    terms, gradients = evaluate(loss, arguments, **options)

    expected = _named(oracle(**rounded, **options))
    assert terms.keys() == expected.keys()
    for name, term in terms.items():
        assert term.dtype == dtype
        assert_close(term, expected[name], name)

    def weighted_oracle(*leaves: np.ndarray) -> Any:
        rest = iter(leaves)
        replaced = {name: _each(lambda _: next(rest), rounded[name]) for name in wrt}
        return _weighted_sum(oracle(**{**rounded, **replaced}, **options))

    _, expected_gradients = oracles.value_and_grad(
        weighted_oracle, *(x for name in wrt for x in _levels(rounded[name]))
    )
    remaining = iter(expected_gradients)
    for name, levels in gradients.items():
        for gradient in levels:
            if name in wrt:
                assert_close(gradient, next(remaining), f"gradient of {name}")
            else:
                assert gradient is None, f"a gradient reaches {name}"
    return terms


def _to_array(tensor: Tensor) -> np.ndarray:
    return (tensor.detach().double() if tensor.is_floating_point() else tensor).numpy()


def assert_same_evaluation(
    loss: Callable, case: Case, changed: Case, dtype: torch.dtype, *, wrt: Sequence[str], **options: Any
) -> None:
    """Raise AssertionError unless value and gradients are exactly those of the `changed` case."""
    terms, gradients = evaluate(loss, to_tensors(case, dtype), **options)
    changed_terms, changed_gradients = evaluate(loss, to_tensors(changed, dtype), **options)
    assert all(torch.isfinite(term) for term in terms.values())
    torch.testing.assert_close(changed_terms, terms, rtol=0, atol=0)
    for name in wrt:
        torch.testing.assert_close(changed_gradients[name], gradients[name], rtol=0, atol=0)


def assert_vanishes(loss: Callable, arguments: dict[str, Any], *, wrt: Sequence[str], **options: Any) -> None:
    """Raise AssertionError unless all terms and their gradients are 0, to 1e-6, with a graph."""
    terms, gradients = evaluate(loss, arguments, **options)
    for name, term in terms.items():
        assert abs(term.item()) <= 1e-6, f"{name} is {term.item()}"
    for name in wrt:
        for gradient in gradients[name]:
            torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-6)


def assert_rejects(
    function: Callable, case: Case, argument: str, change: Any, error: type[Exception], match: str
) -> None:
    """Raise unless the function accepts the case, and rejects it with `argument` changed.

    `change` is a function of the argument, or what takes its place.
    """
    arguments = to_tensors(case)
    function(**arguments)
    arguments[argument] = change(arguments[argument]) if callable(change) else change
    with pytest.raises(error, match=match):
        function(**arguments)


def to_meta(tensor: Tensor) -> Tensor:
    """The tensor on another device."""
    return tensor.to("meta")
