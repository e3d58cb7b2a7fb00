"""Generated parts of the pages: write a part into its page, or check that it is up to date."""

from __future__ import annotations

import re
import sys
from pathlib import Path


def write_or_check(page: Path, part: re.Pattern[str], made: str) -> int:
    """Replace the second group of ``part`` in ``page`` by ``made``; with ``--check``, only compare. Returns the exit status."""
    text = page.read_text(encoding="utf-8")
    new = part.sub(lambda match: match[1] + made + match[3], text)
    if "--check" in sys.argv:
        return int(new != text)
    page.write_text(new, encoding="utf-8")
    return 0
