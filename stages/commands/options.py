"""Arguments and options that several commands share, and what commands make of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from stages.process.runtime import Runtime
    from stages.registry.ledger import Registry

Recipe = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file (YAML), or the name of an included recipe, e.g. quickstart.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[STEP.FIELD=VALUE]...", help="Overrides, e.g. sft.training.epochs=2 seed=8.")
]
Home = Annotated[Path | None, typer.Option(help="Folder for all results (default: STAGES_HOME, else outputs).")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of errors.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
All = Annotated[bool, typer.Option("--all", help="Show all details, including digests and defaults.")]
Ref = Annotated[
    str, typer.Argument(metavar="REF", help="A model of the registry: NAME (its newest version), NAME@3, or sha256:<first digits>.")
]
AnyModel = Annotated[str, typer.Argument(metavar="REF", help="A model: registry reference, folder or Hub id.")]


def home_path(home: Path | None) -> Path:
    from stages.process.environment import default_home

    return (home or default_home()).absolute()


def home_folder(home: Path | None) -> Path:
    """The folder for all results. Raises StorageError if it cannot be a folder."""
    from stages.process.storage import check_home

    path = home_path(home)
    check_home(path)
    return path


def registry_in(home: Path | None) -> Registry:
    from stages.registry.ledger import Registry

    return Registry(home_folder(home) / "registry")


def make_runtime() -> Runtime:
    from stages.process.runtime import Runtime

    return Runtime()


def print_json(content: object) -> None:
    typer.echo(json.dumps(content, indent=2, ensure_ascii=False))
