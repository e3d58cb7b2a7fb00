"""Addresses of Python functions passed to a step, so that a recipe can name them.

A function of an importable module has its usual address (``package.module:function``). Any other callable (a lambda, a notebook function,
an object) is stored in this module until the process ends. Its name ends in a hash of its source, so a changed function causes a re-run.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import re
from collections.abc import Callable
from types import CodeType

_kept: dict[str, Callable[..., object]] = {}


def __getattr__(name: str) -> Callable[..., object]:
    if name in _kept:
        return _kept[name]
    raise AttributeError(f"no function {name!r} was passed to a step in this process; run the program that made this step")


def address_of(function: Callable[..., object]) -> str:
    """The address that a recipe uses to name ``function``."""
    module, name = getattr(function, "__module__", None) or "", getattr(function, "__qualname__", "")
    if module not in ("", "__main__", "builtins") and name.isidentifier() and _is_importable(module, name, function):
        return f"{module}:{name}"
    plain = re.sub(r"\W+", "_", getattr(function, "__name__", type(function).__name__)).strip("_") or "function"
    kept = f"{plain}_{hashlib.sha256(_source(function).encode()).hexdigest()[:10]}"
    _kept[kept] = function
    return f"{__name__}:{kept}"


def shown_name(function: Callable[..., object]) -> str:
    """The name in metrics and reports: the function's name."""
    return re.sub(r"\W+", "-", getattr(function, "__name__", type(function).__name__)).strip("-") or "function"


def _is_importable(module: str, name: str, function: object) -> bool:
    try:
        return getattr(importlib.import_module(module), name, None) is function
    except ImportError:
        return False


def _source(function: object) -> str:
    """The source of a callable (its bytecode if there is no source), and its captured values."""
    held = repr([cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]) + repr(getattr(function, "__dict__", {}))
    try:
        return inspect.getsource(function if inspect.isroutine(function) else type(function)) + held
    except (OSError, TypeError):
        code = getattr(function, "__code__", None)
        return (_bytecode(code) if isinstance(code, CodeType) else repr(function)) + held


def _bytecode(code: CodeType) -> str:
    return repr((code.co_code, code.co_names, [_bytecode(one) if isinstance(one, CodeType) else one for one in code.co_consts]))
