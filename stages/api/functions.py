"""Addresses of Python functions passed to a step, so that a recipe can name them.

A function of an importable module has its usual address (``package.module:function``). Any other callable (a lambda, a notebook function,
an object) is stored in this module until the process ends. Its name ends in a digest of what it computes (stages/api/identity.py), so a
changed function causes a re-run.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from stages.api.identity import digest_of

_kept: dict[str, Callable[..., object]] = {}
_after_run: dict[tuple[int, str], str] = {}  # (id of a kept callable, its digest after a run) -> its name in that run
_passed: ContextVar[list[str] | None] = ContextVar("passed", default=None)


def __getattr__(name: str) -> Callable[..., object]:
    if name in _kept:
        return _kept[name]
    raise AttributeError(f"no function {name!r} was passed to a step in this process; run the program that made this step")


def address_of(function: Callable[..., object]) -> str:
    """The address that a recipe uses to name ``function``."""
    module, name = getattr(function, "__module__", None) or "", getattr(function, "__qualname__", "")
    if module not in ("", "__main__", "builtins") and name.isidentifier() and _is_importable(module, name, function):
        return f"{module}:{name}"
    digest = digest_of(function)
    kept = _after_run.get((id(function), digest)) or f"{_plain_name(function, '_')}_{digest[:10]}"
    _kept[kept] = function
    if (passed := _passed.get()) is not None:
        passed.append(kept)
    return f"{__name__}:{kept}"


@contextmanager
def unchanged_by_the_run() -> Iterator[None]:
    """Context of one run. A callable whose own calls change it (it counts, or has a cache) keeps its name after the run.

    Without this, the same call would not continue an interrupted run, or reuse a completed one.
    """
    token = _passed.set([])
    try:
        yield
    finally:
        for name in _passed.get() or []:
            function = _kept[name]
            _after_run[id(function), digest_of(function)] = name
        _passed.reset(token)


def shown_name(function: Callable[..., object]) -> str:
    """The name in metrics and reports: the function's name."""
    return _plain_name(function, "-")


def _plain_name(function: object, separator: str) -> str:
    """The name of a function, of the function inside a ``functools.partial``, or of an object's class."""
    inside = getattr(function, "func", None)
    named = inside if callable(inside) and not hasattr(function, "__name__") else function
    return re.sub(r"\W+", separator, getattr(named, "__name__", type(named).__name__)).strip(separator) or "function"


def _is_importable(module: str, name: str, function: object) -> bool:
    try:
        return getattr(importlib.import_module(module), name, None) is function
    except ImportError:
        return False
