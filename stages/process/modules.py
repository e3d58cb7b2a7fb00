"""Find the source files of Python modules without executing them."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def source_of(module: str) -> Path | None:
    """The source file of a module; None if it has none."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None
    is_file = spec is not None and spec.origin is not None and spec.origin.endswith(".py") and Path(spec.origin).is_file()
    return Path(str(spec.origin)) if is_file and spec is not None else None
