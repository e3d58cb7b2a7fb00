"""Writes the tree of ``stages/`` in docs/architecture.md from the first sentence of each module's docstring.

python docs/tree.py            # rewrites the tree
python docs/tree.py --check    # exit status 1 if the tree is not up to date (a test runs this)
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

from generated import write_or_check

REPOSITORY = Path(__file__).resolve().parents[1]
PAGE = REPOSITORY / "docs" / "architecture.md"
MOST = 120  # characters of a sentence
FENCE = re.compile(r"(```text\n)(stages/\n.*?)(```)", re.DOTALL)


def first_sentence(path: Path) -> str:
    """The first sentence of a module's docstring, without its full stop."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    sentence = re.split(r"(?<!et al)\.\s+(?=[A-Z])", " ".join(text.split("\n\n")[0].split()), maxsplit=1)[0].rstrip(".:")
    return sentence if len(sentence) <= MOST else f"{sentence[:MOST].rsplit(' ', 1)[0].rstrip(',;:')} ..."


def lines_of(folder: Path, depth: int) -> list[str]:
    """The lines of one folder: its files, then its folders; every folder has the sentence of its ``__init__``."""
    lines = []
    for path in sorted(folder.glob("*.py")):
        if path.name != "__init__.py":
            lines.append(f"{'  ' * depth}{path.name}: {first_sentence(path)}")
    for inner in sorted(path for path in folder.iterdir() if path.is_dir() and any(path.glob("*.py"))):
        start = inner / "__init__.py"
        lines.append(f"{'  ' * depth}{inner.name}/" + (f"  {first_sentence(start)}" if start.exists() else ""))
        lines += lines_of(inner, depth + 1)
    return lines


def tree() -> str:
    """The tree as text."""
    return "\n".join(["stages/", *lines_of(REPOSITORY / "stages", 1)]) + "\n"


if __name__ == "__main__":
    sys.exit(write_or_check(PAGE, FENCE, tree()))
