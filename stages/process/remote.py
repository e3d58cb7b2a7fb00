"""Requests to JSON servers: retries with exponential backoff and jitter, timeouts, and an on-disk cache of answers.

An API key is sent only in the request header.
"""

from __future__ import annotations

import json
import logging
import random
import socket
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import httpx2

from stages.errors import ModelError
from stages.json_types import JsonObject

logger = logging.getLogger(__name__)
T = TypeVar("T")
RETRIED = (408, 409, 425, 429, 500, 502, 503, 504, 529)
BETWEEN_WARNINGS = 60.0  # seconds; while a server fails, all threads of a client together warn once in this time
LONGEST_WAIT = 120.0  # seconds; the maximum wait, even if a server requests more


class GaveUp(Exception):
    """A request that got no usable answer in any attempt. The message gives the reason."""


class Final(GaveUp):
    """An unusable answer that would not change with another attempt."""


class Refused(Exception):
    """A status for which a retry cannot help. The message has the status and the server's text."""


class AnswerCache:
    """On-disk cache of answers by request. Safe for threads and processes. Raises ModelError if the file cannot be used."""

    def __init__(self, path: Path, what: str = "the cache of judgements") -> None:
        self.path, self.what = path, what
        self._lock = threading.Lock()
        with self._explained():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(path, check_same_thread=False, timeout=60)
            self._connection.execute("CREATE TABLE IF NOT EXISTS replies (asked TEXT PRIMARY KEY, reply TEXT NOT NULL)")
            self._connection.commit()

    def get(self, asked: str) -> str | None:
        with self._lock, self._explained():
            row = self._connection.execute("SELECT reply FROM replies WHERE asked = ?", (asked,)).fetchone()
        return row[0] if row is not None else None

    def put(self, asked: str, reply: str) -> None:
        with self._lock, self._explained():
            self._connection.execute("INSERT OR REPLACE INTO replies VALUES (?, ?)", (asked, reply))
            self._connection.commit()

    def close(self) -> None:
        self._connection.close()

    def _explained(self) -> _CacheErrors:
        return _CacheErrors(self)


class _CacheErrors:
    def __init__(self, cache: AnswerCache) -> None:
        self.cache = cache

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, sqlite3.Error | OSError):
            raise ModelError(f"{self.cache.what} {self.cache.path} cannot be used ({error}); remove it, or free the disk") from error


