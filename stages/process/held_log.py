"""Nothing is logged twice: hold back the records of an attempt that may be repeated, and drop repeated records."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


class _Keep(logging.Handler):
    """Keeps records instead of showing them."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@contextmanager
def held_log(name: str = "stages") -> Iterator[None]:
    """Context manager that holds the records of the logger ``name`` and those below it. They are logged at its end, unless it raises."""
    logger, keep = logging.getLogger(name), _Keep()
    before = logger.propagate, list(logger.handlers)
    logger.propagate, logger.handlers = False, [keep]
    try:
        yield
    finally:
        logger.propagate, logger.handlers = before[0], before[1]
    for record in keep.records:
        logger.handle(record)


class _Once(logging.Handler):
    """Passes each message on once, to the handlers that the logger had before."""

    def __init__(self, logger: logging.Logger) -> None:
        super().__init__()
        self.said: set[str] = set()
        self.handlers, self.propagate, self.parent = list(logger.handlers), logger.propagate, logger.parent

    def emit(self, record: logging.LogRecord) -> None:
        if (message := record.getMessage()) in self.said:
            return
        self.said.add(message)
        for handler in self.handlers:
            handler.handle(record)
        if self.propagate and self.parent is not None:
            self.parent.callHandlers(record)


@contextmanager
def without_repeats(name: str = "stages") -> Iterator[None]:
    """Context manager in which equal messages of the logger ``name`` and those below it are shown once. Inner ones have no effect."""
    logger = logging.getLogger(name)
    if any(isinstance(handler, _Once) for handler in logger.handlers):
        yield
        return
    once = _Once(logger)
    logger.handlers, logger.propagate = [once], False
    try:
        yield
    finally:
        logger.handlers, logger.propagate = once.handlers, once.propagate
