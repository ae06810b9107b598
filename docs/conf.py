"""The site: every page of the repository, and a reference made of the docstrings.

    make docs     # builds build/site; a warning is an error, and every notebook runs

The root of the repository is the source folder, so that a page has the same links here and in the repository.
"""

import detr_kd_losses

project = "detr_kd_losses"
author = "The detr_kd_losses developers"
copyright = author  # Sphinx's name for it
version = release = detr_kd_losses.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.mathjax", "sphinx.ext.napoleon"]
root_doc = "docs/index"
include_patterns = [
    "docs/**",
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "examples/**/README.md",
    "examples/notebooks/*",
]
exclude_patterns = ["docs/templates/**"]
templates_path = ["templates"]
suppress_warnings = ["myst.header"]  # the changelog repeats its headings

html_theme = "furo"
html_title = f"detr_kd_losses {release}"
html_static_path: list[str] = []
html_copy_source = False

myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 240
nb_merge_streams = True

autosummary_generate = True
autodoc_typehints = "none"  # signatures and Args say it
autodoc_member_order = "bysource"
napoleon_use_rtype = False
napoleon_preprocess_types = False
add_module_names = False
