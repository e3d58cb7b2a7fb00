"""Progress bars in a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from stages.errors import doing


class ProgressBar:
    """A rank-zero progress bar. Extra fields (reward, KL, speed) are shown after it."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task

    def advance(self, amount: float = 1, **fields: float | str) -> None:
        shown = "  ".join(f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in fields.items())
        self._progress.update(self._task, advance=amount, fields=shown)


@contextmanager
def progress_bar(console: Console, description: str, total: float) -> Iterator[ProgressBar]:
    """A progress bar over ``total`` units. Shown only in a terminal, not in a log file."""
    description_and_bar = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
    columns = [*description_and_bar, TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[fields]}")]
    disable = console.quiet or not console.is_terminal
    with doing(description), Progress(*columns, console=console, disable=disable, transient=False) as bar:
        yield ProgressBar(bar, bar.add_task(description, total=total, fields=""))
