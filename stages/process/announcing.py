"""Announcements: lines that code deep inside a step prints on the run's console, each kind once per step."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

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
