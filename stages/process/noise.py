"""The only place that silences library messages which a user cannot act on, each one by name.

All other messages are shown. A message is listed only if its cause cannot be removed here; a comment gives the reason.
"""

from __future__ import annotations

import logging
import warnings

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
