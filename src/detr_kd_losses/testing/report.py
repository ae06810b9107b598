"""A table of all laws about one function: which are kept, broken, or do not apply."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from detr_kd_losses.testing.law import Function, Law, laws_without
from detr_kd_losses.testing.subject import LawNotApplicable, name_of

__all__ = ["LawReport", "Verdict", "law_report"]

Outcome = Literal["passed", "broken", "not applicable", "skipped"]


@dataclass(frozen=True)
class Verdict:
    """What came of one law.

    Args:
        law: The law.
        outcome: ``"passed"``, ``"broken"``, ``"not applicable"`` or ``"skipped"``.
        error: What the law raised; None if it passed or was skipped.

    Examples:
        >>> from detr_kd_losses.testing import DETECTION_LAWS
        >>> Verdict(DETECTION_LAWS["finite"], "passed").reason
        ''
    """

    law: Law
    outcome: Outcome
    error: Exception | None = None

    @property
    def reason(self) -> str:
        """Why, in one line; empty if it passed or was skipped. The whole of it is in `error`."""
        if isinstance(self.error, LawNotApplicable):
            return " ".join(self.error.reasons[self.law.name].split())
        # The first line says which law.
        return str(self.error).splitlines()[1] if self.error else ""


@dataclass(frozen=True)
class LawReport:
    """What came of each law; printed, a table.

    Args:
        function: Name of the function.
        verdicts: By name of the law.

    Examples:
        >>> LawReport("my_loss", {}).kept
        True
    """

    function: str
    verdicts: Mapping[str, Verdict]

    @property
    def kept(self) -> bool:
        """Whether every law that was not skipped applies and passed."""
        return all(verdict.error is None for verdict in self.verdicts.values())

    def names(self, outcome: Outcome) -> tuple[str, ...]:
        """Names of the laws with that outcome: of those that are not applicable, what `skip` takes."""
        return tuple(name for name, verdict in self.verdicts.items() if verdict.outcome == outcome)

    def __str__(self) -> str:
        """Name, verdict and sentence of each law, and below it the first line of the reason."""
        width = max((len(name) for name in self.verdicts), default=0)
        lines = []
        for name, verdict in self.verdicts.items():
            lines.append(f"{name:{width}}  {verdict.outcome:14}  {verdict.law.sentence}")
            if verdict.reason:
                lines.append(f"{'':{width}}  {'':14}  > {verdict.reason}")
        numbers = Counter(verdict.outcome for verdict in self.verdicts.values())
        counted = ", ".join(f"{number} {outcome}" for outcome, number in numbers.items())
        return "\n".join([*lines, f"{self.function}: {counted or 'no laws'}"])


def law_report(
    laws: Mapping[str, Law], function: Function, *, skip: Collection[str] = (), max_examples: int | None = None
) -> LawReport:
    """Try all laws, and go on where one is broken.

    Args:
        laws: By name.
        function: What they are about.
        skip: Names of laws that are not to be tried.
        max_examples: Number of arguments for each law; None: as the profile of Hypothesis says.

    Returns:
        The outcome of each law; `print` shows a table.

    Raises:
        ValueError: If `skip` has a name that is no law's.

    Examples:
        >>> import detr_kd_losses as dkl
        >>> from detr_kd_losses.testing import ASSIGNMENT_LAWS
        >>> some = {name: ASSIGNMENT_LAWS[name] for name in ("masks", "empty")}
        >>> print(law_report(some, lambda cost: dkl.linear_sum_assignment(cost), max_examples=2))
        masks  not applicable  what is masked changes nothing, whatever it holds
                               > needs the options row_mask, column_mask, which <lambda> does not take
        empty  passed          without rows, columns or problems there is no pair
        <lambda>: 1 not applicable, 1 passed
    """
    tried = laws_without(laws, skip)
    verdicts = {
        name: _try(law, function, max_examples) if name in tried else Verdict(law, "skipped")
        for name, law in laws.items()
    }
    return LawReport(name_of(function), verdicts)


def _try(law: Law, function: Function, max_examples: int | None) -> Verdict:
    try:
        law(function, max_examples=max_examples)
    except LawNotApplicable as error:
        return Verdict(law, "not applicable", error)
    except AssertionError as error:
        return Verdict(law, "broken", error)
    return Verdict(law, "passed")
