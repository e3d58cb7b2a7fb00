"""Validate a recipe block against its schema, with one clear message: location, value, expectation."""

from __future__ import annotations

import re
import types
from collections.abc import Iterator, Sequence
from typing import Annotated, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from stages.errors import RecipeError, StagesError
from stages.recipe.source import RecipeSource, Steps, nearest, show

EXPECTED = {
    "float_type": "a number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "string_type": "text",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a block of fields",
    "model_type": "a block of fields",
    "greater_than": "a number above {gt}",
    "greater_than_equal": "a number of at least {ge}",
    "less_than": "a number below {lt}",
    "less_than_equal": "a number of at most {le}",
    "literal_error": "one of {expected}",
    "too_short": "at least {min_length} items",
}

PATTERNS = {
    r"^[A-Za-z0-9][A-Za-z0-9_.-]*$": "letters, digits and _-. after a first letter or digit",
    r"^[\w.-]+$": "letters, digits and _-.",
    r"^[\w-]+$": "letters, digits, _ and -",
    r"^[A-Za-z_]\w*$": "the name of an environment variable",
    r"^[\w.]+:\w+$": "package.module:function",
    r"^https?://\S+$": "an address that begins with http:// or https://",
}
"""What to expect of a text, by the pattern of its field."""

HELD_OUT = dict.fromkeys(("test", "eval", "evaluation", "dev", "valid", "val", "heldout"), "validation")
"""Names of the held-out rows in other tools."""

TEMPLATE_ARGUMENTS = ("chat_template_kwargs", "apply_chat_template_kwargs", "default_chat_template_kwargs")
"""Names of the field ``template_arguments`` of a model in other tools."""

Block = TypeVar("Block", bound=BaseModel)
SECRET_FIELD = re.compile(r"(?i)api_?key|secret|passw|credential")  # the value may be the secret itself instead of its name


def validate(model: type[Block], content: object, path: Steps, source: RecipeSource) -> Block:
    """Parse ``content`` (at ``path`` in the recipe) as a ``model``. Raises RecipeError for the first problem."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        more = f" (and {len(problems) - 1} more below it)" if len(problems) > 1 else ""
        raise _explained(problems[0], model, content, path, source, more) from error
    except StagesError as error:
        raise source.error(path, str(error)) from error


def _explained(problem: ErrorDetails, model: type[BaseModel], content: object, path: Steps, source: RecipeSource, more: str) -> RecipeError:
    """Convert a pydantic error to one clear message: location, value, expectation."""
    kind, location = problem["type"], problem["loc"]
    where = (*path, *_written(location, content, keep_last=kind in ("missing", "extra_forbidden")))
    if kind == "extra_forbidden":
        known = sorted({name for block in _blocks_at(model, location[:-1]) for name in block.model_fields})
        if (held_out := HELD_OUT.get(str(location[-1]))) in known:
            return source.error(where, f"unknown field {str(location[-1])!r}; did you mean {held_out!r}?{more}")
        here = "template_arguments" if location[-1] in TEMPLATE_ARGUMENTS else location[-1]
        if here in known:
            return source.error(where, f"unknown field {str(location[-1])!r}; did you mean {here!r}?{more}")
        if other := _same_name(model, (*location[:-1], here)):
            return source.error(where, f"unknown field {str(location[-1])!r}; did you mean {show((*path, *other))}?{more}")
        return source.error(where, f"unknown field {str(location[-1])!r}; {nearest(location[-1], known)}{more}")
    description = next(
        (
            block.model_fields[location[-1]].description
            for block in _blocks_at(model, location[:-1])
            if location and location[-1] in block.model_fields
        ),
        None,
    )
    about = f" {location[-1]}: {description}" if description else ""
    if kind == "missing" and (advice := _instead_of_splits(location, problem["input"])):
        return source.error(where[:-1], advice + more)
    if kind == "missing":
        return source.error(where, f"this field is missing.{about}{more}")
    if kind in ("value_error", "assertion_error"):
        return source.error(where, problem["msg"].partition(", ")[2] + more)
    expected = _expected(problem)
    got = "a text that is not shown" if location and SECRET_FIELD.search(str(location[-1])) else _short(problem["input"])
    return source.error(where, f"got {got}, expected {expected}.{about}{more}")


def _instead_of_splits(location: Sequence[str | int], value: object) -> str:
    """What to write instead of a mapping of splits (``train: FILE``) where a source is expected; empty if ``value`` is none."""
    names = [name for name in ("train", "validation", *HELD_OUT) if isinstance(value, dict) and name in value]
    if location[-1] != "path" or not isinstance(value, dict) or not names:
        return ""
    field, source = location[-2] if isinstance(location[-2], str) else location[-3], value[names[0]]
    example = f"{field}: {source}" if isinstance(source, str) else f"the block of {names[0]} directly under {field}"
    return f"unknown field {names[0]!r}: this field takes a source of rows, without the names of splits. Write {example}"


def _expected(problem: ErrorDetails) -> str:
    kind, context = problem["type"], problem.get("ctx", {})
    if kind == "string_pattern_mismatch":
        return PATTERNS.get(context["pattern"], f"a text of the form {context['pattern']}")
    return EXPECTED[kind].format(**context) if kind in EXPECTED else problem["msg"]


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _written(location: Sequence[str | int], content: object, *, keep_last: bool) -> Iterator[str | int]:
    """The part of a pydantic location that occurs in the recipe, without union members and expanded shorthands."""
    for depth, key in enumerate(location):
        if isinstance(content, dict) and key in content:
            content = content[str(key)]
            yield key
        elif isinstance(content, list) and isinstance(key, int) and key < len(content):
            content = content[key]
            yield key
        elif keep_last and depth == len(location) - 1:
            yield key


def _blocks_at(model: type[BaseModel], location: Sequence[str | int]) -> list[type[BaseModel]]:
    """The blocks (pydantic models) that the schema allows at a location."""
    here: list[object] = [model]
    for key in location:
        below: list[object] = []
        for kind in _flattened(here):
            if isinstance(kind, type) and issubclass(kind, BaseModel) and key in kind.model_fields:
                below.append(kind.model_fields[str(key)].annotation)
            elif get_origin(kind) is list and isinstance(key, int) or get_origin(kind) is dict:
                below.append(get_args(kind)[-1])
        here = below or here  # a union member's name in the location is not a field
    return [kind for kind in _flattened(here) if isinstance(kind, type) and issubclass(kind, BaseModel)]


def _same_name(model: type[BaseModel], location: Steps) -> Steps | None:
    """The location of a field with the last name of ``location`` in a block around it, or in a block next to it."""
    above, name = location[:-1], location[-1]
    around = [above[:depth] for depth in range(len(above) - 1, -1, -1)]
    beside = [(*above, field) for block in _blocks_at(model, above) for field in block.model_fields]
    for block in [*around, *beside]:
        if any(name in kind.model_fields for kind in _blocks_at(model, block)):
            return (*block, name)
    return None


def _flattened(kinds: Sequence[object]) -> Iterator[object]:
    for kind in kinds:
        if get_origin(kind) in (Union, types.UnionType):
            yield from _flattened(list(get_args(kind)))
        elif get_origin(kind) is Annotated:
            yield from _flattened([get_args(kind)[0]])
        else:
            yield kind
