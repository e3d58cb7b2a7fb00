"""The command for annotators: label."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stages.commands.errors import reports_errors
from stages.commands.options import Debug, Home, Json, home_folder, print_json

if TYPE_CHECKING:
    from rich.console import Console

    from stages.json_types import JsonObject

FORMATS = "argilla, label-studio, alpaca-eval, pandalm or csv"
LABEL_EXPORTS = f"Write tasks and answers as {FORMATS}, or as comparisons; do not serve the page."
LABEL_IMPORTS = f"Import answers from {FORMATS}; do not serve the page."


@reports_errors
def label(
    what: Annotated[str, typer.Argument(metavar="STEP_OR_FILE", help="RECIPE/STEP that waits for annotators, or a file of completions.")],
    annotator: Annotated[list[str] | None, typer.Option(help="Name of an annotator who gets a link; repeatable (default: you).")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="Port (default: the first free one from 8770).")] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on. Another one lets other machines connect, and needs a password.")
    ] = "127.0.0.1",
    show_report: Annotated[bool, typer.Option("--report", help="Print agreement, rate and bias; do not serve the page.")] = False,
    export: Annotated[tuple[str, Path] | None, typer.Option(metavar="FORMAT FILE", help=LABEL_EXPORTS)] = None,
    import_from: Annotated[tuple[str, Path] | None, typer.Option("--import", metavar="FORMAT FILE", help=LABEL_IMPORTS)] = None,
    questions: Annotated[Path | None, typer.Option(metavar="FILE", help="With a file: YAML with the questions.")] = None,
    instructions: Annotated[Path | None, typer.Option(metavar="FILE", help="With a file: Markdown for the annotators.")] = None,
    annotators: Annotated[int | None, typer.Option(min=1, help="With a file: people who rank each overlap task (default 2).")] = None,
    overlap: Annotated[
        float | None, typer.Option(min=0, max=1, help="With a file: share of overlap tasks, which several people rank (default 0.2).")
    ] = None,
    target: Annotated[int | None, typer.Option(min=1, help="With a file: number of tasks to rank (default: all).")] = None,
    gold: Annotated[Path | None, typer.Option(metavar="FILE", help="With a file: tasks with known ranks, to screen annotators.")] = None,
    home: Home = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Serve the page where people rank completions. Loads no model."""
    from stages.labelling import command

    if as_json and not show_report:
        raise typer.BadParameter("only the report is printed as JSON; add --report", param_hint="--json")
    given = {
        "questions": questions and str(questions),
        "instructions": instructions and str(instructions),
        "annotators": annotators,
        "overlap": overlap,
        "target": target,
        "gold": gold and str(gold),
    }
    settings: JsonObject = {name: value for name, value in given.items() if value is not None}
    folder = command.open_folder(what, home_folder(home), settings)
    if import_from is not None:
        from stages.labelling.exchange.files import import_answers

        typer.echo(import_answers(folder, *import_from))
    if export is not None:
        from stages.labelling.exchange.files import export_labels

        typer.echo(export_labels(folder, *export))
    if show_report:
        from stages.labelling.report import quality
        from stages.labelling.store import read_labels
        from stages.labelling.tables import report_tables

        content = quality(read_labels(folder))
        if as_json:
            print_json(content)
        else:
            _console().print(report_tables(content))
    if import_from or export or show_report:
        return
    password = None if command.is_loopback(host) else _password(command.PASSWORD_VARIABLE)
    names = command.annotator_names(annotator or [])
    command.serve(folder, names, host=host, port=port, password=password, console=_console())


def _console() -> Console:
    """A console for commands that load no model. Wide enough for tables if the output is a file."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 140, highlight=False)


def _password(variable: str) -> str | None:
    """The password of a page that other machines can reach: from the environment, else prompted; None without a terminal."""
    from stages.process.environment import secret_if_set

    if given := secret_if_set(variable):
        return given
    return typer.prompt("Password for the page", hide_input=True, confirmation_prompt=True) if sys.stdin.isatty() else None
