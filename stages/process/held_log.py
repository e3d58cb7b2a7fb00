"""Hold back the log records of an attempt that may be repeated, so that nothing is logged twice."""

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
