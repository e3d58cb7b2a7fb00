"""Settings of Sphinx, which builds the web pages of this documentation.

python -m sphinx -W docs build/docs        # needs the extra [docs]; the start page is build/docs/index.html
"""

from __future__ import annotations

import re

from sphinx.application import Sphinx

import stages

project = "Tristage"
author = "The Tristage contributors"
release = version = stages.__version__
language = "en"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
root_doc = "index"
exclude_patterns = ["_build"]

# Links to headings ("page.md#heading") work as they do on GitHub.
myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence"]

autodoc_typehints = "signature"
autodoc_member_order = "bysource"

html_theme = "furo"
html_title = f"Tristage {release}"

LINK = re.compile(r"^\| \[[^\]]+\]\((\w[\w-]*)\.md\)", re.MULTILINE)  # a row of the table of pages in index.md


def pages(index: str) -> list[str]:
    """Names of the pages in the table of ``index.md``, in its order, and the reference of the Python interface behind them."""
    return [*LINK.findall(index), "api"]


def add_navigation(app: Sphinx, page: str, source: list[str]) -> None:
    """Give the start page a hidden table of contents. It is made here, because GitHub would show it as a block of code."""
    if page == root_doc:
        source[0] += "\n\n```{toctree}\n:hidden:\n\n" + "\n".join(pages(source[0])) + "\n```\n"


def setup(app: Sphinx) -> None:
    app.connect("source-read", add_navigation)
