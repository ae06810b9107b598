"""The function that a law is about: what it accepts, and the calls that it saw."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

from torch import Tensor, nn

__all__ = ["LawNotApplicable", "MissingError", "Subject", "name_of", "terms_of"]

# A law may make many calls; the last ones are those that it compared.
_CALLS_SHOWN = 4


class LawNotApplicable(Exception):  # noqa: N818 - a verdict, as "broken" is one
    """A law needs what the function does not have: it is neither kept nor broken.

    Args:
        reasons: By the law's name, what it needs and what it got.
        advice: What to do about it; by default, to skip these laws.

    Examples:
        >>> print(LawNotApplicable({"masks": "needs the option row_mask, which solve does not take"}))
        law not applicable: masks needs the option row_mask, which solve does not take; skip=('masks',)
    """

    def __init__(self, reasons: Mapping[str, str], advice: str = "") -> None:
        self.reasons = dict(reasons)
        self.advice = advice
        what = [f"{name} {reason}" for name, reason in reasons.items()]
        todo = advice or f"skip={tuple(reasons)}"
        alone = len(what) == 1
        super().__init__(
            f"law not applicable: {what[0]}; {todo}" if alone else "\n  ".join(["laws not applicable:", *what, todo])
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process makes it from the same reasons."""
        return type(self), (self.reasons, self.advice)


class MissingError(LookupError):
    """Something that a law needs is not there; the law that meets it turns it into :class:`LawNotApplicable`.

    Args:
        reason: What is needed and what there is instead, beginning with "needs".
        advice: What to do about it; by default, to skip the law.
    """

    def __init__(self, reason: str, advice: str = "") -> None:
        super().__init__(reason)
        self.advice = advice


class Call(Protocol):
    """What was called, in words."""

    @property
    def made_by(self) -> str:
        """The call that makes the arguments which were drawn."""
        ...

    def describe(self, name: str, options: Mapping[str, Any]) -> str:
        """The call, and the shapes that it passed."""
        ...


class Subject:
    """A function under a law: called as the function is, which is its `function`.

    Args:
        function: Any callable.
        terms: Names of the terms that its answers must have.

    Examples:
        >>> subject = Subject(lambda cost, *, row_mask=None: cost)
        >>> subject.accepts("row_mask"), subject.accepts("column_mask")
        (True, False)
    """

    def __init__(self, function: Callable[..., Any], terms: Collection[str] = ()) -> None:
        self.function = function
        self.name = name_of(function)
        self.calls: list[tuple[Call, dict[str, Any]]] = []
        self._terms = terms
        self._parameters = _parameters(function)

    def accepts(self, keyword: str) -> bool:
        """Whether it can be given `keyword` by name; what cannot be inspected is taken to accept all."""
        if self._parameters is None:
            return True
        kinds = {name: parameter.kind for name, parameter in self._parameters.parameters.items()}
        named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        return kinds.get(keyword) in named or inspect.Parameter.VAR_KEYWORD in kinds.values()

    def require_call(self, number: int, keywords: Sequence[str], expected: str) -> None:
        """Raise :class:`MissingError` unless it accepts so many arguments by position and those keywords it has."""
        if self._parameters is None:
            return
        given = [keyword for keyword in keywords if self.accepts(keyword)]
        try:
            self._parameters.bind(*range(number), **dict.fromkeys(given))
        except TypeError as error:
            reason = f"needs a function that takes\n  {expected}\ngot {self.name}{self._parameters}: {error}"
            raise MissingError(reason, f"wrap {self.name} in a function that takes them") from None

    def require_keywords(self, keywords: Sequence[str]) -> None:
        """Raise :class:`MissingError` unless it accepts all of `keywords`."""
        refused = [keyword for keyword in keywords if not self.accepts(keyword)]
        if refused:
            options = "the option" if len(refused) == 1 else "the options"
            msg = f"needs {options} {', '.join(refused)}, which {self.name} does not take"
            raise MissingError(msg)

    def answer(self, call: Call, args: Sequence[Any], keywords: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
        """The function's answer to a call, which is remembered."""
        self.calls.append((call, dict(options)))
        before = [(index, tensor, tensor._version) for index, tensor in _tensors(args)]
        try:
            answer = self.function(*args, **keywords, **options)
        except TypeError as error:
            # A wrapper with **options says only now what it does not take.
            refused = re.search(r"unexpected keyword argument '(\w+)'", str(error))
            if refused and refused[1] in {*keywords, *options}:
                msg = f"needs a function that takes {refused[1]}, got TypeError: {error}"
                raise MissingError(msg) from error
            raise
        for index, tensor, version in before:
            if tensor._version != version:
                msg = f"{self.name} must leave its arguments as they are, got argument {index} changed in place"
                raise AssertionError(msg)
        if self._terms:
            self._require_terms(answer)
        return answer

    def _require_terms(self, answer: Any) -> None:
        if isinstance(answer, Tensor):
            msg = "needs a loss that returns terms by name (a dict), got a scalar"
            raise MissingError(msg)
        answer = terms_of(answer)
        absent = [name for name in self._terms if name not in answer]
        if absent:
            msg = f"needs a loss that returns the terms {', '.join(self._terms)}, got {', '.join(answer)}"
            raise MissingError(msg)

    def __call__(self, *args: Any, **options: Any) -> Any:
        """The function's answer to what a law passes itself; not remembered."""
        return self.function(*args, **options)

    def describe_calls(self) -> list[str]:
        """The last different calls that were remembered, in code that repeats them, line by line."""
        if not self.calls:
            return []
        calls = list(dict.fromkeys(call.describe(self.name, options) for call, options in self.calls))
        shown = calls[-_CALLS_SHOWN:]
        which = f"the last {len(shown)} of {len(calls)} calls" if len(shown) < len(calls) else "the calls"
        head = f"{which} that {self.name} saw, where arguments = {self.calls[-1][0].made_by}:"
        return [head, *(f"  {call}" for call in shown)]


def terms_of(answer: Any) -> dict[str, Tensor]:
    """What a loss returned, by name; a bare tensor is called ``loss``. Anything else is a :class:`MissingError`."""
    if isinstance(answer, Tensor):
        return {"loss": answer}
    got = type(answer).__name__
    if isinstance(answer, Mapping):
        others = {name: type(term).__name__ for name, term in answer.items() if not isinstance(term, Tensor)}
        if answer and not others:
            return dict(answer)
        got = f"{got} with {others}" if others else f"an empty {got}"
    msg = f"needs a loss that returns a tensor or a dict of tensors, got {got}"
    raise MissingError(msg)


def name_of(function: Callable[..., Any]) -> str:
    """The name of a function under its partials, or of a Module's class."""
    while isinstance(function, partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)


def _tensors(args: Sequence[Any]) -> Iterator[tuple[int, Tensor]]:
    """The tensors of the arguments and their levels, with the argument's place, that count what changes them."""
    for index, argument in enumerate(args):
        for tensor in argument if isinstance(argument, list | tuple) else [argument]:
            if isinstance(tensor, Tensor) and not tensor.is_inference():
                yield index, tensor


def _parameters(function: Callable[..., Any]) -> inspect.Signature | None:
    """The parameters; of a Module those of its forward, since its __call__ takes anything."""
    try:
        return inspect.signature(function.forward if isinstance(function, nn.Module) else function)
    except (TypeError, ValueError):
        return None
