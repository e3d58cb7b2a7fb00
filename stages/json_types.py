"""Types of JSON content. Content with known keys has a ``TypedDict`` or a dataclass instead."""

from __future__ import annotations

import math
from typing import TypeAlias, TypeGuard

JsonObject: TypeAlias = dict[str, object]
"""A JSON object whose keys are not known in advance. A reader narrows a value with ``isinstance`` before it uses the value."""


def is_finite_number(value: object) -> TypeGuard[int | float]:
    """Whether ``value`` is a number that a float can represent: no bool, NaN or infinity, and no integer beyond the range of floats."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def json_object(value: object, subject: str) -> JsonObject:
    """``value`` unchanged, if it is a JSON object. ``subject`` names it in the message.

    Raises TypeError for any other value: callers pass content that this program wrote itself.
    """
    if not isinstance(value, dict):
        raise TypeError(f"{subject} is {type(value).__name__}, expected a JSON object")
    return value
