"""The ``stages label`` command: find the tasks, print the links, and serve the pages until the user stops the server."""

from __future__ import annotations

import getpass
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.console import Console

from stages.errors import DataError, LaunchError
from stages.json_types import JsonObject
from stages.labelling.access import Access, check_annotator, is_loopback, link
from stages.labelling.config import People
from stages.labelling.publishing import find_folder, known_steps, publish_file
from stages.labelling.store import Store

PASSWORD_VARIABLE = "STAGES_LABEL_PASSWORD"


def open_folder(what: str, home: Path, settings: JsonObject) -> Path:
    """The labelling folder of a step or a file. ``settings`` are the command-line options for a file.

    Raises DataError if nothing matches ``what`` (the message lists the known steps), or if options are given for the tasks of a step.
    """
    folder = find_folder(what, home)
    if folder is not None:
        if settings:
            raise DataError(f"{what}: the recipe defines the questions of these tasks. Change it, or name a file of completions")
        return folder
    path = Path(what)
    if path.is_file():
        return publish_file(path, home, People.model_validate(settings), settings)
    steps = ", ".join(known_steps(home)) or "none"
    raise DataError(
        f"{what!r} is neither a step that waits for people, nor a labelling folder, nor a file. Steps with tasks under {home}: {steps}. "
        "Run the recipe first, or name a file with prompt + completions"
    )


def annotator_names(given: Sequence[str]) -> list[str]:
    """Names of the annotators that get a link: the given names, or the user of this machine if none are given."""
    if given:
        return [check_annotator(name) for name in dict.fromkeys(given)]
    try:
        return [check_annotator(getpass.getuser())]
    except (OSError, KeyError, DataError):
        return ["annotator-1"]


def serve(folder: Path, annotators: Sequence[str], *, host: str, port: int | None, password: str | None, console: Console) -> None:
    """Serve a folder until SIGTERM or Ctrl-C.

    Raises LaunchError if the address is not available, or if other machines can reach it and no password is set. Raises DataError if
    another server serves the folder.
    """
    from stages.labelling.server import LabelServer, base_url, listen, make_server

    if not is_loopback(host) and password is None:
        raise LaunchError(f"--host {host} lets other machines connect, but no password is set. Export {PASSWORD_VARIABLE}")
    store = Store(folder)
    try:
        access = Access.of(folder, password)
        bound = listen(host, port)
        base = base_url(bound, host)
        settings = store.settings
        console.print(
            f"{settings.name}: {store.num_ranked()} of {settings.target} tasks are ranked. Answers: {folder / 'answers.jsonl'}",
            soft_wrap=True,
        )
        if store.cut_off:
            console.print(
                f"A crash cut off the last line of the answers, which was never acknowledged. {store.cut_off} bytes were removed."
            )
        if not is_loopback(host):
            console.print(
                "Other machines can reach this server, and the connection is not encrypted. Use it in a network that you trust, or behind "
                "a proxy with TLS.",
                style="yellow",
            )
        for name in annotators:
            console.print(f"  {name}: {link(base, access, name)}", soft_wrap=True, markup=False)
        console.print(f"  progress: {link(base, access, None)}", soft_wrap=True, markup=False)
        console.print(
            "Anyone who has a link can answer under its name. Ctrl-C stops the server; all answers are already on disk.", soft_wrap=True
        )
        say = partial(console.print, soft_wrap=True, markup=False)
        make_server(LabelServer(store, access, base, say=say)).run(sockets=[bound])
    finally:
        store.close()
