"""A law: a sentence about a function, and how to find arguments that break it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from hypothesis import Phase, given, settings
from hypothesis.errors import HypothesisException
from hypothesis.strategies import SearchStrategy

__all__ = ["Check", "Function", "Law", "check_laws", "laws_by_name"]

Function = Callable[..., Any]
Check = Callable[[Function, Any], None]

# All but "explain", which traces every line and adds nothing to shapes, a kind and a seed.
_PHASES = (Phase.explicit, Phase.reuse, Phase.generate, Phase.target, Phase.shrink)


@dataclass(frozen=True)
class Law:
    """A sentence about a function, and how to find arguments that break it.

    Args:
        name: A word for it.
        sentence: What holds.
        check: Raises if it does not hold for a function and arguments.
        arguments: Strategy of the arguments, mostly :class:`Arguments`.
    """

    name: str
    sentence: str
    check: Check
    arguments: SearchStrategy[Any]

    def __call__(self, function: Function, *, max_examples: int | None = None) -> None:
        """Try the law on `max_examples` arguments (None: as many as the profile of Hypothesis says).

        Raises:
            AssertionError: If it is broken; Hypothesis adds the smallest arguments that it found.
        """
        number = settings().max_examples if max_examples is None else max_examples

        # A database is of no use: every call makes a new function, and Hypothesis knows examples by function.
        @settings(max_examples=number, deadline=None, database=None, print_blob=False, phases=_PHASES)
        @given(self.arguments)
        def holds(arguments: Any) -> None:
            try:
                self.check(function, arguments)
            except HypothesisException:
                raise
            except Exception as error:
                msg = f"law broken: {self.name}: {self.sentence}\n{type(error).__name__}: {error}"
                raise AssertionError(msg) from error

        holds()

    def __str__(self) -> str:
        """The name."""
        return self.name


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
        AssertionError: If a law is broken: ``law broken: <name>: <sentence>``.
        ValueError: If `skip` has a name that is no law's.
    """
    unknown = set(skip) - set(laws)
    if unknown:
        msg = f"`skip` must have names among {list(laws)}, got {sorted(unknown)}"
        raise ValueError(msg)
    for name, law in laws.items():
        if name not in skip:
            law(function, max_examples=max_examples)


def laws_by_name(arguments: SearchStrategy[Any], *laws: tuple[Any, ...]) -> dict[str, Law]:
    """Laws by name, from (name, sentence, check) or (name, sentence, check, arguments of its own)."""
    return {law[0]: Law(*(law if len(law) > 3 else (*law, arguments))) for law in laws}
