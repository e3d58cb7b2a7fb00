"""Writes the tree of ``stages/`` in docs/architecture.md from the first sentence of each docstring: its packages and top modules.

python docs/tree.py            # rewrites the tree
python docs/tree.py --check    # exit status 1 if the tree is not up to date (a test runs this)
python docs/tree.py --modules  # prints the tree with every module
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


def lines_of(folder: Path, depth: int, *, modules: bool) -> list[str]:
    """The lines of one folder: its modules, then its packages. Modules of packages only with ``modules``."""
    lines = []
    for path in sorted(folder.glob("*.py")):
        if path.name != "__init__.py" and (modules or depth == 1):
            lines.append(f"{'  ' * depth}{path.name}: {first_sentence(path)}")
    for inner in sorted(path for path in folder.iterdir() if path.is_dir() and any(path.glob("*.py"))):
        start = inner / "__init__.py"
        lines.append(f"{'  ' * depth}{inner.name}/" + (f"  {first_sentence(start)}" if start.exists() else ""))
        lines += lines_of(inner, depth + 1, modules=modules)
    return lines


def tree(*, modules: bool = False) -> str:
    """The tree as text."""
    return "\n".join(["stages/", *lines_of(REPOSITORY / "stages", 1, modules=modules)]) + "\n"


if __name__ == "__main__":
    if "--modules" in sys.argv:
        sys.stdout.write(tree(modules=True))
    else:
        sys.exit(write_or_check(PAGE, FENCE, tree()))
