"""The paths of the files that ship with Tristage besides the code: ``data/`` and ``recipes/``."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


def shipped_folder(name: str) -> Path:
    """The folder ``data`` or ``recipes``: next to ``stages/`` in a checkout, inside the package in an installed wheel."""
    installed = PACKAGE / "shipped_files" / name
    return installed if installed.is_dir() else PACKAGE.parent / name


def shipped_recipes() -> dict[str, Path]:
    """The shipped recipes by name."""
    return {path.stem: path for path in sorted(shipped_folder("recipes").glob("*.yaml"))}
