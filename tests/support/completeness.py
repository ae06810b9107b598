"""What a public loss owes to the tests, the oracles, the laws and the README, and how to find what is missing.

Each function of `OWED` answers for one loss: None, or a sentence that says what is missing and where to add it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

from torch import nn

from support.registry import Loss

# Ends in "Loss" and composes losses: it has no function.
CRITERION = "DETRDistillationLoss"


class Project(NamedTuple):
    """Where to look: the package, its oracles and tests, and the text of the README."""

    package: ModuleType | SimpleNamespace
    oracles: ModuleType | SimpleNamespace
    registry: Mapping[str, Loss]
    mutants: Iterable[Any]
    readme: str


def function_name(module_name: str) -> str:
    """`FocalLoss` -> `focal_loss`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", module_name).lower()


def module_name(function: str) -> str:
    """`focal_loss` -> `FocalLoss`."""
    return "".join(word.capitalize() for word in function.split("_"))


def public_losses(package: ModuleType | SimpleNamespace) -> list[str]:
    """The names of the loss functions that the package has, and of those that a Module of it asks for."""
    functions = {name for name in package.__all__ if name.endswith("_loss")}
    modules = {name for name in package.__all__ if name.endswith("Loss") and name != CRITERION}
    return sorted(functions | {function_name(name) for name in modules})


def _entry(project: Project, name: str) -> Loss | None:
    return project.registry.get(name)


def missing_function(project: Project, name: str) -> str | None:
    if inspect.isroutine(getattr(project.package, name, None)) and name in project.package.__all__:
        return None
    return f"`{module_name(name)}` has no function: export `{name}` in src/detr_kd_losses/__init__.py"


def missing_module(project: Project, name: str) -> str | None:
    wanted = module_name(name)
    module = getattr(project.package, wanted, None)
    if not (inspect.isclass(module) and issubclass(module, nn.Module) and wanted in project.package.__all__):
        return f"`{name}` has no Module: write `{wanted}` beside it and export it in src/detr_kd_losses/__init__.py"
    entry = _entry(project, name)
    if entry is None or entry.module is not module:
        return f"`{name}` is tested without its Module: set `module=dkl.{wanted}` in tests/support/registry.py"
    return None


def missing_term(project: Project, name: str) -> str | None:
    entry = _entry(project, name)
    term = None if entry is None else entry.term
    if isinstance(term, str):
        return None
    if term is None or term.__name__ not in project.package.__all__:
        return (
            f"`{name}` has no term: write one in src/detr_kd_losses/terms, export it, and set `term=` in "
            "tests/support/registry.py (or a string that says why there is none)"
        )
    without = [option for option in term.rules if option not in entry.other_options]
    if without:
        return f"`{term.__name__}` has options without a test: give {without} in `other_options` of its entry"
    return None


def missing_case(project: Project, name: str) -> str | None:
    entry = _entry(project, name)
    if entry is None or entry.function is not getattr(project.package, name, None):
        return f"`{name}` is not registered: add `Loss(dkl.{name}, ...)` to LOSSES in tests/support/registry.py"
    if not entry.trials or not entry.wrt:
        return f"`{name}` has no case: give its entry in tests/support/registry.py `trials` and `wrt`"
    return None


def missing_oracle(project: Project, name: str) -> str | None:
    if callable(getattr(project.oracles, name, None)):
        return None
    return (
        f"`{name}` has no oracle: write `{name}` in plain loops in tests/support/oracles/losses.py "
        "and name it in `__all__` there"
    )


def missing_laws(project: Project, name: str) -> str | None:
    entry = _entry(project, name)
    if entry is None or not entry.laws:
        return (
            f"`{name}` obeys no law: set `laws=testing.<...>_LAWS` in tests/support/registry.py, "
            "with laws for its signature from src/detr_kd_losses/testing"
        )
    obeyed = {law for held in entry.held_to for law in entry.laws if law not in held.given_up}
    unheld = [law for law in entry.laws if law not in obeyed]
    if unheld:
        return f"`{name}` is never held to {unheld}: add a `HeldTo` to its `held_to` in tests/support/registry.py"
    return None


def missing_mutants(project: Project, name: str) -> str | None:
    function = getattr(project.package, name, None)
    if any(mutant.function is function for mutant in project.mutants):
        return None
    return f"nobody has broken `{name}`: add `faults(dkl.{name}, ...)` to tests/support/mutants/losses.py"


def missing_readme_row(project: Project, name: str) -> str | None:
    wanted = f"`{name}`", f"`{module_name(name)}`"
    rows = [line for line in project.readme.splitlines() if line.startswith("|")]
    if any(all(word in row for word in wanted) for row in rows):
        return None
    return f"no row of the table in README.md names {wanted[0]} and {wanted[1]}: add one under 'What is in it'"


def missing_docstring(project: Project, name: str) -> str | None:
    for documented in (name, module_name(name)):
        # Not that of a base class.
        if ">>>" not in (getattr(getattr(project.package, documented, None), "__doc__", None) or ""):
            return f"`{documented}` has no docstring with an example: write one, `>>> ...` under 'Examples:'"
    return None


OWED: dict[str, Callable[[Project, str], str | None]] = {
    "function": missing_function,
    "Module": missing_module,
    "term": missing_term,
    "case": missing_case,
    "oracle": missing_oracle,
    "laws": missing_laws,
    "mutants": missing_mutants,
    "README row": missing_readme_row,
    "docstring": missing_docstring,
}
