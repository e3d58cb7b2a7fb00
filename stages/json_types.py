"""Types of JSON content, and functions on it. Content with known keys has a ``TypedDict`` or a dataclass instead."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TypeAlias, TypeGuard, TypeVar, cast

Content = TypeVar("Content")
JsonObject: TypeAlias = dict[str, object]
"""A JSON object whose keys are not known in advance. A reader narrows a value with ``isinstance`` before it uses the value."""


def is_finite_number(value: object) -> TypeGuard[int | float]:
    """Whether ``value`` is a number that a float can represent: no bool, NaN or infinity, and no integer beyond the range of floats."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def with_values(content: Content, change: Callable[[object], object]) -> Content:
    """A copy of ``content`` in which ``change`` has replaced every value that is neither an object nor a list. The structure stays."""

    def changed(value: object) -> object:
        if isinstance(value, Mapping):
            return {key: changed(item) for key, item in value.items()}
        return [changed(item) for item in value] if isinstance(value, list | tuple) else change(value)

    return cast(Content, changed(content))


def finite(content: Content) -> Content:
    """``content`` with None in place of NaN and infinity, which JSON does not have."""
    return with_values(content, lambda value: None if isinstance(value, float) and not math.isfinite(value) else value)


def by_path(value: object, prefix: str = "") -> JsonObject:
    """Nested content as one flat object: field path -> value, e.g. ``{"reward[0].weight": 1.0}``."""
    if isinstance(value, dict) and value:
        below = {f"{prefix}.{key}" if prefix else str(key): item for key, item in value.items()}
    elif isinstance(value, list) and value:
        below = {f"{prefix}[{index}]": item for index, item in enumerate(value)}
    else:
        return {prefix: value}
    return {path: leaf for start, item in below.items() for path, leaf in by_path(item, start).items()}


def json_object(value: object, subject: str) -> JsonObject:
    """``value`` unchanged, if it is a JSON object. ``subject`` names it in the message.

    Raises TypeError for any other value: callers pass content that this program wrote itself.
    """
    if not isinstance(value, dict):
        raise TypeError(f"{subject} is {type(value).__name__}, expected a JSON object")
    return value
