"""What libraries say that a user cannot act on, silenced by name and in this one place.

Everything else that they say is shown. A message is listed only where its cause cannot be removed here; the reason stands beside it.
"""

from __future__ import annotations

import logging
import warnings

WARNINGS: tuple[tuple[type[Warning], str], ...] = (
    # transformers renamed the three names in 5.24; TRL and peft still use the old ones, and so do we for older versions.
    (FutureWarning, r"`(is_gradient_checkpointing|gradient_checkpointing_(enable|disable))` is deprecated"),
    (FutureWarning, r"`\w+` only defines `gradient_checkpointing_enable`"),
)
LOG_MESSAGES: tuple[tuple[str, str], ...] = (
    # Rows are padded on the right and read causally, so that padding changes nothing; without a mask attention takes its fast path.
    ("transformers.modeling_utils", "We strongly recommend passing in an `attention_mask`"),
)
LOGGERS: tuple[tuple[str, int], ...] = (
    # On import it warns that an optional speed-up for 4-bit models on CPUs is missing; later it reports every cast. What fails raises.
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
    """Silence what is listed above, in this process; a second call changes nothing."""
    for category, message in WARNINGS:
        warnings.filterwarnings("ignore", message=message, category=category)
    for name, beginning in LOG_MESSAGES:
        logger = logging.getLogger(name)
        if not any(isinstance(kept, _Without) and kept.beginning == beginning for kept in logger.filters):
            logger.addFilter(_Without(beginning))
    for name, level in LOGGERS:
        logging.getLogger(name).setLevel(level)
