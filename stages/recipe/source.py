"""A recipe as written: YAML parsed safely, with the line of every value, and with command line overrides applied.

A path is a tuple of keys and indices, ``("steps", 1, "training", "learning_rate")``, shown as ``steps[1].training.learning_rate``.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from io import StringIO
from pathlib import Path

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from stages.config import DataSource, ModelInput
from stages.errors import RecipeError, some_of
from stages.json_types import JsonObject
from stages.shipped import shipped_recipes

Steps = tuple[str | int, ...]
PLAIN_TAGS = ("map", "seq", "str", "int", "float", "bool", "null")
LARGEST = 2**63 - 1
HEADER = ("name", "seed", "description", "trackers")  # recipe fields outside steps that an override may set
DATA_FIELDS = ("data", "train", "validation", "demonstrations", "perplexity", "exclude", "completions", "judgements")
MOST_LISTED = 8  # files that a message lists
MOST_VALUES = 100_000  # nested YAML aliases can expand to billions of values


def show(path: Iterable[str | int]) -> str:
    """Format a path as ``steps[1].training.learning_rate``."""
    text = ""
    for key in path:
        if isinstance(key, int):
            text += f"[{key}]"
        else:
            text += f"{'.' if text else ''}{key if key.isprintable() else repr(key)}"
    return text


def parse_path(text: str) -> Steps:
    """The inverse of ``show``. Raises ValueError for an invalid path."""
    parts: list[str | int] = []
    for piece in re.findall(r"[^.\[\]]+|\[\d+\]|[.\[\]]", text):
        if piece.startswith("[") and len(piece) > 1:
            parts.append(int(piece[1:-1]))
        elif piece in "[]":
            raise ValueError(f"{text!r} has an unmatched {piece!r}")
        elif piece != ".":
            parts.append(piece)
    if not parts or text.startswith((".", "[")) or text.endswith(".") or ".." in text:
        raise ValueError(f"{text!r} is not a field path")
    return tuple(parts)


def value_at(value: object, path: str) -> object:
    """The value at a field path inside objects, mappings and lists; None if it does not exist.

    A key of a mapping may contain dots, for example the name of a candidate (``pythia-2.8b``). The longest key that fits is taken.
    """
    return _follow(value, parse_path(path))


def _follow(value: object, keys: Steps) -> object:
    if not keys or value is None:
        return value
    if isinstance(value, Mapping):
        for length in range(len(keys), 0, -1):
            name = ".".join(map(str, keys[:length]))
            if name in value:
                return _follow(value[name], keys[length:])
        return None
    key, rest = keys[0], keys[1:]
    if isinstance(key, int):
        return _follow(value[key], rest) if isinstance(value, list) and key < len(value) else None
    return _follow(getattr(value, key, None), rest)


def entry(node: object, key: str | int) -> object:
    """The entry ``key`` of a block or a list. Raises KeyError or IndexError if it does not exist, TypeError if ``node`` is neither."""
    if isinstance(node, dict):
        return node[key]
    if isinstance(node, list) and isinstance(key, int):
        return node[key]
    raise TypeError(f"{node!r} has no entry {key!r}")


def nearest(name: object, known: Iterable[str]) -> str:
    """``did you mean 'x'?``, or the list of known names. Upper and lower case count as equal."""
    choices = sorted(known)
    by_lower = {choice.lower(): choice for choice in choices}
    near = difflib.get_close_matches(str(name).lower(), by_lower, n=1, cutoff=0.6)
    return f"did you mean {by_lower[near[0]]!r}?" if near else f"known: {', '.join(choices) or 'none'}"


def named(overrides: Sequence[str]) -> str:
    """``override 'sft.seed=1'``, or ``overrides 'a=1', 'b=2'``: the beginning of a message about overrides."""
    return f"override{'s' if len(overrides) > 1 else ''} {', '.join(map(repr, overrides))}"


@dataclass
class RecipeSource:
    """The plain values of a recipe, and the line of each one."""

    file: str
    content: JsonObject
    lines: dict[Steps, int] = field(default_factory=dict)  # counted from 1
    overrides: dict[Steps, str] = field(default_factory=dict)
    former: dict[Steps, str] = field(default_factory=dict)  # the name of an earlier version that a field is written with

    @property
    def steps(self) -> list[object]:
        """The entries of ``steps``, which need not be valid."""
        steps = self.content["steps"]
        assert isinstance(steps, list)  # checked by read
        return steps

    def location(self, path: Steps) -> str:
        """``recipes/x.yaml:12: steps[1].field`` or ``override 'sft.field=1': steps[1].field``."""
        for length in range(len(path), -1, -1):
            if path[:length] in self.overrides:
                return f"override {self.overrides[path[:length]]!r}: {show(path)}"
            if path[:length] in self.lines:
                written = f" (written as {self.former[path]})" if path in self.former else ""
                return f"{self.file}:{self.lines[path[:length]]}: {show(path)}{written}".rstrip(": ")
        return f"{self.file}: {show(path)}"

    def overrides_of(self, path: Steps, fields: Iterable[str]) -> list[str]:
        """The overrides that set one of ``fields`` (paths below ``path``), a part of one, or a parent of one."""
        wanted = [(*path, *parse_path(name)) for name in fields]
        return [text for key, text in self.overrides.items() if any(key[: len(one)] == one[: len(key)] for one in wanted)]

    def overrides_with(self, path: Steps, value: str) -> list[str]:
        """The overrides below ``path`` whose value contains the text ``value``; none for an empty text."""
        below = [text for key, text in self.overrides.items() if key[: len(path)] == path]
        return [text for text in below if value and value in text.partition("=")[2]]

    def error(self, path: Steps, message: str) -> RecipeError:
        return RecipeError(f"{self.location(path)}: {message}")

    def move(self, old: Steps, new: Steps) -> None:
        """Move the value at ``old`` into the block of ``new``. Raises RecipeError if the block already has it, or is no block."""
        *above, group, name = new
        step: object = self.content
        for key in above:
            step = entry(step, key)
        assert isinstance(step, dict)
        block = step.get(group, {})
        if not isinstance(block, dict) or name in block:
            today = show(new[len(above) :])
            raise self.error(old, f"{old[-1]} is the former name of {today}, and {group} is set, too; remove {old[-1]}")
        step[group] = {**block, name: step.pop(old[-1])}
        self.lines.setdefault((*above, group), self.lines.get(old, 1))
        for line in [key for key in self.lines if key[: len(old)] == old]:
            self.lines[(*new, *line[len(old) :])] = self.lines.pop(line)
        self.former[new] = str(old[-1])

    def override(self, text: str, rename: Callable[[Steps], Steps] = lambda path: path) -> None:
        """Apply ``step.field=value`` (or ``seed=8``), or ``step.field+=value``, which adds to a list.

        ``rename``: the path today of a path. Raises RecipeError that names the override.
        """
        target, separator, written = text.partition("=")
        if not separator:
            raise RecipeError(f"override {text!r}: expected step.field=value, e.g. sft.training.epochs=2 or seed=8")
        adds, target = target.rstrip().endswith("+"), target.strip().removesuffix("+").rstrip()
        try:
            written_path = self._locate(parse_path(target), target)
            path = rename(written_path)
            value, _ = _parse(written, "value")
        except (ValueError, RecipeError) as error:
            raise RecipeError(f"override {text!r}: {error}") from error
        try:
            self._assign(path, [*self._items(path), *(value if isinstance(value, list) else [value])] if adds else value)
        except (KeyError, IndexError, TypeError) as error:
            raise RecipeError(f"override {text!r}: {error.args[0]}") from error
        for known in (self.lines, self.overrides):
            for below in [key for key in known if key[: len(path)] == path]:
                del known[below]
        self.overrides[path] = text
        self.former.pop(path, None)
        if path != written_path:
            self.former[path] = str(written_path[2])

    def _locate(self, parts: Steps, target: str) -> Steps:
        """The full path of an override target, which begins with a step name or a recipe field."""
        names = [step.get("name") if isinstance(step, dict) else None for step in self.steps]
        if parts[0] == "steps" and len(parts) > 2 and isinstance(parts[1], int):
            return parts
        # Longest first, because a step name may contain dots.
        for name in sorted((name for name in names if isinstance(name, str)), key=len, reverse=True):
            if target.startswith(name + "."):
                return ("steps", names.index(name), *parse_path(target[len(name) + 1 :]))
        if len(parts) == 1 and parts[0] in HEADER:
            return parts
        if parts[0] in names:
            raise ValueError(f"{parts[0]!r} is a step; add the field to set: {parts[0]}.field=value")
        known = [name for name in names if name] + list(HEADER)
        raise ValueError(f"the recipe has no step {parts[0]!r}; {nearest(parts[0], known)}")

    def _items(self, path: Steps) -> list[object]:
        """The items of the list at ``path``; one if a single data source is written there.

        Raises TypeError for another value, and for a field that the recipe does not write: its default or its preset may have items.
        """
        value: object = self.content
        for depth, key in enumerate(path):
            value = _child(value, key, show(path[:depth])) if value is not None else None
        if value is None:
            raise TypeError(f"the recipe does not write {show(path)}, so += has no list to add to; write the complete list with =")
        items = _opened(value, 0, "")
        if not isinstance(items, list):
            raise TypeError(f"{show(path)} is {items!r:.80}, not a list; += adds to a list, and = replaces a value")
        return items

    def _assign(self, path: Steps, value: object) -> None:
        node: object = self.content
        for depth, key in enumerate(path):
            child = _child(node, key, show(path[:depth]))
            if depth == len(path) - 1:
                _put(node, key, value)
                return
            field = next((part for part in reversed(path[: depth + 1]) if isinstance(part, str)), "")
            opened = _opened(child, path[depth + 1], field)
            _put(node, key, opened)
            node = opened


def _child(node: object, key: str | int, here: str) -> object:
    """The value of ``key`` in ``node``; None for a field that a block does not have. ``here``: the path of ``node``, for messages.

    Raises TypeError or IndexError if ``node`` cannot hold ``key``.
    """
    if isinstance(key, int):
        if not isinstance(node, list):
            raise TypeError(f"{here} is not a list, so it has no item [{key}]")
        if key >= len(node):
            count = f"{len(node)} item{'s' if len(node) != 1 else ''}"
            raise IndexError(f"{here} has {count}; there is no item [{key}]. Count from [0]; += adds an item")
        return node[key]
    if not isinstance(node, dict):
        raise TypeError(f"{here} is {node!r}, not a block of fields, so it has no field {key!r}")
    return node.get(key)


def _put(node: object, key: str | int, value: object) -> None:
    """Set ``key`` of a block or a list."""
    if isinstance(key, int):
        if isinstance(node, list):
            node[key] = value
    elif isinstance(node, dict):
        node[key] = value


def _opened(child: object, key: str | int, field: str) -> object:
    """Convert ``child`` so that it can hold ``key``: create a missing block, or expand a model or data source written as a bare string.

    ``field`` is the name of the field that contains ``child``. It distinguishes models from data sources if both have the key.
    """
    if child is None and isinstance(key, str):
        return {}
    if isinstance(key, int) and (isinstance(child, str) or (isinstance(child, dict) and "path" in child)):
        return [child]  # a list with one data source may be written as that source
    if isinstance(child, str) and key in ModelInput.model_fields and not (field in DATA_FIELDS and key in DataSource.model_fields):
        return {"ref": child}
    if isinstance(child, str) and key in DataSource.model_fields:
        return {"path": child}
    return child


def find_recipe(path: Path | str) -> Path:
    """The file at ``path``, else the included recipe of that name (``quickstart``). Any other path is returned unchanged."""
    path = Path(path)
    return path if path.exists() else shipped_recipes().get(str(path), path)


def read(path: Path | str) -> RecipeSource:
    """Read a recipe file. Raises RecipeError if it is missing, not YAML, or not a mapping with a list of steps."""
    file = str(path)
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(f"{file}: no such recipe; {_recipes_near(Path(path))}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{file}: cannot be read as a recipe ({error})") from error
    content, lines = _parse(text, file)
    if not isinstance(content, dict):
        raise RecipeError(f"{file}: expected a block with the fields name and steps, got {type(content).__name__}")
    source = RecipeSource(file, content, lines)
    if "steps" not in content:
        raise RecipeError(f"{file}:1: the field steps is missing; expected a list of steps, each with a name and a stage")
    if not isinstance(content["steps"], list) or not content["steps"]:
        raise source.error(("steps",), f"got {content['steps']!r}, expected a list of at least one step, each with a name and a stage")
    return source


def _recipes_near(path: Path) -> str:
    """The recipe that ``path`` may mean, else some of the recipes in its folder and the included ones."""
    files = path.parent.glob("*.yaml") if path.parent.is_dir() else []
    nearby = [str(item) for item in sorted(files) if not item.name.startswith(".")]
    shipped = sorted(shipped_recipes())
    if (advice := nearest(path, [*nearby, *shipped])).startswith("did you mean"):
        return advice
    return f"known: {some_of(nearby, MOST_LISTED)}; included: {', '.join(shipped)}" if nearby else f"known: {', '.join(shipped)}"


def parse_value(text: str, location: str) -> object:
    """Parse the value of a piece of YAML. Raises RecipeError that begins with ``location``."""
    return _parse(text, location)[0]


def _parse(text: str, file: str) -> tuple[object, dict[Steps, int]]:
    """Parse a YAML document to plain values and their lines. Tags are refused, so that a recipe cannot create Python objects."""
    reader = YAML(typ="rt")
    try:
        document = reader.load(StringIO(text))
    except MarkedYAMLError as error:
        mark = error.problem_mark
        line = f"{mark.line + 1}: column {mark.column + 1}" if mark is not None else "1"
        problem = str(error.problem).partition(" (original value")[0]
        raise RecipeError(f"{file}:{line}: not readable as YAML: {problem}") from error
    except RecursionError as error:
        raise RecipeError(f"{file}: not readable as YAML: nested too deeply") from error
    except (YAMLError, ValueError) as error:
        raise RecipeError(f"{file}: not readable as YAML: {' '.join(str(error).split())}") from error
    lines: dict[Steps, int] = {(): 1}
    return _plain(document, (), lines, file), lines


def _plain(node: object, path: Steps, lines: dict[Steps, int], file: str) -> object:
    if len(lines) > MOST_VALUES:
        raise RecipeError(f"{file}: more than {MOST_VALUES} values; nested aliases are not supported in recipes")
    line = lines.get(path, 1)
    location = f"{file}:{line}: {show(path)}:" if path else f"{file}:{line}:"
    tag = getattr(getattr(node, "tag", None), "value", None)
    if tag is not None and str(tag).removeprefix("tag:yaml.org,2002:") not in PLAIN_TAGS:
        raise RecipeError(f"{location} the tag {tag} is not allowed; write a plain value")
    if isinstance(node, CommentedMap):
        for key in node:
            if not isinstance(key, str):
                raise RecipeError(f"{location} the key {key!r} is not text; put it in quotes")
            lines[(*path, key)] = node.lc.data[key][0] + 1 if key in (node.lc.data or {}) else line
        return {str(key): _plain(value, (*path, key), lines, file) for key, value in node.items()}
    if isinstance(node, CommentedSeq):
        items: list[object] = []
        for index, value in enumerate(node):
            lines[(*path, index)] = node.lc.item(index)[0] + 1
            items.append(_plain(value, (*path, index), lines, file))
        return items
    if isinstance(node, bool) or node is None:
        return node
    if isinstance(node, int):
        if abs(node) > LARGEST:
            raise RecipeError(f"{location} got a number of {len(str(node))} digits, expected a whole number below 2**63")
        return int(node)
    if isinstance(node, float):
        if not math.isfinite(node):
            raise RecipeError(f"{location} got {node}, expected a finite number")
        return float(node)
    if isinstance(node, str | date):
        return str(node)  # dates become text: no recipe field expects a date
    raise RecipeError(f"{location} a value of type {type(node).__name__} is not allowed; write a plain value")
