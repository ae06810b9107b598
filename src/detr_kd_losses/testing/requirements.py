"""What a law requires of terms and answers, with errors of one line that say which term."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor
from torch.testing import assert_close

__all__ = ["TOLERANCE", "add_terms", "require", "require_each", "require_equal", "require_zero"]

Terms = dict[str, Tensor]

# Relative and absolute; a loss that answers in float32 is held to what float32 can.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}


def require(condition: object, what: str) -> None:
    """Raise AssertionError unless `condition`."""
    if not condition:
        raise AssertionError(what)


def require_equal(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise AssertionError unless all terms that are expected have the same value and dtype, up to rounding."""
    for name, value in expected.items():
        if bool(value.isnan().any()) and bool(actual[name].isnan().any()):
            msg = f"{name} is NaN in both calls, and must be a number"
            raise AssertionError(msg)
        tolerance = TOLERANCE.get(actual[name].dtype, 0.0)
        assert_close(actual[name], value, rtol=tolerance, atol=tolerance, msg=_describe(name, actual[name], value))


def _describe(name: str, actual: Tensor, expected: Tensor) -> Callable[[str], str]:
    """Torch's message in one line, after the name; where two scalars differ, the scalars."""

    def describe(text: str) -> str:
        if actual.ndim == 0 and (actual.shape, actual.dtype) == (expected.shape, expected.dtype):
            return f"{name} must be {expected.item()}, got {actual.item()}"
        return f"{name}: {' '.join(text.split())}"

    return describe


def require_zero(terms: Mapping[str, Tensor]) -> None:
    """Raise AssertionError unless all terms are 0, up to rounding."""
    require_equal(terms, {name: torch.zeros_like(term) for name, term in terms.items()})


def require_each(terms: Mapping[str, Tensor], what: str, holds: Callable[[Tensor], Tensor]) -> None:
    """Raise AssertionError unless all entries of all terms are `what`, which `holds` tells."""
    for name, value in terms.items():
        require(bool(holds(value).all()), f"{name} must be {what}, got {value}")


def add_terms(all_terms: Iterable[Mapping[str, Tensor]], factors: Iterable[float] | None = None) -> Terms:
    """Sum of terms, name by name, each times its factor."""
    all_terms = list(all_terms)
    factors = [1.0] * len(all_terms) if factors is None else list(factors)
    return {
        name: torch.stack([factor * terms[name] for factor, terms in zip(factors, all_terms, strict=True)]).sum(0)
        for name in all_terms[0]
    }
