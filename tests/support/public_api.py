"""Every public name with its signature and defaults: what a user's code may rest on.

PYTHONPATH=src:tests python -m support.public_api > tests/project/public_api.txt   # after a change that is meant
"""

from __future__ import annotations

import enum
import importlib
import inspect
import re
from collections.abc import Iterator
from types import ModuleType

MODULES = (
    "detr_kd_losses",
    "detr_kd_losses.assignment",
    "detr_kd_losses.losses.features",
    "detr_kd_losses.plotting",
    "detr_kd_losses.taps",
    "detr_kd_losses.testing",
)

# A module whose import failed may stay, half made, among those that are loaded: ask for what it needs.
NEEDS = {"detr_kd_losses.plotting": "matplotlib", "detr_kd_losses.testing": "hypothesis"}


def listing(module: str) -> list[str]:
    """One line for each name of a module, and for each public method of a class, also one that it inherits."""
    return list(_lines(importlib.import_module(module)))


def _lines(module: ModuleType) -> Iterator[str]:
    for name in sorted(module.__all__):
        value = getattr(module, name)
        yield f"{name}{_signature(value)}"
        if inspect.isclass(value):
            own = [base for base in value.__mro__ if base.__module__.partition(".")[0] == "detr_kd_losses"]
            for method in sorted({method for base in own for method in vars(base)}):
                if not method.startswith("_") and callable(getattr(value, method)):
                    yield f"{name}.{method}{_signature(getattr(value, method))}"


def _signature(value: object) -> str:
    if not callable(value) or (inspect.isclass(value) and issubclass(value, enum.Enum)):
        return f": {type(value).__name__}"
    parameters = inspect.signature(value).parameters.values()
    # Annotations are mypy's to hold; their text differs between Pythons.
    bare = [one.replace(annotation=one.empty) for one in parameters]
    return re.sub(r"<function (\w+) at \w+>", r"\1", str(inspect.Signature(bare)))


if __name__ == "__main__":
    print("\n\n".join("\n".join([f"# {module}", *listing(module)]) for module in MODULES))  # noqa: T201
