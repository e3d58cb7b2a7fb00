"""Hold back the log records of an attempt that may be repeated, and show a message about the data once."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

DATA = "stages.corpora"  # the loggers of messages about the data


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
    """Passes records on to the handlers that the logger had before: each message of the loggers below ``DATA`` only one time."""

    def __init__(self, logger: logging.Logger) -> None:
        super().__init__()
        self.said: set[str] = set()
        self.handlers, self.propagate, self.parent = list(logger.handlers), logger.propagate, logger.parent

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.startswith(DATA):
            if (message := record.getMessage()) in self.said:
                return
            self.said.add(message)
        for handler in self.handlers:
            handler.handle(record)
        if self.propagate and self.parent is not None:
            self.parent.callHandlers(record)


@contextmanager
def without_repeats(name: str = "stages") -> Iterator[None]:
    """Context manager in which equal messages about the data are shown once, because a plan and its steps read the same data.

    They are the messages of the loggers below ``DATA``. Other messages below ``name``, such as retries, are shown each time. An inner
    context has no effect.
    """
    logger = logging.getLogger(name)
    if any(isinstance(handler, _Once) for handler in logger.handlers):
        yield
        return
    handler = _Once(logger)
    logger.handlers, logger.propagate = [handler], False
    try:
        yield
    finally:
        logger.handlers, logger.propagate = handler.handlers, handler.propagate
