"""Log records and warnings: silence those that a user cannot act on, hold back those of an attempt, show those about the data once."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

WARNINGS: tuple[tuple[type[Warning], str], ...] = (
    # transformers renamed these three names in 5.24; TRL and peft still use the old ones, as does this project for older versions.
    (FutureWarning, r"`(is_gradient_checkpointing|gradient_checkpointing_(enable|disable))` is deprecated"),
    (FutureWarning, r"`\w+` only defines `gradient_checkpointing_enable`"),
)
LOG_MESSAGES: tuple[tuple[str, str], ...] = (
    # Rows are right-padded and causal, so padding has no effect; without a mask attention uses its fast path.
    ("transformers.modeling_utils", "We strongly recommend passing in an `attention_mask`"),
    # Rows that are too long are left out or shortened after they are tokenized, and counted in a message.
    ("transformers.tokenization_utils_base", "Token indices sequence length is longer than"),
)
LOGGERS: tuple[tuple[str, int], ...] = (
    # On import it warns that an optional speed-up for 4-bit models on CPUs is missing; later it reports every cast. Failures raise errors.
    ("bitsandbytes", logging.ERROR),
)


class _Without(logging.Filter):
    """Drops the records whose message begins with ``beginning``."""

    def __init__(self, beginning: str) -> None:
        super().__init__()
        self.beginning = beginning

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self.beginning)


def silence() -> None:
    """Silence the messages listed above in this process. Repeated calls have no further effect."""
    for category, message in WARNINGS:
        warnings.filterwarnings("ignore", message=message, category=category)
    for name, beginning in LOG_MESSAGES:
        logger = logging.getLogger(name)
        if not any(isinstance(kept, _Without) and kept.beginning == beginning for kept in logger.filters):
            logger.addFilter(_Without(beginning))
    for name, level in LOGGERS:
        logging.getLogger(name).setLevel(level)


DATA = "stages.corpora"  # the loggers of messages about the data


class _Keep(logging.Handler):
    """Keeps records instead of showing them."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@contextmanager
def held_log() -> Iterator[None]:
    """Context manager that holds the records of the program's loggers. They are logged at its end, unless it raises."""
    logger, keep = logging.getLogger("stages"), _Keep()
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
def without_repeats() -> Iterator[None]:
    """Context manager in which equal messages about the data are shown once, because a plan and its steps read the same data.

    They are the messages of the loggers below ``DATA``. Other messages, such as retries, are shown each time. An inner context has no
    effect.
    """
    logger = logging.getLogger("stages")
    if any(isinstance(handler, _Once) for handler in logger.handlers):
        yield
        return
    handler = _Once(logger)
    logger.handlers, logger.propagate = [handler], False
    try:
        yield
    finally:
        logger.handlers, logger.propagate = handler.handlers, handler.propagate
