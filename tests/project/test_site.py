"""What the site has, without building it: every public name, every page, notebooks without outputs that still run."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from pathlib import Path

import pytest

import detr_kd_losses as dkl

from support.public_api import MODULES, NEEDS

ROOT = Path(__file__).parents[2]
REFERENCE = (ROOT / "docs/reference/api.md").read_text()
NOTEBOOKS = sorted((ROOT / "examples/notebooks").glob("*.ipynb"))


def cells(notebook, kind):
    return [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == kind]


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_is_in_the_reference(module):
    pytest.importorskip(NEEDS.get(module, module), reason=f"{module} needs an extra")
    names = importlib.import_module(module).__all__
    prefix = module.removeprefix("detr_kd_losses").removeprefix(".")
    listed = re.findall(r"^   ([\w.]+)$", REFERENCE, flags=re.MULTILINE) + re.findall(r"`([\w.]+)`", REFERENCE)
    assert not [name for name in names if f"{prefix}.{name}".removeprefix(".") not in listed]


def test_the_reference_lists_nothing_twice_and_nothing_unknown():
    listed = re.findall(r"^   ([\w.]+)$", REFERENCE, flags=re.MULTILINE)
    assert len(listed) == len(set(listed))
    for name in listed:
        module, _, attribute = f"detr_kd_losses.{name}".rpartition(".")
        if importlib.util.find_spec(NEEDS.get(module, module)) is None:
            continue  # in a lane without matplotlib
        assert hasattr(importlib.import_module(module), attribute), name


def test_the_citation_is_of_this_version():
    assert f"\nversion: {dkl.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_every_page_is_in_the_contents():
    listed = re.findall(r"^(?:[^|<>\n]+ <)?([\w./-]+)>?$", (ROOT / "docs/index.md").read_text(), flags=re.MULTILINE)
    known = {(ROOT / "docs" / entry).resolve() for entry in listed}
    pages = [
        *(page for page in ROOT.glob("docs/**/*.md") if page.name != "index.md"),
        *ROOT.glob("examples/**/README.md"),
        *NOTEBOOKS,
        *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")),
    ]
    assert not [page for page in pages if page.with_suffix("") not in known]


@pytest.mark.parametrize(
    "text",
    [
        '<script async src="https://cdn.example/mathjax.js"></script>',
        '<link rel="stylesheet" href="//fonts.example/css"/>',
        '<img alt="x" src="http://example.org/x.png">',
        "@font-face { src: url('https://fonts.example/x.woff2') }",
        '@import "https://fonts.example/x.css"',
    ],
)
def test_the_build_sees_what_a_page_loads(text):
    assert len(offline_check().loads(text)) == 1


def test_the_build_lets_links_be():
    text = (
        '<a href="https://arxiv.org"><img src="../x.png"></a> <math xmlns="http://www.w3.org/1998/Math/MathML"></math>'
    )
    assert offline_check().loads(text) == []


def offline_check():
    """The extension of the site that fails a build whose pages load something from the network."""
    spec = importlib.util.spec_from_file_location("offline", ROOT / "docs/offline.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert '"offline"' in (ROOT / "docs/conf.py").read_text()
    return module


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_keeps_no_output(notebook):
    for cell in cells(notebook, "code"):
        assert cell["outputs"] == []
        assert cell["execution_count"] is None


@pytest.mark.parametrize(
    "notebook", [book for book in NOTEBOOKS if book.stem != "distillation_in_miniature"], ids=lambda path: path.stem
)
def test_a_notebook_runs(notebook, monkeypatch):
    """The miniature, which takes a minute, runs when the site is built."""
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    pytest.importorskip("safetensors", reason="needs safetensors")
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.chdir(notebook.parent)
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "toy_detector"))
    namespace = {"__name__": "notebook"}
    for cell in cells(notebook, "code"):
        code = compile(ast.parse("".join(cell["source"])), str(notebook), "exec")
        if "raises-exception" in cell["metadata"].get("tags", []):
            with pytest.raises(
                (ValueError, AssertionError), match=r"`teacher.boxes` must have shape|law broken: no_pairs"
            ):
                exec(code, namespace)
        else:
            exec(code, namespace)
