"""The form of Hub ids: ``owner/name``, or ``name`` alone as in ``gpt2``. The rules are those of ``huggingface_hub``."""

from __future__ import annotations

import re

_PART = r"\b[\w.-]{1,96}\b"
_ID = re.compile(rf"({_PART}/)?{_PART}", re.ASCII)


def is_hub_id(text: str) -> bool:
    """Whether ``text`` can be the id of a Hub repository: ASCII letters, digits and ``-_.`` in one or two parts.

    A part begins and ends with a letter, a digit or ``_``, and has at most 96 characters. ``--``, ``..`` and the ending ``.git`` are
    not allowed.
    """
    return _ID.fullmatch(text) is not None and not any(mark in text for mark in ("--", "..")) and not text.endswith(".git")


def names_hub_repository(text: str) -> bool:
    """Whether ``text`` is a Hub id with an owner, or one without owner that contains a digit or a hyphen (``gpt2``)."""
    return is_hub_id(text) and ("/" in text or re.search(r"[0-9-]", text) is not None)
