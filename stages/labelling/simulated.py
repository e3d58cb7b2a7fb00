"""Simulated annotators: each one is a client that requests tasks and sends answers over the same HTTP interface as the page."""

from __future__ import annotations

import importlib
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx2

from stages.corpora.conversations.messages import Prompt
from stages.errors import TrainingError
from stages.labelling.config import People, SimulatedPeople
from stages.labelling.server import Served

Opinion = Callable[[str, Prompt, Sequence[str]], Sequence[float]]


class SimulatedAnnotator:
    """A client that does what the page does, without a browser."""

    def __init__(self, base: str, name: str, token: str, opinion: Opinion, tie_width: float = 0.0) -> None:
        self.name, self.opinion, self.tie_width = name, opinion, tie_width
        self._client = httpx2.Client(
            base_url=base, params={"annotator": name}, headers={"authorization": f"Bearer {token}"}, timeout=60.0, trust_env=False
        )
        self._questions = self._ask("GET", "/api/session")["questions"]

    def _ask(self, method: str, path: str, content: object = None) -> Any:
        response = self._client.request(method, path, json=content) if content is not None else self._client.request(method, path)
        if response.status_code != 200:
            raise TrainingError(
                f"simulated annotator {self.name}: {method} {path} gave status {response.status_code}: {response.text[:200]}"
            )
        return response.json()

    def answer_next(self) -> dict[str, int] | None:
        """Answer the next task. Returns the server's counts, or None if there is no task. Raises TrainingError."""
        task = self._ask("GET", "/api/task")["task"]
        if task is None:
            return None
        shown = list(self.opinion(self.name, task["prompt"], task["completions"]))
        if len(shown) != len(task["completions"]):
            raise TrainingError(f"people.simulate: {len(shown)} scores for {len(task['completions'])} completions")
        scores = [0.0] * len(shown)
        for position, index in enumerate(task["order"]):
            scores[index] = float(shown[position])
        content = {
            "id": uuid.uuid4().hex,
            "task": task["id"],
            "order": task["order"],
            "seconds": 0.1,
            "notes": "",
            "ranks": ranked(scores, self.tie_width),
            "ratings": {rating["name"]: _ratings(scores, rating["lowest"], rating["highest"]) for rating in self._questions["ratings"]},
            "checks": {check["name"]: [False] * len(scores) for check in self._questions["checks"]},
        }
        counts: dict[str, int] = self._ask("POST", "/api/answer", content)["counts"]
        return counts

    def close(self) -> None:
        """Close the connection."""
        self._client.close()


def ranked(scores: Sequence[float], tie_width: float) -> list[int]:
    """Ranks of scores, 0 is best. Neighbours in sorted order share a rank if their scores differ by at most ``tie_width``."""
    order = sorted(range(len(scores)), key=lambda index: -scores[index])
    ranks, rank = [0] * len(scores), 0
    for position, index in enumerate(order):
        if position and scores[order[position - 1]] - scores[index] > tie_width:
            rank = position
        ranks[index] = rank
    return ranks


def _ratings(scores: Sequence[float], lowest: int, highest: int) -> list[int]:
    """A rating per score: the lowest score of the task gets ``lowest``, the highest score gets ``highest``."""
    low, high = min(scores), max(scores)
    width = (high - low) or 1.0
    return [lowest + round((highest - lowest) * (score - low) / width) for score in scores]


def opinion_of(simulate: SimulatedPeople) -> Opinion:
    """Import the function that the recipe names."""
    module, _, name = simulate.function.partition(":")
    return getattr(importlib.import_module(module), name)


def simulate(folder: Path, people: People) -> int:
    """Serve ``folder`` and let simulated annotators answer until the target is reached. Returns the number of answers.

    ``people.annotators`` clients take turns, so two runs give the same rankings. Raises TrainingError if a client fails, or if no task is
    left before the target is reached.
    """
    assert people.simulate is not None
    opinion = opinion_of(people.simulate)
    given = 0
    with Served(folder) as served:
        target = served.store.settings.target
        names = [f"annotator-{index:02d}" for index in range(people.annotators)]
        at_work = [SimulatedAnnotator(served.base, name, served.access.token(name), opinion, people.simulate.tie_width) for name in names]
        try:
            # Continue after the target until every overlap task with a ranking has all of them: agreement is measured on these tasks.
            while at_work and (served.store.num_ranked() < target or served.store.num_begun()):
                annotator = at_work.pop(0)
                if annotator.answer_next() is not None:
                    given += 1
                    at_work.append(annotator)
                else:
                    annotator.close()
        finally:
            for annotator in at_work:
                annotator.close()
        reached = served.store.num_ranked()
    if reached < target:
        raise TrainingError(f"simulated people ranked {reached} of {target} tasks. No task is left for them, or none passed the screening")
    return given
