"""Configuration of the documentation. ``make docs`` builds it."""

import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS), str(DOCS.parent), str(DOCS.parent / "benchmarks")]

import generate  # noqa: E402 (the path above)

import sb3_pg  # noqa: E402

project = "sb3_pg"
author = "sb3_pg contributors"
project_copyright = "sb3_pg contributors, MIT license"
version = release = sb3_pg.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx-mathjax-offline",  # MathJax among the pages: they open without the network
]
exclude_patterns = ["_build", "_tables", "algorithms/template.md", "algorithms/texts"]

html_theme = "furo"
html_title = "sb3_pg"
html_static_path = ["_static"]
html_css_files = ["style.css"]
html_copy_source = False
html_show_sphinx = False

myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath", "fieldlist"]
myst_heading_anchors = 3
nb_execution_mode = "cache"
nb_execution_cache_path = str(DOCS / "_build" / ".notebooks")
nb_execution_timeout = 120
nb_execution_raise_on_error = True
nb_execution_show_tb = True

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the signature has them
autodoc_class_signature = "mixed"
autodoc_inherit_docstrings = False
toc_object_entries_show_parents = "hide"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True


def setup(app):  # type: ignore[no-untyped-def]  # Sphinx is not there when types are checked
    """Write the generated pages before Sphinx looks for pages."""
    app.connect("builder-inited", lambda _: generate.main())