class JsonClient:
    """Posts JSON. Thread-safe. ``sleep`` waits between attempts; ``counted`` is called with counts of requests and retries.

    ``jitter``: up to this share of each wait is added at random, so that many clients do not retry at the same time. ``connections``:
    maximum number of concurrent requests; further requests wait.
    """

    def __init__(
        self,
        *,
        key: str | None,
        timeout: float | None,
        retries: int,
        backoff_seconds: float,
        jitter: float = 0.0,
        connections: int = 100,
        sleep: Callable[[float], object] | None = None,
        counted: Callable[..., None] = lambda **counts: None,
    ) -> None:
        self.retries, self.timeout, self.backoff_seconds, self.jitter = retries, timeout, backoff_seconds, jitter
        self._key, self._counted = key, counted
        self._stopping = threading.Event()
        self._sleep = sleep if sleep is not None else self._stopping.wait
        self._lock = threading.Lock()
        self._warned: float | None = None  # time of the last warning, by time.monotonic
        self._sockets: weakref.WeakSet[Any] = weakref.WeakSet()
        self._random = random.Random()  # separate generator: the global one must be reproducible after a resume
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        limits = httpx2.Limits(max_connections=connections, max_keepalive_connections=connections)
        self._client = httpx2.Client(timeout=timeout, headers=headers, limits=limits)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def stop(self) -> None:
        """Make threads give up that wait for a retry or for an answer."""
        self._stopping.set()
        with self._lock:
            sockets = list(self._sockets)
        for connection in sockets:
            _disconnect(connection)

    def post(self, url: str, body: object, read: Callable[[object], T]) -> T:
        """Post ``body`` and return ``read`` of the answer's JSON. If ``read`` raises GaveUp, the request is retried.

        Raises GaveUp if all attempts fail, and Refused if a retry cannot help.
        """
        return self._ask(url, lambda: self._client.post(url, json=body, extensions={"trace": self._remember_socket}), read)

    def get(self, url: str, read: Callable[[object], T]) -> T:
        """As ``post``, without a body."""
        return self._ask(url, lambda: self._client.get(url, extensions={"trace": self._remember_socket}), read)

    def _ask(self, url: str, send: Callable[[], httpx2.Response], read: Callable[[object], T]) -> T:
        reason, wait = "", 0.0
        for attempt in range(self.retries + 1):
            if attempt:
                self._counted(retries=1)
                wait = max(wait, self._backoff(attempt))
                self._warn(f"{url}: {reason}; waiting {wait:.3g} s before attempt {attempt + 1} of {self.retries + 1}")
                self._sleep(wait)
                if self._stopping.is_set():
                    break
            self._counted(requests=1)
            wait = 0.0
            try:
                response = send()
            except httpx2.TimeoutException:
                reason = f"no reply within {self.timeout:g} s"
                continue
            except httpx2.TransportError as error:
                reason = f"no connection ({type(error).__name__})"
                if self._stopping.is_set():
                    break
                continue
            except RuntimeError:  # httpx's error if another thread has closed the client
                if not self._stopping.is_set():
                    raise
                reason = "the client was closed"
                break
            if response.status_code == 200:
                try:
                    return read(_json_of(response))
                except Final:
                    raise
                except GaveUp as error:
                    reason = str(error)
                    continue
            reason = f"status {response.status_code}"
            if response.status_code not in RETRIED:
                raise Refused(f"{reason}: {self.without_key(response.text[:300])}")
            wait = asked_wait(response.headers.get("retry-after"))
        raise GaveUp(reason)

    def _warn(self, message: str) -> None:
        """Log that a request is repeated, unless this client did so within BETWEEN_WARNINGS."""
        with self._lock:
            now = time.monotonic()
            if self._warned is not None and now - self._warned < BETWEEN_WARNINGS:
                return
            self._warned = now
        logger.warning("%s", self.without_key(message))

    def _remember_socket(self, event: str, details: dict[str, Any]) -> None:
        """Remember the socket of a new connection. If ``stop`` was called while it was made, end it."""
        if event in ("connection.connect_tcp.complete", "connection.start_tls.complete"):
            connection = details["return_value"].get_extra_info("socket")
            with self._lock:
                self._sockets.add(connection)
            if self._stopping.is_set():
                _disconnect(connection)

    def _backoff(self, attempt: int) -> float:
        base = min(LONGEST_WAIT, self.backoff_seconds * 2 ** (attempt - 1))
        return base * (1 + self._random.uniform(0, self.jitter)) if self.jitter else base

    def without_key(self, text: str) -> str:
        """``text`` with the API key redacted."""
        return text.replace(self._key, "...") if self._key else text


def _disconnect(connection: socket.socket) -> None:
    """End a connection. A thread that reads from it wakes; closing the socket would not wake it."""
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def _json_of(response: httpx2.Response) -> object:
    """The JSON of a response; None if it is not JSON."""
    try:
        return response.json()
    except ValueError:
        return None


def asked_wait(header: str | None) -> float:
    """The wait in seconds that a server requests (Retry-After); 0 without the header, or if it is a date."""
    try:
        return min(LONGEST_WAIT, max(0.0, float(header or 0)))
    except ValueError:
        return 0.0


@dataclass(frozen=True)
class ChatRequest:
    """A request to a language model behind an OpenAI-compatible endpoint. ``key`` identifies it in an ``AnswerCache``."""

    url: str
    body: JsonObject
    key: str

    @classmethod
    def of(cls, endpoint: str, model: str, *, system: str, user: str, max_tokens: int) -> ChatRequest:
        """Ask ``model`` for the most likely reply to a system and a user message. ``endpoint``: the address up to /v1."""
        body: JsonObject = {
            "model": model,
            "messages": [{"role": "system", "content": system}, {"role": "user", "content": user}],
            "temperature": 0,
            "max_tokens": max_tokens,
        }
        key = sha256(json.dumps([endpoint, body], sort_keys=True).encode()).hexdigest()
        return cls(f"{endpoint.rstrip('/')}/chat/completions", body, key)


def chat_reply(content: object) -> tuple[str, int, int]:
    """(text, prompt tokens, reply tokens) of a chat completion. Raises GaveUp if ``content`` is not a chat completion."""
    if not isinstance(content, dict):
        raise GaveUp("the reply is not a chat completion")
    try:
        text = content["choices"][0]["message"]["content"] or ""
        usage = content.get("usage") or {}
        tokens = int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise GaveUp("the reply is not a chat completion") from error
    if not isinstance(text, str):
        raise GaveUp("the reply is not a chat completion")
    return text, *tokens
