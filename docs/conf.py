"""Sphinx configuration."""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import favorsharp

project = "favorsharp"
author = "The favorsharp developers"
copyright = "2026, the favorsharp developers"
version = release = favorsharp.__version__

extensions = [
    "myst_parser",
    "numpydoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.doctest",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "sphinx-mathjax-offline",
    "sphinx_design",
    "sphinx_gallery.gen_gallery",
]
myst_enable_extensions = ["amsmath", "colon_fence", "dollarmath"]
myst_heading_anchors = 3
autosummary_generate = True
numpydoc_show_class_members = False
numpydoc_class_members_toctree = False
exclude_patterns = ["_build", "**/GALLERY_HEADER.rst", "gallery/*.py", "paper/_*.md"]
suppress_warnings = ["config.cache"]  # the gallery's settings hold functions

html_theme = "pydata_sphinx_theme"
html_title = "favorsharp"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
templates_path = ["_templates"]
html_sidebars = {"*": []}  # pages that stand alone have no section to show
html_theme_options = {
    "show_prev_next": False,
    "secondary_sidebar_items": ["page-toc"],
    "navigation_with_keys": False,
    "header_links_before_dropdown": 6,  # more would take two lines of a small screen
}

sphinx_gallery_conf = {
    "examples_dirs": "gallery",
    "gallery_dirs": "auto_gallery",
    "filename_pattern": r"/plot_",
    "download_all_examples": False,
    "show_memory": False,
    "write_computation_times": False,  # its page loads scripts from other sites
    "abort_on_example_error": True,
}


def _escape_mathematics(app, what, name, obj, options, lines):
    """Docstrings write shapes as (*b, n, d), which is no emphasis, and norms as |x|, which are no substitutions."""
    for index, line in enumerate(lines):
        line = re.sub(r":ref:`([^`<]*?)(?: <[^>]*>)?`", r"\1", line)  # of inherited docstrings, to another site
        line = line.replace("(*b", r"(\*b").replace(" *b", r" \*b")
        lines[index] = line if "`" in line else line.replace("|", r"\|")


def setup(app):
    """Connect what the docstrings need; after numpydoc, which has a priority of 500."""
    app.connect("autodoc-process-docstring", _escape_mathematics, priority=900)
