"""Wait for annotators: publish the tasks, let people or simulated annotators answer, continue after the target is reached."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING

from stages.corpora.labels import ANSWERS, GOLD, latest, read_answers, read_tasks
from stages.errors import Waiting
from stages.labelling.config import People
from stages.labelling.publishing import publish_settings, read_settings
from stages.labelling.report import quality
from stages.labelling.store import read_labels
from stages.process.environment import continue_command, default_home
from stages.process.storage import point_to, write_json

if TYPE_CHECKING:
    from stages.labelling.report import Quality
    from stages.step import StepContext

POLL_SECONDS = 2.0
QUALITY = "labels.json"  # in the step's run folder: the report of the labels that it used
WAITING = "waiting.txt"  # in the step's checkpoint folder: why the step is not finished; for `stages plan`


def home_of(context: StepContext) -> Path:
    """The folder that contains the registry and all other outputs."""
    return context.registry.root.parent


def ask_people(folder: Path, people: People, context: StepContext) -> None:
    """Publish the tasks of ``folder`` and wait until the target is reached. Raises Waiting if people have to answer first.

    Call this on every process; rank zero reads and writes the files. With ``--wait``, it does not raise Waiting, and blocks until the
    target is reached.
    """
    runtime = context.runtime

    def publish() -> None:
        publish_settings(folder, context.name, context.seed, people)
        point_to(folder.parent / "latest", folder.name)
        if people.simulate is not None and num_ranked(folder) < read_settings(folder).target:
            from stages.labelling.simulated import simulate

            made = simulate(folder, people)
            runtime.console.print(f"{context.name}: simulated people gave {made} answers")

    runtime.decide(publish)
    is_announced = False
    while True:
        ranked, target = runtime.decide(lambda: (num_ranked(folder), read_settings(folder).target))
        if ranked >= target:
            if runtime.is_main:
                (context.checkpoint_folder / WAITING).unlink(missing_ok=True)
            return
        text = f"{context.name}: {ranked} of {target} tasks are ranked. Rank them with: {command(context)}"
        if not runtime.waits_for_people:
            if runtime.is_main:
                context.checkpoint_folder.mkdir(parents=True, exist_ok=True)
                (context.checkpoint_folder / WAITING).write_text(f"{ranked} of {target} tasks are ranked", encoding="utf-8")

            raise Waiting(f"{text}\nThen continue with: {continue_command()}   (or wait here with --wait)")
        if not is_announced:
            runtime.console.print(f"{text} (waiting)", soft_wrap=True)
            is_announced = True
        time.sleep(POLL_SECONDS)


def keep_quality(folder: Path, path: Path) -> Quality:
    """Compute the report of a folder's labels, write it to ``path`` as JSON, and return it."""
    content = quality(read_labels(folder))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, content)
    return content


def num_ranked(folder: Path) -> int:
    """Number of tasks in a folder with at least one ranking. Screening tasks do not count."""
    gold = set(read_tasks(folder / GOLD)) if (folder / GOLD).exists() else set()
    return len({answer.task for _, answer in latest(read_answers(folder / ANSWERS)) if answer.is_used} - gold)


def command(context: StepContext) -> str:
    """The shell command that people type to rank the tasks of a step."""
    home = home_of(context)
    where = [] if home == default_home().absolute() else ["--home", str(home)]
    return shlex.join(["stages", "label", context.name, *where])
