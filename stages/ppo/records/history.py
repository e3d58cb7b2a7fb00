"""The metrics of the iterations so far, summed up so that they do not grow with the run."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import TypedDict

from stages.json_types import JsonObject
from stages.metric_names import SUMMED_UP, is_monitor


class Entry(TypedDict):
    """The stored part of an iteration: its metrics, and some of its episodes."""

    metrics: dict[str, float]
    samples: list[JsonObject]


class RunHistory:
    """The completed iterations. It keeps the columns needed for run metrics, and complete entries only until the next checkpoint.

    ``resumed``: complete entries of an interrupted run, to be logged again.
    """

    def __init__(self, resumed: Sequence[Entry] = ()) -> None:
        self._columns: dict[str, array[float]] = {}
        self._resumed = list(resumed)
        self._new: list[Entry] = []
        self._length = 0
        for entry in self._resumed:
            self._add_to_columns(entry)

    def __len__(self) -> int:
        return self._length

    def append(self, entry: Entry) -> None:
        """Add an iteration: ``metrics`` and ``samples``."""
        self._add_to_columns(entry)
        self._new.append(entry)

    def _add_to_columns(self, entry: Entry) -> None:
        for name, value in entry["metrics"].items():
            if name in SUMMED_UP or is_monitor(name):
                self._columns.setdefault(name, array("d")).append(value)
        self._length += 1

    def take_resumed(self) -> list[Entry]:
        """The entries of the interrupted run; empty on later calls."""
        resumed, self._resumed = self._resumed, []
        return resumed

    def take_new(self) -> list[Entry]:
        """The entries since the last call."""
        new, self._new = self._new, []
        return new

    def names(self) -> list[str]:
        """The columns that every iteration has."""
        return [name for name, values in self._columns.items() if len(values) == self._length]

    def values(self, name: str) -> Sequence[float]:
        """One column over all iterations."""
        return self._columns[name]
