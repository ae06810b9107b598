"""The site: every page of the repository, and a reference made of the docstrings.

    make docs     # builds build/site; a warning is an error, and every notebook runs

The root of the repository is the source folder, so that a page has the same links here and in the repository.
"""

import sys
from importlib.resources import files
from pathlib import Path

from docutils import nodes
from latex2mathml.converter import convert

import detr_kd_losses

project = "detr_kd_losses"
author = "The detr_kd_losses developers"
copyright = author  # Sphinx's name for it
version = release = detr_kd_losses.__version__

sys.path.append(str(Path(__file__).parent))  # for the extension `offline`
extensions = [
    "matplotlib.sphinxext.plot_directive",
    "myst_nb",
    "offline",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
root_doc = "docs/index"
include_patterns = [
    "docs/**",
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "examples/README.md",
    "examples/**/README.md",
    "examples/notebooks/*",
]
exclude_patterns = ["docs/templates/**"]
templates_path = [str(Path(__file__).parent / "templates")]  # absolute: autosummary looks in the source folder
suppress_warnings = ["myst.header"]  # the changelog repeats its headings

html_theme = "furo"
html_title = f"detr_kd_losses {release}"
html_static_path = ["static", str(files("ziamath") / "fonts/STIXTwoMath-Regular.ttf")]
html_css_files = ["formulas.css"]
html_copy_source = False
html_math_renderer = "mathml"

myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 240
nb_merge_streams = True

plot_formats = [("png", 110)]
plot_html_show_formats = plot_html_show_source_link = False
plot_include_source = True

autosummary_generate = True
autodoc_typehints = "none"  # signatures and Args say it
autodoc_member_order = "bysource"
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_preprocess_types = False
add_module_names = False


def mathml(node, display):
    """Convert a formula to MathML, which browsers draw themselves: no script, nothing from the network."""
    bar = 'stretchy="false">&#x0007C;<'  # is a bracket here, and no relation with space around it
    return convert(node.astext(), display=display).replace(bar, f'lspace="0" rspace="0" {bar}')


def draw_inline(translator, node):
    """Write a formula in a sentence."""
    translator.body.append(mathml(node, "inline"))
    raise nodes.SkipNode


def draw_block(translator, node):
    """Write a formula of its own line, which scrolls where it is too long."""
    translator.body.append(f'<div class="math">{mathml(node, "block")}</div>')
    raise nodes.SkipNode


def skip_fields(_app, _what, _name, member, *_):
    """Leave out what a named tuple says of its fields: the docstring of the class says more."""
    return True if type(member).__name__ == "_tuplegetter" else None


def setup(app):
    """Tell Sphinx of the functions above."""
    app.connect("autodoc-skip-member", skip_fields)
    app.add_html_math_renderer("mathml", (draw_inline, None), (draw_block, None))
