"""What a step shows in the terminal besides its results: progress bars, and announcements from code deep inside it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from stages.errors import doing

WIDE = 80  # columns of a terminal that shows a bar


class ProgressBar:
    """A rank-zero progress bar. Extra fields (reward, KL, speed) are shown after it."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task

    def advance(self, amount: float = 1, **fields: float | str) -> None:
        shown = "  ".join(f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in fields.items())
        self._progress.update(self._task, advance=amount, fields=shown)


class _CutText(TextColumn):
    """A text that is cut if the columns do not fit. Rich narrows columns that may wrap before the others."""

    def __init__(self, text: str) -> None:
        super().__init__(text, table_column=Column(overflow="ellipsis"))

    def render(self, task: Task) -> Text:
        """The text, on one line."""
        made = super().render(task)
        made.no_wrap, made.overflow = True, "ellipsis"
        return made


@contextmanager
def progress_bar(console: Console, description: str, total: float) -> Iterator[ProgressBar]:
    """A progress bar over ``total`` units. Shown only in a terminal, not in a log file.

    In a narrow terminal there is no bar, and the texts are cut, so that the count and the times can be read.
    """
    bars = [BarColumn()] if console.width >= WIDE else []
    numbers = [column(table_column=Column(no_wrap=True)) for column in (MofNCompleteColumn, TimeElapsedColumn, TimeRemainingColumn)]
    columns = [_CutText("{task.description}"), *bars, *numbers, _CutText("{task.fields[fields]}")]
    disable = console.quiet or not console.is_terminal
    with doing(description), Progress(*columns, console=console, disable=disable, transient=False) as bar:
        yield ProgressBar(bar, bar.add_task(description, total=total, fields=""))


_say: Callable[[str], None] | None = None
_announced: set[Hashable] = set()


@contextmanager
def announcing(say: Callable[[str], None]) -> Iterator[None]:
    """Context manager of a step: inside, ``announce`` prints by ``say``. Outside of one, announcements are dropped."""
    global _say, _announced
    outer = _say, _announced
    _say, _announced = say, set()
    try:
        yield
    finally:
        _say, _announced = outer


def announce(kind: Hashable, line: str) -> None:
    """Print a line, unless one of the same ``kind`` was printed in this step."""
    if _say is not None and kind not in _announced:
        _announced.add(kind)
        _say(line)
