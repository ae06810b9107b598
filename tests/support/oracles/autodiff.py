"""Reverse-mode differentiation of plain scalar code, in float64.

An oracle is written once, in loops over generic scalars. Called with floats it returns floats; called through
`value_and_grad` it runs on `Var` scalars, whose tape gives the gradient to machine precision.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TypeAlias

import numpy as np

__all__ = ["Var", "value_and_grad"]


class Var:
    """A scalar with its place on the tape: the scalars it was computed from and the local derivatives."""

    __slots__ = ("grad", "parents", "tape", "value")
    __array_ufunc__ = None  # a NumPy scalar on the left leaves the arithmetic to Var

    def __init__(self, value: float, tape: list[Var], parents: tuple[tuple[Var, float], ...] = ()) -> None:
        """Append to the tape: a tape in order of creation is in topological order."""
        self.value, self.tape, self.parents, self.grad = float(value), tape, parents, 0.0
        tape.append(self)

    def __add__(self, other: Scalar) -> Scalar:
        """d(a + b) = da + db."""
        return _record(self.value + value(other), (self, 1.0), (other, 1.0))

    def __sub__(self, other: Scalar) -> Scalar:
        """d(a - b) = da - db."""
        return _record(self.value - value(other), (self, 1.0), (other, -1.0))

    def __rsub__(self, other: float) -> Scalar:
        """d(k - a) = -da."""
        return _record(other - self.value, (self, -1.0))

    def __neg__(self) -> Scalar:
        """d(-a) = -da."""
        return _record(-self.value, (self, -1.0))

    def __mul__(self, other: Scalar) -> Scalar:
        """d(a b) = b da + a db."""
        return _record(self.value * value(other), (self, value(other)), (other, self.value))

    def __truediv__(self, other: Scalar) -> Scalar:
        """d(a / b) = da / b - a db / b^2."""
        b = value(other)
        return _record(self.value / b, (self, 1.0 / b), (other, -self.value / b**2))

    def __rtruediv__(self, other: float) -> Scalar:
        """d(k / a) = -k da / a^2."""
        return _record(other / self.value, (self, -other / self.value**2))

    def __pow__(self, exponent: float) -> Scalar:
        """d(a^k) = k a^(k-1) da."""
        slope = exponent * self.value ** (exponent - 1) if exponent else 0.0
        return _record(self.value**exponent, (self, slope))

    def __abs__(self) -> Scalar:
        """d|a| = sign(a) da, 0 at a = 0."""
        return _record(abs(self.value), (self, float(self.value > 0) - float(self.value < 0)))

    __radd__, __rmul__ = __add__, __mul__


Scalar: TypeAlias = Var | float


def _record(result: float, *parents: tuple[Scalar, float]) -> Scalar:
    """Put a result on the tape of its `Var` parents; without any it stays a float."""
    variables = tuple((parent, slope) for parent, slope in parents if isinstance(parent, Var))
    return Var(result, variables[0][0].tape, variables) if variables else result


def value(x: Scalar) -> float:
    """Return the number behind a scalar."""
    return x.value if isinstance(x, Var) else x


def exp(x: Scalar) -> Scalar:
    """Return e^x."""
    result = math.exp(value(x))
    return _record(result, (x, result))


def log(x: Scalar) -> Scalar:
    """Return the natural logarithm."""
    return _record(math.log(value(x)), (x, 1.0 / value(x)))


def sqrt(x: Scalar) -> Scalar:
    """Return the square root."""
    return x**0.5


def softplus(x: Scalar) -> Scalar:
    """Return log(1 + e^x) = -log sigmoid(-x), without overflow."""
    small = math.exp(-abs(value(x)))
    slope = (1.0 if value(x) >= 0 else small) / (1.0 + small)
    return _record(max(value(x), 0.0) + math.log1p(small), (x, slope))


def sigmoid(x: Scalar) -> Scalar:
    """Return 1 / (1 + e^-x)."""
    return exp(-softplus(-x))


def maximum(a: Scalar, b: Scalar) -> Scalar:
    """Return the larger scalar; a tie shares the gradient half and half."""
    share = 0.5 * (float(value(a) > value(b)) + float(value(a) >= value(b)))
    return _record(max(value(a), value(b)), (a, share), (b, 1.0 - share))


def minimum(a: Scalar, b: Scalar) -> Scalar:
    """Return the smaller scalar; a tie shares the gradient half and half."""
    return -maximum(-a, -b)


def log_softmax(logits: Iterable[Scalar]) -> list[Scalar]:
    """Return z_c - log sum_k e^(z_k)."""
    logits = list(logits)
    shift = max(value(z) for z in logits)  # cancels in the result, so a constant will do
    normalizer = shift + log(sum(exp(z - shift) for z in logits))
    return [z - normalizer for z in logits]


def softmax(logits: Iterable[Scalar]) -> list[Scalar]:
    """Return e^(z_c) / sum_k e^(z_k)."""
    return [exp(log_p) for log_p in log_softmax(logits)]


def value_and_grad(f: Callable[..., Scalar], *arrays: np.ndarray) -> tuple[float, list[np.ndarray]]:
    """Return f(*arrays), a scalar, and its gradient with respect to each array."""
    tape: list[Var] = []
    arrays = tuple(np.asarray(array, dtype=np.float64) for array in arrays)
    leaves = [np.array([Var(x, tape) for x in a.flat], dtype=object).reshape(a.shape) for a in arrays]
    output = f(*(a[()] for a in leaves))  # [()] turns an array without dimensions into its scalar
    if isinstance(output, Var):
        output.grad = 1.0
    for variable in reversed(tape):
        for parent, slope in variable.parents:
            parent.grad += slope * variable.grad
    grads = [np.array([leaf.grad for leaf in a.flat], dtype=np.float64).reshape(a.shape) for a in leaves]
    return float(value(output)), grads
