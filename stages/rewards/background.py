"""Background requests to remote reward servers: the policy keeps sampling while a server scores finished completions."""

from __future__ import annotations

import threading
import time
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager
from typing import Generic, TypeVar

from stages.corpora.conversations.messages import Prompt
from stages.process.remote import JsonClient
from stages.rewards.details import NOTHING, Details
from stages.rewards.source import RewardSource

Question = TypeVar("Question")
Answer = TypeVar("Answer")


class Requests(Generic[Question, Answer]):
    """Sends questions to a server in batches from several threads. Each question has a key; a key is asked only once.

    A free thread takes up to ``batch_size`` waiting questions. After the first failure no more requests are sent: waiting questions and
    questions that are added later fail with the same error. The threads are daemon threads, so a hanging request does not keep the process
    from ending.
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
        """Store an answer that is already known, so that it is not asked."""
        future: Future[Answer] = Future()
        future.set_result(answer)
        self._futures[key] = future

    def add(self, questions: Mapping[str, Question]) -> None:
        """Queue the questions whose keys are new, and start threads for them."""
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
        """Wait for the answer to the question ``key`` and return it. Raises the exception of its request."""
        return self._futures[key].result()

    def stop(self) -> None:
        """Send no more requests. Waiting questions fail with CancelledError."""
        with self._lock:
            self._fail(CancelledError())

    def seconds_under_way(self) -> float:
        """Seconds so far during which at least one request was in progress."""
        with self._lock:
            return self._seconds + (time.perf_counter() - self._since if self._asking else 0.0)

    def _fail(self, error: BaseException) -> None:
        """Make all waiting questions fail with ``error``. Questions that are added later fail with the first error."""
        self._failure = self._failure or error
        for key, _ in self._waiting:
            self._futures[key].set_exception(error)
        self._waiting.clear()

    def _work(self) -> None:
        """Send one batch after another until no question waits."""
        while batch := self._take():
            try:
                answers = dict(zip((key for key, _ in batch), self._ask(batch), strict=True))
            except BaseException as error:  # the callers that wait for these answers get it
                with self._lock:
                    self._fail(error)
                for key, _ in batch:
                    self._futures[key].set_exception(error)
            else:
                for key, answer in answers.items():
                    self._futures[key].set_result(answer)
            self._count(-1)

    def _take(self) -> list[tuple[str, Question]]:
        """The questions of the next request; an empty list if the thread must end."""
        with self._lock:
            batch = [self._waiting.popleft() for _ in range(min(self._batch_size, len(self._waiting)))]
            if not batch:
                self._threads -= 1
        if batch:
            self._count(1)
        return batch

    def _count(self, change: int) -> None:
        """Change the count of requests in progress, and add up the seconds with at least one."""
        with self._lock:
            now = time.perf_counter()
            if self._asking:
                self._seconds += now - self._since
            self._asking, self._since = self._asking + change, now


class RemoteSource(RewardSource, Generic[Question, Answer]):
    """Base class of reward sources behind a server: ``begin`` sends requests in the background, and ``judge`` collects the answers."""

    def __init__(self, client: JsonClient, *, batch_size: int, concurrency: int) -> None:
        self._client, self._batch_size, self._concurrency = client, batch_size, concurrency
        self._requests: Requests[Question, Answer] | None = None

    @abstractmethod
    def begin(self, prompts: Sequence[Prompt], completions: Sequence[str], details: Details = NOTHING) -> None:
        """Request the scores of these completions and return immediately. A later ``judge`` collects the answers and raises the errors."""

    @abstractmethod
    def ask(self, batch: list[tuple[str, Question]]) -> Sequence[Answer]:
        """Send a batch of (key, question) to the server and return the answers. Runs in a background thread. Raises GaveUp or Refused."""

    def seconds_under_way(self) -> float:
        """Seconds during which at least one request for the next ``judge`` was in progress."""
        return self._requests.seconds_under_way() if self._requests is not None else 0.0

    def forget(self) -> None:
        """Discard the requests that were begun. Requests that wait for a retry give up."""
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
        """A context for collecting the answers of ``begun``. A new round of requests begins after it.

        If an exception leaves the context, such as a request to stop, the requests are discarded.
        """
        try:
            yield self.begun()
        except BaseException:
            self.forget()
            raise
        self._requests = None
