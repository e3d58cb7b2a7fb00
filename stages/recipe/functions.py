"""Functions named in recipes (``package.module:function``): check that they exist without running their module."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator

from pydantic import BaseModel

from stages.errors import RecipeError
from stages.process.packages import EXPECTED_MODULE, source_of


def addresses(value: object) -> Iterator[str]:
    """Yield every ``function`` in a recipe block, at any depth."""
    if isinstance(value, BaseModel):
        value = {name: getattr(value, name) for name in type(value).model_fields}
    if isinstance(value, dict):
        for key, item in value.items():
            if key == "function" and isinstance(item, str):
                yield item
            else:
                yield from addresses(item)
    elif isinstance(value, list):
        for item in value:
            yield from addresses(item)


def check_function(address: str) -> None:
    """Raise RecipeError if the module does not exist or its source does not contain the name. The module is not executed."""
    module, _, name = address.partition(":")
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError) as error:
        raise RecipeError(f"function {address!r}: cannot import {module} ({error}); {EXPECTED_MODULE}") from error
    if spec is None:
        raise RecipeError(f"function {address!r}: cannot import {module}; {EXPECTED_MODULE}")
    source = source_of(module)
    known = rf"\b{re.escape(name)}\b|import \*|__getattr__"
    if source is not None and not re.search(known, source.read_text(encoding="utf-8", errors="replace")):
        raise RecipeError(f"function {address!r}: {module} has no {name!r}")
