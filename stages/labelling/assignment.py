"""Who gets which task next. A task that somebody has open is not given to another until the lease runs out.

Screening tasks come first. Then the tasks in their published order: an overlap task until as many people have ranked it as the settings
say, any other until one person has. Which tasks overlap follows from the seed.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from random import Random

LEASE_SECONDS = 3600.0


def overlap_tasks(ids: Sequence[str], share: float, seed: int) -> set[str]:
    """The tasks that go to several people: ``share`` of all, rounded, chosen by the seed."""
    ordered = sorted(ids, key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).digest())
    return set(ordered[: round(share * len(ordered))])


def shown_order(task: str, annotator: str, number: int, seed: int) -> list[int]:
    """The completions' indices in the order in which this annotator sees them; the same every time."""
    order = list(range(number))
    Random(f"{seed} {task} {annotator}").shuffle(order)
    return order


class Assignment:
    """Open tasks, and who holds a lease on which. Not thread-safe: the store calls it under its lock."""

    def __init__(
        self,
        ids: Sequence[str],
        wanted: Mapping[str, int],
        *,
        lease_seconds: float = LEASE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.ids, self.wanted = list(ids), wanted
        self.ranked: dict[str, set[str]] = {name: set() for name in ids}  # task -> who has ranked it
        self.num_ranked = 0  # tasks that somebody has ranked
        self._leases: dict[str, dict[str, float]] = {}
        self._held: dict[str, str] = {}  # annotator -> task
        self._start = 0  # every task before this one has all the rankings it wants
        self._lease_seconds, self._clock = lease_seconds, clock

    def next(self, annotator: str, answered: Collection[str], wish: str | None = None) -> str | None:
        """The annotator's next task: the one they hold, the one they wish for where it is open, else the first open one."""
        for name in (self._held.get(annotator), wish):
            if name in self.ranked and name not in answered and self._is_open(name, annotator):
                return self._lease(name, annotator)
        while self._start < len(self.ids) and len(self.ranked[self.ids[self._start]]) >= self.wanted[self.ids[self._start]]:
            self._start += 1
        for place in range(self._start, len(self.ids)):
            name = self.ids[place]
            if name not in answered and self._is_open(name, annotator):
                return self._lease(name, annotator)
        return None

    @property
    def held(self) -> dict[str, str]:
        """The task that each annotator has open."""
        return dict(self._held)

    def hold(self, annotator: str, task: str) -> None:
        """Give a lease again that was given before the server ended."""
        if task in self.ranked and self._is_open(task, annotator):
            self._lease(task, annotator)

    def answered(self, task: str, annotator: str, *, is_ranked: bool) -> None:
        """Note an answer; a task that was skipped or flagged stays open for others."""
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
        """How many tasks somebody has ranked, and others have still to rank."""
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
