"""Writes the table of docs/metrics.md from the meanings in stages/metric_names.py.

python docs/metrics.py            # rewrites the table
python docs/metrics.py --check    # exit status 1 if the table is not up to date (a test runs this)
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from generated import write_or_check

REPOSITORY = Path(__file__).resolve().parents[1]
PAGE = REPOSITORY / "docs" / "metrics.md"
TABLE = re.compile(r"(<!-- metrics -->\n\n)(.*?)(\n<!-- end -->)", re.DOTALL)


def table() -> str:
    """The table as Markdown."""
    sys.path.insert(0, str(REPOSITORY))
    from stages.metric_names import MEANINGS

    rows = [f"| `{metric}` | {meaning.replace('|', chr(92) + '|')} |" for metric, meaning in MEANINGS.items()]
    return "\n".join(["| metric | meaning |", "|---|---|", *rows]) + "\n"


if __name__ == "__main__":
    sys.exit(write_or_check(PAGE, TABLE, table()))
