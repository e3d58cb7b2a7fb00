"""The program ``stages``: its commands, whose code is in ``commands/``.

stages run RECIPE [step.field=value ...]      stages plan RECIPE
stages sweep RECIPE step.field=[value,value] [seeds=3]
stages models list | show | lineage | verify | export | import | push | pull | remove
stages generate REF --prompt TEXT [--against REF2]      stages chat REF
stages label STEP_OR_FILE [--annotator NAME] [--report]
stages report RUN [RUN2 ...]      stages serve REF      stages conformance
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from stages import __version__
from stages.commands.errors import reports_errors
from stages.commands.inference import chat, generate, serve
from stages.commands.labelling import label
from stages.commands.models import export, import_command, lineage, list_models, pull, push, remove, show, verify
from stages.commands.options import Debug, Json, make_runtime, print_json
from stages.commands.recipes import plan, report, run, sweep

app = typer.Typer(
    name="stages",
    help="Chains of training stages: from raw text to an aligned language model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
models = typer.Typer(help="List, show, export, import, share and remove models.", no_args_is_help=True, rich_markup_mode=None)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tristage {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")] = False,
) -> None:
    """Chains of training stages: from raw text to an aligned language model."""
    from stages.process.environment import protect_secrets
    from stages.process.threads import set_up_threads

    protect_secrets()
    set_up_threads()  # before torch is imported
    # A recipe may name functions (package.module:function) in the current folder. Unlike `python -m`, the `stages` script does not search
    # it. It is added last, so that a local file cannot replace an installed package.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


@reports_errors
def conformance(as_json: Json = False, debug: Debug = False) -> None:
    """List the details of the papers with their code and tests."""
    from dataclasses import asdict

    from stages.conformance import DETAILS, conformance_table

    if as_json:
        print_json([asdict(detail) for detail in DETAILS])
    else:
        make_runtime().console.print(conformance_table())


on_models: dict[str, Callable[..., None]] = {
    "list": list_models,
    "show": show,
    "lineage": lineage,
    "verify": verify,
    "export": export,
    "import": import_command,
    "push": push,
    "pull": pull,
    "remove": remove,
}
for command in (run, plan, conformance, sweep, generate, serve, chat, label, report):
    app.command()(command)
for name, function in on_models.items():
    models.command(name)(function)
app.add_typer(models, name="models")


def main() -> None:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a locale without UTF-8: \u2603 is shown instead of an error for a character it lacks
            stream.reconfigure(errors="backslashreplace")
    app()
