"""Every public loss has all that a loss owes; and whoever forgets a part is told which, and where to add it."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

import detr_kd_losses as dkl

from support import oracles
from support.completeness import OWED, Project, function_name, module_name, public_losses
from support.mutants import MUTANTS
from support.registry import LOSSES, Loss

README = (Path(__file__).parents[2] / "README.md").read_text()
PROJECT = Project(dkl, oracles, LOSSES, MUTANTS, README)


@pytest.mark.parametrize("owed", OWED)
@pytest.mark.parametrize("name", public_losses(dkl))
def test_a_loss_has(name, owed):
    if missing := OWED[owed](PROJECT, name):
        pytest.fail(missing, pytrace=False)


def test_only_public_losses_are_registered():
    assert sorted(LOSSES) == public_losses(dkl)
    assert all(name == loss.function.__name__ for name, loss in LOSSES.items())


@pytest.mark.parametrize("name", public_losses(dkl))
def test_a_module_is_named_after_its_function(name):
    assert function_name(module_name(name)) == name


# That the tests above fail where they should: a package with one loss more, which lacks one thing after another.


def half_loss(student_logits):
    """Half of a loss.

    Examples:
        >>> half_loss(None)
    """


class HalfLoss(dkl.DetectionLoss):
    """Half of a loss.

    Examples:
        >>> loss = HalfLoss()
    """


def with_half_a_loss(**changes):
    """The project with `half_loss`, exported as function and Module, and nothing else; or with these changes."""
    package = {"half_loss": half_loss, "HalfLoss": HalfLoss}
    exported = {**{name: getattr(dkl, name) for name in dkl.__all__}, **package, **changes.pop("package", {})}
    fake = SimpleNamespace(**exported, __all__=sorted(name for name, value in exported.items() if value is not None))
    return PROJECT._replace(package=fake)._replace(**changes)


def messages(project):
    return {owed: message for owed, missing in OWED.items() if (message := missing(project, "half_loss"))}


def test_an_exported_loss_is_asked_for_all_the_rest():
    assert public_losses(with_half_a_loss().package) == sorted([*public_losses(dkl), "half_loss"])
    assert messages(with_half_a_loss()) == {
        "Module": "`half_loss` is tested without its Module: set `module=dkl.HalfLoss` in tests/support/registry.py",
        "term": "`half_loss` has no term: write one in src/detr_kd_losses/terms, export it, and set `term=` in "
        "tests/support/registry.py (or a string that says why there is none)",
        "case": "`half_loss` is not registered: add `Loss(dkl.half_loss, ...)` to LOSSES in tests/support/registry.py",
        "oracle": "`half_loss` has no oracle: write `half_loss` in plain loops in tests/support/oracles/losses.py and "
        "name it in `__all__` there",
        "laws": "`half_loss` obeys no law: set `laws=testing.<...>_LAWS` in tests/support/registry.py, with laws for "
        "its signature from src/detr_kd_losses/testing",
        "mutants": "nobody has broken `half_loss`: add `faults(dkl.half_loss, ...)` to tests/support/mutants/losses.py",
        "README row": "no row of the table in README.md names `half_loss` and `HalfLoss`: add one under "
        "'What is in it'",
    }


DETECTION = LOSSES["detection_loss"]
ENTRY = Loss(
    half_loss,
    HalfLoss,
    "it is half a loss",
    {},
    DETECTION.wrt,
    DETECTION.trials,
    DETECTION.laws,
    DETECTION.held_to,
)
COMPLETE = {
    "registry": {**LOSSES, "half_loss": ENTRY},
    "oracles": SimpleNamespace(half_loss=lambda student_logits: 0.0),
    "mutants": [SimpleNamespace(function=half_loss)],
    "readme": "| halves | `half_loss` | `HalfLoss` |",
}


def test_a_complete_loss_is_asked_for_nothing():
    assert messages(with_half_a_loss(**COMPLETE)) == {}


def registered(**changes):
    """The registry with an entry of which these fields are others."""
    return {"registry": {**LOSSES, "half_loss": Loss(**{**vars(ENTRY), **changes})}}


@pytest.mark.parametrize(
    ("changes", "owed", "message"),
    [
        ({"package": {"half_loss": None}}, "function", "export `half_loss` in src/detr_kd_losses/__init__.py"),
        ({"package": {"HalfLoss": None}}, "Module", "`half_loss` has no Module: write `HalfLoss`"),
        ({"package": {"HalfLoss": half_loss}}, "Module", "`half_loss` has no Module: write `HalfLoss`"),
        (registered(module=None), "Module", "set `module=dkl.HalfLoss` in tests/support/registry.py"),
        (registered(module=dkl.DetectionLoss), "Module", "set `module=dkl.HalfLoss`"),
        (registered(term=None), "term", "`half_loss` has no term: write one in src/detr_kd_losses/terms"),
        (registered(term=ENTRY.function.__class__), "term", "`half_loss` has no term"),
        (
            registered(term=dkl.LogitsTerm),
            "term",
            r"`LogitsTerm` has options without a test: give \['weight', 'prefix'",
        ),
        (registered(trials={}), "case", "`half_loss` has no case: give its entry .* `trials` and `wrt`"),
        (registered(wrt=()), "case", "`half_loss` has no case"),
        (registered(function=dkl.detection_loss), "case", "`half_loss` is not registered"),
        ({"oracles": oracles}, "oracle", "write `half_loss` in plain loops"),
        (registered(laws={}), "laws", "`half_loss` obeys no law: set `laws=testing.*_LAWS`"),
        (registered(held_to=()), "laws", "`half_loss` is never held to .*'finite'.*: add a `HeldTo`"),
        (
            registered(held_to=[held._replace(given_up=("finite",)) for held in DETECTION.held_to]),
            "laws",
            r"`half_loss` is never held to \['finite'\]",
        ),
        ({"mutants": MUTANTS}, "mutants", r"add `faults\(dkl.half_loss, ...\)`"),
        ({"readme": README}, "README row", "names `half_loss` and `HalfLoss`"),
        ({"readme": "| halves | `half_loss` | |\n| other | | `HalfLoss` |"}, "README row", "names `half_loss`"),
        ({"readme": "`half_loss` has the Module `HalfLoss`."}, "README row", "no row of the table"),
        ({"package": {"half_loss": lambda: 0}}, "docstring", "`half_loss` has no docstring with an example"),
        ({"package": {"HalfLoss": type("HalfLoss", (HalfLoss,), {})}}, "docstring", "`HalfLoss` has no docstring"),
    ],
)
def test_what_is_forgotten_is_named(changes, owed, message):
    assert OWED[owed](with_half_a_loss(**COMPLETE), "half_loss") is None
    missing = OWED[owed](with_half_a_loss(**{**COMPLETE, **changes}), "half_loss")
    assert missing is not None
    assert re.search(message, missing), missing
