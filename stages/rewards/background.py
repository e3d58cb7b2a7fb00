"""Requests of remote rewards in background threads: a policy samples on while a server scores what is finished."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager
from typing import Generic, TypeVar

from stages.corpora.messages import Prompt
from stages.process.remote import JsonClient
from stages.rewards.details import NOTHING, Details

Question = TypeVar("Question")
Answer = TypeVar("Answer")


class Requests(Generic[Question, Answer]):
    """Questions, each under a key, that threads put to a server in batches. A question is asked once, however often it is added.

    A thread that becomes free takes up to ``batch_size`` questions that wait. After the first failure nothing further is asked: the
    questions that wait, or are added later, fail with the same error. The threads are daemons, so that a request that hangs does not keep
    a process from ending.
    """

    def __init__(self, ask: Callable[[list[tuple[str, Question]]], Sequence[Answer]], *, batch_size: int, concurrency: int) -> None:
        self._ask, self._batch_size, self._concurrency = ask, batch_size, concurrency
        self._lock = threading.Lock()
        self._futures: dict[str, Future[Answer]] = {}
        self._waiting: deque[tuple[str, Question]] = deque()
        self._failure: BaseException | None = None
        self._threads = self._asking = 0
        self._seconds = self._since = 0.0

    def __contains__(self, key: str) -> bool:
        return key in self._futures

    def know(self, key: str, answer: Answer) -> None:
        """Note an answer that is known without asking."""
        future: Future[Answer] = Future()
        future.set_result(answer)
        self._futures[key] = future

    def add(self, questions: Mapping[str, Question]) -> None:
        """Ask those of ``questions`` whose key is new."""
        with self._lock:
            new = {key: question for key, question in questions.items() if key not in self._futures}
            self._futures |= {key: Future() for key in new}
            self._waiting += new.items()
            if self._failure is not None:
                self._fail(self._failure)
            batches = -(-len(self._waiting) // self._batch_size)
            started = min(batches, self._concurrency - self._threads)
            self._threads += started
        for _ in range(started):
            threading.Thread(target=self._work, name="reward request", daemon=True).start()

    def answer(self, key: str) -> Answer:
        """The answer to the question ``key``; waits for it. Raises what asking raised."""
        return self._futures[key].result()

    def stop(self) -> None:
        """Ask nothing further."""
        with self._lock:
            self._fail(CancelledError())

    def seconds_under_way(self) -> float:
        """Seconds so far with at least one request under way."""
        with self._lock:
            return self._seconds + (time.perf_counter() - self._since if self._asking else 0.0)

    def _fail(self, error: BaseException) -> None:
        """Have every question that waits fail with ``error``, and those that come later."""
        self._failure = self._failure or error
        for key, _ in self._waiting:
            self._futures[key].set_exception(error)
        self._waiting.clear()

    def _work(self) -> None:
        """Ask batch after batch, until no question waits."""
        while batch := self._take():
            try:
                answers = dict(zip((key for key, _ in batch), self._ask(batch), strict=True))
            except BaseException as error:  # whoever waits for these answers meets it
                with self._lock:
                    self._fail(error)
                for key, _ in batch:
                    self._futures[key].set_exception(error)
            else:
                for key, answer in answers.items():
                    self._futures[key].set_result(answer)
            self._count(-1)

    def _take(self) -> list[tuple[str, Question]]:
        """The questions of the next request; none where the thread is to end."""
        with self._lock:
            batch = [self._waiting.popleft() for _ in range(min(self._batch_size, len(self._waiting)))]
            if not batch:
                self._threads -= 1
        if batch:
            self._count(1)
        return batch

    def _count(self, change: int) -> None:
        """Count the requests under way, and the seconds with at least one."""
        with self._lock:
            now = time.perf_counter()
            if self._asking:
                self._seconds += now - self._since
            self._asking, self._since = self._asking + change, now


class RemoteSource(Generic[Question, Answer]):
    """What reward sources behind a server share: ``begin`` asks in the background, and ``judge`` takes the answers."""

    name: str

    def __init__(self, client: JsonClient, *, batch_size: int, concurrency: int) -> None:
        self._client, self._batch_size, self._concurrency = client, batch_size, concurrency
        self._requests: Requests[Question, Answer] | None = None

    def begin(self, prompts: Sequence[Prompt], completions: Sequence[str], details: Details = NOTHING) -> None:
        """Ask for the scores of these completions and return at once. A later ``judge`` takes the answers, and meets the errors."""
        raise NotImplementedError

    def ask(self, batch: list[tuple[str, Question]]) -> Sequence[Answer]:
        """Put a batch of (key, question) to the server; called in a thread of its own. Raises GaveUp or Refused."""
        raise NotImplementedError

    def seconds_under_way(self) -> float:
        """Seconds with at least one request under way, of those begun for the next ``judge``."""
        return self._requests.seconds_under_way() if self._requests is not None else 0.0

    def forget(self) -> None:
        """Drop what was begun: nobody will ask for it. Requests that wait for a retry give up."""
        if self._requests is not None:
            self._requests.stop()
            self._requests = None
            self._client.stop()

    def begun(self) -> Requests[Question, Answer]:
        """The requests for the next ``judge``."""
        if self._requests is None:
            self._requests = Requests(self.ask, batch_size=self._batch_size, concurrency=self._concurrency)
        return self._requests

    @contextmanager
    def taken(self) -> Iterator[Requests[Question, Answer]]:
        """The same, to take the answers inside; behind it a new round begins. An exception, such as a request to stop, drops them."""
        try:
            yield self.begun()
        except BaseException:
            self.forget()
            raise
        self._requests = None
