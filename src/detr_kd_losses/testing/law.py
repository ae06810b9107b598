"""A law: a sentence about a function, and how to find arguments that break it.

>>> import detr_kd_losses as dkl
>>> from detr_kd_losses.testing.signatures import COSTS
>>> from detr_kd_losses.testing.makers import cost_arguments
>>> @law("no_minus_two", "a partner is -1 or more")
... def no_minus_two(solver, arguments):
...     assert (arguments.call(solver) >= -1).all()
>>> laws = laws_by_name(COSTS, cost_arguments(), no_minus_two)
>>> check_laws(laws, dkl.linear_sum_assignment, max_examples=2)
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from hypothesis import Phase, given, settings
from hypothesis.errors import Flaky, HypothesisException
from hypothesis.strategies import SearchStrategy

from detr_kd_losses.testing.arguments import Arguments, Signature
from detr_kd_losses.testing.subject import LawNotApplicable, MissingError, Subject

__all__ = ["Check", "Function", "Law", "check_laws", "law", "laws_by_name"]

Function = Callable[..., Any]
Check = Callable[[Function, Any], None]

# All but "explain", which traces every line and adds nothing to shapes, a kind and a seed.
_PHASES = (Phase.explicit, Phase.reuse, Phase.generate, Phase.target, Phase.shrink)


def _settings(number: int) -> settings:
    return settings(
        max_examples=number,
        deadline=None,
        # Of no use: every call makes a new function, and Hypothesis knows examples by function.
        database=None,
        print_blob=False,
        phases=_PHASES,
        # Two kinds of failure of one law would be a group of errors.
        report_multiple_bugs=False,
    )


@dataclass(frozen=True)
class Law:
    """A sentence about a function, and how to find arguments that break it.

    Args:
        name: A word for it.
        sentence: What holds.
        check: Raises if it does not hold for a function, as a :class:`Subject`, and arguments.
        arguments: Strategy of the arguments, mostly :class:`Arguments`; None until the law is on a list.
        signature: The call that a function must accept; None: not looked at beforehand.
        needs: Keyword arguments that the function must accept.
        terms: Names of the terms that the function must return.

    Examples:
        >>> import detr_kd_losses as dkl
        >>> from detr_kd_losses.testing import DETECTION_LAWS
        >>> DETECTION_LAWS["non_negative"](dkl.detection_loss, max_examples=2)
    """

    name: str
    sentence: str
    check: Check
    arguments: SearchStrategy[Any] | None = None
    signature: Signature | None = None
    needs: tuple[str, ...] = ()
    terms: tuple[str, ...] = ()

    def __call__(self, function: Function, *, max_examples: int | None = None) -> None:
        """Try the law.

        Args:
            function: What it is about.
            max_examples: Number of arguments; None: as many as the profile of Hypothesis says.

        Raises:
            AssertionError: If it is broken: ``law broken: <name>: <sentence>``, why, and the smallest calls for it.
            LawNotApplicable: If it needs what the function does not have.
            ValueError: If the law has no arguments yet.
        """
        if self.arguments is None:
            msg = f"law {self.name} has no arguments: give it some by `on`"
            raise ValueError(msg)
        subject = Subject(function, self.terms)
        try:
            if self.signature is not None:
                self.signature.require_accepted(subject, self.needs)
            self._search(subject, self.arguments, settings().max_examples if max_examples is None else max_examples)
        except MissingError as missing:
            raise LawNotApplicable({self.name: str(missing)}, missing.advice) from missing.__cause__

    def _search(self, subject: Subject, strategy: SearchStrategy[Any], number: int) -> None:
        missing: list[MissingError] = []
        broken: list[Exception] = []

        @_settings(number)
        @given(strategy)
        def holds(arguments: Any) -> None:
            if missing and not broken:
                return
            subject.calls.clear()
            try:
                self.check(subject, arguments.fitting(subject) if isinstance(arguments, Arguments) else arguments)
            except HypothesisException:
                raise
            except MissingError as error:
                # Not raised here: there is nothing to shrink.
                missing.append(error)
            except Exception as error:
                broken.append(error)
                said = isinstance(error, AssertionError) and str(error)
                reason = said or f"{type(error).__name__}: {error}"
                raise AssertionError(self._verdict("\n".join([reason, *subject.describe_calls()]))) from error

        try:
            holds()
        except Flaky as error:
            reason = (
                f"{subject.name} answers the same call in two ways, once with {broken[-1]}" if broken else str(error)
            )
            raise AssertionError(self._verdict(reason)) from (broken[-1] if broken else error)
        except AssertionError as error:
            if subject.calls:
                # Hypothesis's note says again, and longer, what the message says.
                error.__notes__ = []
            raise
        if missing:
            raise missing[0]

    def _verdict(self, reason: str) -> str:
        return f"law broken: {self.name}: {self.sentence}\n{reason}"

    def on(self, arguments: SearchStrategy[Any], *, name: str = "", sentence: str = "") -> Law:
        """The same law about other arguments.

        Args:
            arguments: Their strategy.
            name: Another name; empty: the same.
            sentence: Another sentence; empty: the same.

        Returns:
            A law of its own.
        """
        return replace(self, arguments=arguments, name=name or self.name, sentence=sentence or self.sentence)

    def called(self, name: str, sentence: str) -> Law:
        """The same law by another name and sentence."""
        return replace(self, name=name, sentence=sentence)

    def __str__(self) -> str:
        """The name."""
        return self.name


def law(
    name: str, sentence: str, *, needs: Collection[str] = (), terms: Collection[str] = ()
) -> Callable[[Check], Law]:
    """Make a law of the function that checks it.

    Args:
        name: A word for it.
        sentence: What holds.
        needs: Keyword arguments that the function under the law must accept.
        terms: Names of the terms that it must return.

    Returns:
        A decorator, of a function of the function under the law and its arguments, which raises if it does not hold.

    Examples:
        >>> @law("has_sum", "all numbers have a sum")
        ... def has_sum(function, arguments):
        ...     assert function(arguments) == sum(arguments)
        >>> from hypothesis import strategies as st
        >>> has_sum.on(st.lists(st.integers()))(sum, max_examples=5)
    """

    def make(check: Check) -> Law:
        return Law(name, sentence, check, needs=tuple(needs), terms=tuple(terms))

    return make


def check_laws(
    laws: Mapping[str, Law], function: Function, *, skip: Collection[str] = (), max_examples: int | None = None
) -> None:
    """Try one law after another.

    Args:
        laws: By name.
        function: What they are about.
        skip: Names of laws that are not meant to hold.
        max_examples: Number of arguments for each law; None: as the profile of Hypothesis says.

    Raises:
        AssertionError: If a law is broken: ``law broken: <name>: <sentence>``. The first one that is ends the check.
        LawNotApplicable: If no law is broken, but some need what the function does not have: names them all.
        ValueError: If `skip` has a name that is no law's.

    Examples:
        >>> import detr_kd_losses as dkl
        >>> from detr_kd_losses.testing import ASSIGNMENT_LAWS
        >>> check_laws(ASSIGNMENT_LAWS, dkl.linear_sum_assignment, skip=("planted",), max_examples=2)
    """
    not_applicable: dict[str, str] = {}
    for name, tried in laws_without(laws, skip).items():
        try:
            tried(function, max_examples=max_examples)
        except LawNotApplicable as error:
            if error.advice:
                # Skipping would not help, and the other laws would say the same.
                raise
            not_applicable[name] = error.reasons[tried.name]
    if not_applicable:
        raise LawNotApplicable(not_applicable)


def laws_without(laws: Mapping[str, Law], skip: Collection[str]) -> dict[str, Law]:
    """The laws but those of the names in `skip`, which must be some of theirs."""
    unknown = set(skip) - set(laws)
    if unknown:
        msg = f"`skip` must have names among {list(laws)}, got {sorted(unknown)}"
        raise ValueError(msg)
    return {name: law for name, law in laws.items() if name not in skip}


def laws_by_name(signature: Signature, arguments: SearchStrategy[Any], *laws: Law) -> dict[str, Law]:
    """Laws about one signature.

    Args:
        signature: The call that a function must accept.
        arguments: Strategy of the arguments of those laws that have none of their own.
        laws: In the order in which they are to be tried.

    Returns:
        The laws by name.
    """
    own = [law if law.arguments is not None else law.on(arguments) for law in laws]
    return {law.name: replace(law, signature=signature) for law in own}
