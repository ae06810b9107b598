"""What the public interface promises as a whole: names, signatures, docstrings, a light import."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import detr_kd_losses as dkl

from support.public_api import MODULES, NEEDS, listing
from support.registry import LOSSES

# Keyword arguments of the functions that are data, not options: the forward of the Module takes them.
DATA = {"teacher_positive", "teacher_weight", "weight", "padding_mask", "query_mask", "boxes"}
DATA |= {f"{model}_{what}" for model in ("student", "teacher") for what in ("bins", "scale")}
# What a Module owns beyond the options of its function.
OWNED = {"student_channels", "teacher_channels"}


def parameters(function, kind):
    return {name: p for name, p in inspect.signature(function).parameters.items() if p.kind is kind and name != "self"}


def test_all_is_sorted_and_complete():
    assert dkl.__all__ == sorted(dkl.__all__)
    public = {name for name, value in vars(dkl).items() if not name.startswith("_") and not inspect.ismodule(value)}
    assert public == set(dkl.__all__)


SECTIONS = (Path(__file__).with_name("public_api.txt")).read_text().rstrip("\n").split("\n\n")


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.splitlines()[0])
def test_names_signatures_and_defaults_are_those_that_are_listed(section):
    title, *expected = section.splitlines()
    module = title.removeprefix("# ")
    pytest.importorskip(NEEDS.get(module, module), reason=f"{module} needs an extra")
    assert listing(module) == expected, "a change that is meant: PYTHONPATH=src:tests python -m support.public_api"


def test_every_public_module_is_listed():
    assert [section.splitlines()[0].removeprefix("# ") for section in SECTIONS] == list(MODULES)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_function_and_module_have_the_same_options_and_defaults(loss):
    function, module = loss.function, loss.module
    keyword = inspect.Parameter.KEYWORD_ONLY
    options = {name: (p.default, p.annotation) for name, p in parameters(function, keyword).items() if name not in DATA}
    of_module = {name: (p.default, p.annotation) for name, p in inspect.signature(module).parameters.items()}
    assert options == {name: value for name, value in of_module.items() if name not in OWNED}
    tensors = inspect.Parameter.POSITIONAL_OR_KEYWORD
    assert list(parameters(function, tensors)) == list(parameters(module.forward, tensors))
    assert set(parameters(module.forward, keyword)) == set(parameters(function, keyword)) & DATA


@pytest.mark.parametrize("name", [n for n in dkl.__all__ if inspect.isroutine(getattr(dkl, n))])
def test_every_option_is_keyword_only(name):
    for option in inspect.signature(getattr(dkl, name)).parameters.values():
        if option.default is not inspect.Parameter.empty:
            assert option.kind is inspect.Parameter.KEYWORD_ONLY, option


@pytest.mark.parametrize("name", dkl.__all__)
def test_every_public_name_is_documented_with_an_example(name):
    documented = getattr(dkl, name)
    text = inspect.getdoc(documented)
    assert ">>>" in text
    if inspect.isroutine(documented):
        assert "Args:" in text
        assert "Returns:" in text or name.startswith("check_")
        for argument in inspect.signature(documented).parameters:
            assert f"{argument}:" in text, argument


def test_import_is_light():
    """A tenth of a second after torch; SciPy's solver alone would take four."""
    heavy = {"scipy", "triton", "matplotlib", "hypothesis", "transformers", "lap", "pytest", "torch._dynamo"}
    code = f"""if True:
        import sys, torch
        before = set(sys.modules)
        import detr_kd_losses
        print({heavy} & (set(sys.modules) - before))
    """
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert printed.strip() == "set()"


def test_a_step_loads_no_compiler():
    """PyTorch's takes about a second and 70 MB, which a notebook would wait for at the first match."""
    code = """if True:
        import sys, torch, detr_kd_losses as dkl
        logits, boxes = torch.randn(2, 1, 5, 3, requires_grad=True), torch.rand(2, 1, 5, 4)
        student, teacher = dkl.DetectorOutput(logits, boxes), dkl.DetectorOutput(logits.flip(0), boxes.flip(0))
        labels, mask = torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2, dtype=torch.bool)
        targets = dkl.Targets(labels, torch.rand(1, 2, 4), mask)
        sum(dkl.DETRDistillationLoss()(student, teacher, targets).values()).backward()
        print("torch._dynamo" in sys.modules)
    """
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout.split() == [b"False"]


@pytest.mark.parametrize("name", [module.name for module in pkgutil.walk_packages(dkl.__path__, "detr_kd_losses.")])
def test_every_module_can_be_imported_and_says_what_it_is(name):
    try:
        assert importlib.import_module(name).__doc__
    except ModuleNotFoundError as error:
        if error.name not in {"triton", "matplotlib"}:
            raise
        pytest.skip(f"{error.name} is not installed")
