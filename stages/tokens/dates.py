"""The date that chat templates write: ``strftime_now``, as in Llama 3.2, SmolLM3 and gpt-oss.

A step renders all its texts with the time at which it began, also if it is resumed later. So a resumed step sees the same tokens, and a
conversation that is rendered at midnight still begins with its prompt.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime

_CALL = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")
_moment: datetime | None = None


@contextmanager
def templates_at(moment: datetime) -> Iterator[None]:
    """Context manager in which templates write the date and time ``moment``."""
    global _moment
    outer, _moment = _moment, moment
    try:
        yield
    finally:
        _moment = outer


def dated(template: str) -> str:
    """The template with the present date, or that of ``templates_at``, in the place of its calls of ``strftime_now``."""
    moment = _moment or datetime.now()
    return _CALL.sub(lambda call: json.dumps(moment.strftime(call[2])), template)
