"""The Markdown pages: their Python code runs, their links lead somewhere, the tests they name exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WITH_CODE = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")])
PAGES = sorted([*WITH_CODE, *ROOT.glob("examples/**/*.md")])


def name_of(page):
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", WITH_CODE, ids=name_of)
def test_code_runs(page):
    """All blocks of a page, one after the other, in one namespace."""
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    exec(compile("\n".join(blocks), str(page), "exec"), {"__name__": "page"})


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        if not target.startswith(("http:", "https:", "mailto:")):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_named_tests_exist(page):
    """A page that says `tests/x.py::test_y` pins a statement: the test must be there."""
    for path, name in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", page.read_text()):
        assert (ROOT / path).exists(), path
        if name:
            assert re.search(rf"^\s*(?:def|class) {name}\b", (ROOT / path).read_text(), flags=re.MULTILINE), (
                f"{path}::{name}"
            )


def test_matching_page_is_that_of_the_results():
    """The page is generated: `python examples/benchmarks/matching_page.py`."""
    benchmarks = ROOT / "examples" / "benchmarks"
    code = "import matching_page as m; import sys; sys.exit(m.page() != m.PAGE.read_text())"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=benchmarks)
