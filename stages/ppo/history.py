"""The metrics of the iterations so far, summed up so that they do not grow with the run."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

from stages.ppo.metric_names import SUMMED_UP


class RunHistory:
    """The completed iterations. It keeps the columns needed for run metrics, and complete entries only until the next checkpoint.

    ``resumed``: complete entries of an interrupted run, to be logged again.
    """

    def __init__(self, resumed: Sequence[dict[str, Any]] = ()) -> None:
        self._columns: dict[str, array[float]] = {}
        self._resumed = list(resumed)
        self._new: list[dict[str, Any]] = []
        self._length = 0
        for entry in self._resumed:
            self._add_to_columns(entry)

    def __len__(self) -> int:
        return self._length

    def append(self, entry: dict[str, Any]) -> None:
        """Add an iteration: ``metrics`` and ``samples``."""
        self._add_to_columns(entry)
        self._new.append(entry)

    def _add_to_columns(self, entry: dict[str, Any]) -> None:
        for name, value in entry["metrics"].items():
            if name in SUMMED_UP or name.startswith("monitors/"):
                self._columns.setdefault(name, array("d")).append(value)
        self._length += 1

    def take_resumed(self) -> list[dict[str, Any]]:
        """The entries of the interrupted run; empty on later calls."""
        resumed, self._resumed = self._resumed, []
        return resumed

    def take_new(self) -> list[dict[str, Any]]:
        """The entries since the last call."""
        new, self._new = self._new, []
        return new

    def names(self) -> list[str]:
        """The columns that every iteration has."""
        return [name for name, values in self._columns.items() if len(values) == self._length]

    def values(self, name: str) -> Sequence[float]:
        """One column over all iterations."""
        return self._columns[name]
