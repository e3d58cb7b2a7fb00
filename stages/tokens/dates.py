"""The date that chat templates write: ``strftime_now``, as in Llama 3.2, SmolLM3 and gpt-oss.

A step renders all its texts with the time at which it began, also if it is resumed later. So a resumed step sees the same tokens, and a
conversation that is rendered at midnight still begins with its prompt.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime

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


def give_date(template: str) -> None:
    """Make ``strftime_now`` write the time of ``templates_at`` in a template. transformers caches the compiled template."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    _compile_jinja_template(template).environment.globals["strftime_now"] = _strftime_now


def _strftime_now(format: str) -> str:
    return (_moment or datetime.now()).strftime(format)
