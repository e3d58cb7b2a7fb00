"""Choose each annotator's next task. Leases limit how many annotators work on a task at the same time.

Screening tasks come first. The other tasks follow in their published order. An overlap task is open until it has as many rankings as the
settings ask for. Any other task is open until it has one ranking. The seed decides which tasks overlap.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from random import Random

LEASE_SECONDS = 3600.0


def overlap_tasks(ids: Sequence[str], share: float, seed: int) -> set[str]:
    """Ids of the tasks that go to several annotators. The seed chooses a ``share`` of all tasks (rounded)."""
    ordered = sorted(ids, key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).digest())
    return set(ordered[: round(share * len(ordered))])


def shown_order(task: str, annotator: str, number: int, seed: int) -> list[int]:
    """Indices of ``number`` completions in the order in which this annotator sees them. Equal arguments always give the same order."""
    order = list(range(number))
    Random(f"{seed} {task} {annotator}").shuffle(order)
    return order


class Assignment:
    """The open tasks and their leases. Not thread-safe: the store calls it with its lock held."""

    def __init__(
        self,
        ids: Sequence[str],
        wanted: Mapping[str, int],
        *,
        lease_seconds: float = LEASE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.ids, self.wanted = list(ids), wanted
        self.ranked: dict[str, set[str]] = {name: set() for name in ids}  # task -> annotators who ranked it
        self.num_ranked = 0  # tasks with at least one ranking
        self._leases: dict[str, dict[str, float]] = {}
        self._held: dict[str, str] = {}  # annotator -> task
        self._start = 0  # index; all tasks before it have all the rankings that they need
        self._lease_seconds, self._clock = lease_seconds, clock

    def next(self, annotator: str, answered: Collection[str], wish: str | None = None) -> str | None:
        """The annotator's current task, else the task ``wish`` if it is open, else the first open task. None if no task is open."""
        for name in (self._held.get(annotator), wish):
            if name in self.ranked and name not in answered and self._is_open(name, annotator):
                return self._lease(name, annotator)
        while self._start < len(self.ids) and len(self.ranked[self.ids[self._start]]) >= self.wanted[self.ids[self._start]]:
            self._start += 1
        for index in range(self._start, len(self.ids)):
            name = self.ids[index]
            if name not in answered and self._is_open(name, annotator):
                return self._lease(name, annotator)
        return None

    @property
    def held(self) -> dict[str, str]:
        """Annotator -> the task that they have open."""
        return dict(self._held)

    def hold(self, annotator: str, task: str) -> None:
        """Restore a lease from before a server restart, if the task is still open."""
        if task in self.ranked and self._is_open(task, annotator):
            self._lease(task, annotator)

    def answered(self, task: str, annotator: str, *, is_ranked: bool) -> None:
        """Record an answer. A skipped or flagged task stays open for other annotators."""
        people = self.ranked[task]
        before = bool(people)
        if is_ranked:
            people.add(annotator)
        elif annotator in people:
            people.discard(annotator)
            self._start = 0
        self.num_ranked += bool(people) - before
        self._leases.get(task, {}).pop(annotator, None)
        if self._held.get(annotator) == task:
            del self._held[annotator]

    def num_begun(self) -> int:
        """Number of tasks that have at least one ranking and need more."""
        return sum(0 < len(people) < self.wanted[task] for task, people in self.ranked.items())

    def _is_open(self, task: str, annotator: str) -> bool:
        ranked = self.ranked[task]
        if len(ranked) >= self.wanted[task]:
            return False
        leases = self._leases.get(task)
        if not leases:
            return True
        now = self._clock()
        others = sum(until > now for name, until in leases.items() if name != annotator and name not in ranked)
        return len(ranked) + others < self.wanted[task]

    def _lease(self, task: str, annotator: str) -> str:
        if (held := self._held.get(annotator)) is not None and held != task:
            self._leases.get(held, {}).pop(annotator, None)
        self._leases.setdefault(task, {})[annotator] = self._clock() + self._lease_seconds
        self._held[annotator] = task
        return task
