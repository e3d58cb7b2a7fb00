"""What a step shows in the terminal besides its results: progress bars, and announcements from code deep inside it."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from stages.errors import doing

Item = TypeVar("Item")
Made = TypeVar("Made")

WIDE = 80  # columns of a terminal that shows a bar
FIRST_LINE, MOST_BETWEEN = 60.0, 600.0  # seconds: the pause between two lines in a log file doubles from the first to the second
PATIENCE = 2.0  # seconds; shorter work needs no bar
REFRESH = 0.2  # seconds between two updates of the bar of fast work


class TextConsole(Console):
    """A console that prints a text as it is. Rich would take brackets in names, paths and errors for styles, or fail at ``[/INST]``."""

    def print(self, *objects: Any, markup: bool | None = None, **options: Any) -> None:
        """As rich, but ``markup`` applies only to other objects than texts, such as tables, unless it is given."""
        if markup is None and all(isinstance(one, str) for one in objects):
            markup = False
        super().print(*objects, markup=markup, **options)


class ProgressBar:
    """A rank-zero progress bar. Extra fields (reward, KL, speed) are shown after it.

    In a log file it writes a line now and then instead: after a minute, and later at most every ten minutes.
    """

    def __init__(self, progress: Progress, task: TaskID, log: Console | None = None) -> None:
        self._progress, self._task, self._log = progress, task, log
        self._began = self._last = time.monotonic()
        self._pause, self._completed = FIRST_LINE, progress.tasks[0].completed  # at the last line

    def advance(self, amount: float = 1, **fields: float | str) -> None:
        shown = "  ".join(f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in fields.items())
        self._progress.update(self._task, advance=amount, fields=shown)
        if self._log is not None and time.monotonic() - self._last >= self._pause:
            self._write_line(self._log, shown)

    def _write_line(self, log: Console, fields: str) -> None:
        task, now = self._progress.tasks[0], time.monotonic()
        count = f"{task.completed:,.0f}" if task.total is None else f"{task.completed:,.0f} of {task.total:,.0f}"
        speed = (task.completed - self._completed) / (now - self._last)
        left = "" if task.total is None or not speed else f", {_duration((task.total - task.completed) / speed)} left"
        line = f"{task.description}: {count} after {_duration(now - self._began)}{left}"
        log.print(f"{line}  {fields}" if fields else line, markup=False, soft_wrap=True)
        self._last, self._completed, self._pause = now, task.completed, min(2 * self._pause, MOST_BETWEEN)


def _duration(seconds: float) -> timedelta:
    return timedelta(seconds=round(seconds))


class _CutText(TextColumn):
    """A text that is cut if the columns do not fit. Rich narrows columns that may wrap before the others."""

    def __init__(self, text: str) -> None:
        super().__init__(text, table_column=Column(overflow="ellipsis"))

    def render(self, task: Task) -> Text:
        """The text, on one line."""
        made = super().render(task)
        made.no_wrap, made.overflow = True, "ellipsis"
        return made


_bars = 0  # bars that are shown now


@contextmanager
def progress_bar(
    console: Console, description: str, total: float | None, *, done: int = 0, transient: bool = False
) -> Iterator[ProgressBar]:
    """A progress bar over ``total`` units (None: unknown), ``done`` of them at the start. A terminal shows a bar, a log file gets lines.

    In a narrow terminal there is no bar, and the texts are cut, so that the count and the times can be read. ``transient``: the bar
    disappears at the end.
    """
    global _bars
    bars = [BarColumn()] if console.width >= WIDE else []
    numbers = [column(table_column=Column(no_wrap=True)) for column in (MofNCompleteColumn, TimeElapsedColumn, TimeRemainingColumn)]
    columns = [_CutText("{task.description}"), *bars, *numbers, _CutText("{task.fields[fields]}")]
    log = None if console.quiet or console.is_terminal else console
    progress = Progress(*columns, console=console, disable=console.quiet or log is not None, transient=transient)
    _bars += 1
    try:
        with doing(description), progress as bar:
            yield ProgressBar(bar, bar.add_task(description, total=total, completed=done, fields=""), log)
    finally:
        _bars -= 1


_console: Console | None = None


@contextmanager
def showing(console: Console) -> Iterator[None]:
    """Context manager of a run: inside, ``in_progress`` shows long work on ``console``. Outside of one, nothing is shown."""
    global _console
    outer, _console = _console, console
    try:
        yield
    finally:
        _console = outer


@contextmanager
def in_progress(what: str, total: int | None = None) -> Iterator[Callable[..., None]]:
    """Context manager of work on ``total`` items (None: unknown). It gives a function to call after each item, or after ``count`` of them.

    A bar appears if the work takes more than ``PATIENCE`` seconds, unless another bar is shown. ``what`` names the work.
    """
    done = shown = 0
    due = time.monotonic() + PATIENCE
    bar: ProgressBar | None = None
    with ExitStack() as stack:

        def advance(count: int = 1) -> None:
            nonlocal done, shown, due, bar
            done += count
            if _console is None or (now := time.monotonic()) < due:
                return
            if bar is None and not _bars:
                bar = stack.enter_context(progress_bar(_console, what, total, done=done, transient=True))
            elif bar is not None:
                bar.advance(done - shown)
            shown = done
            due = now + REFRESH

        yield advance


def made_of_each(what: str, make: Callable[[Item], Made], items: Sequence[Item]) -> list[Made]:
    """``make(item)`` of each item, ``in_progress``."""
    made = []
    with in_progress(what, len(items)) as advance:
        for item in items:
            made.append(make(item))
            advance()
    return made


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
