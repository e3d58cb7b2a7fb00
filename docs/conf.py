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
html_static_path = ["static"]
html_css_files = ["wide.css"]
html_title = f"Tristage {release}"
html_show_copyright = False  # the licence is Apache-2.0; see LICENSE

HEADING = re.compile(r"^## (.+)$", re.MULTILINE)
LINK = re.compile(r"^\| \[[^\]]+\]\((\w[\w-]*)\.md\)", re.MULTILINE)  # a row of a table of pages in index.md


def navigation(index: str) -> dict[str, list[str]]:
    """Heading -> names of the pages in its table, in the order of ``index.md``. The reference of the Python interface comes last."""
    _, *parts = HEADING.split(index)
    groups = {heading: LINK.findall(table) for heading, table in zip(parts[::2], parts[1::2], strict=True)}
    groups[parts[-2]].append("api")
    return groups


def add_navigation(app: Sphinx, page: str, source: list[str]) -> None:
    """Give the start page hidden tables of contents. They are made here, because GitHub would show them as blocks of code."""
    if page == root_doc:
        for heading, pages in navigation(source[0]).items():
            source[0] += f"\n\n```{{toctree}}\n:hidden:\n:caption: {heading}\n\n" + "\n".join(pages) + "\n```\n"


def setup(app: Sphinx) -> None:
    app.connect("source-read", add_navigation)
