"""The arguments of a reward function, from its signature, or from its source code without running the module.

score(prompts, completions)                       two lists of texts; their parameters may have any names
score(prompts, completions, answer)               ``answer`` is a column of the data set
score(completions, **columns)                     the texts that it names, and every column
score(prompts, completions, messages, completion_ids)
"""

from __future__ import annotations

import ast
import difflib
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from inspect import Parameter

from stages.corpora.rows import Row
from stages.errors import DataError, RecipeError
from stages.json_types import JsonObject
from stages.process.packages import EXPECTED_MODULE, source_of
from stages.rewards.config import RewardInput, leaves

GIVEN = ("prompts", "completions", "messages", "completion_ids")
"""Arguments that are not columns of the data set."""


@dataclass(frozen=True)
class Signature:
    """The parameters of one reward function.

    ``by_position``: prompts and completions are passed as the first two positional arguments.
    """

    address: str
    parameters: tuple[Parameter, ...]
    by_position: bool

    @property
    def _named(self) -> list[Parameter]:
        """The parameters whose values are selected by their names."""
        plain = [one for one in self.parameters if one.kind not in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)]
        taken = [one for one in plain if one.kind is not Parameter.KEYWORD_ONLY][:2] if self.by_position else []
        return [one for one in plain if one not in taken]

    @property
    def takes_everything(self) -> bool:
        """Whether the function has a ``**parameter``."""
        return any(one.kind is Parameter.VAR_KEYWORD for one in self.parameters)

    @property
    def takes_texts(self) -> bool:
        """Whether the function can receive the completions, by name or as its second positional argument."""
        if not self.by_position:
            return True
        positional = [one for one in self.parameters if one.kind in (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)]
        return len(positional) > 1 or any(one.kind is Parameter.VAR_POSITIONAL for one in self.parameters)

    def columns(self, row: Row) -> JsonObject:
        """The columns of ``row`` that the function receives. Raises DataError if a required column is missing."""
        columns = {}
        for one in self._named:
            if one.name in GIVEN:
                continue
            if one.name in row:
                columns[one.name] = row[one.name]
            elif one.default is Parameter.empty:
                raise _missing(f"the reward function {self.address}", one.name, row)
        if self.takes_everything:
            columns |= {name: value for name, value in row.items() if name not in GIVEN and name.isidentifier()}
        return columns

    def arguments(self, given: Mapping[str, object], columns: Mapping[str, Sequence[object]]) -> tuple[list[object], JsonObject]:
        """(positional arguments, keyword arguments) of a call. ``given``: the values of the names in GIVEN; None: not available.

        Raises LookupError with the name of a required parameter that has no value.
        """
        values = {**columns, **{name: value for name, value in given.items() if value is not None}}
        ordered = [given["prompts"], given["completions"]] if self.by_position else []
        named: JsonObject = {}
        for one in self._named:
            if one.name not in values:
                if one.default is Parameter.empty:
                    raise LookupError(one.name)
                if one.kind is Parameter.POSITIONAL_ONLY:
                    ordered.append(one.default)
            elif one.kind is Parameter.POSITIONAL_ONLY:
                ordered.append(values[one.name])
            else:
                named[one.name] = values[one.name]
        if self.takes_everything:
            own = ("prompts", "completions") if self.by_position else ()
            named |= {name: value for name, value in values.items() if name not in own and name not in named and self._is_free(name)}
        return ordered, named

    def _is_free(self, name: str) -> bool:
        return all(one.name != name for one in self.parameters)


@dataclass(frozen=True)
class NamedColumns:
    """Columns that a recipe names for a reward source."""

    who: str
    names: tuple[str, ...]

    def columns(self, row: Row) -> JsonObject:
        """The named columns of ``row``. Raises DataError if one is missing."""
        for name in self.names:
            if name not in row:
                raise _missing(self.who, name, row)
        return {name: row[name] for name in self.names}


def _missing(who: str, name: str, row: Row) -> DataError:
    near = difflib.get_close_matches(name, row, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return DataError(
        f"{row.location}: {who} needs the column {name!r}, but the row has {', '.join(row)}{hint} (rename it in the file, or with "
        f"columns: {{{name}: THEIRS}} in the data)"
    )


def load_function(address: str) -> Callable[..., object]:
    """Import the function ``package.module:name``.

    Raises RecipeError if the module cannot be imported, or the name is missing, not callable, or takes fewer than two lists.
    """
    module, _, name = address.partition(":")
    try:
        function: object = importlib.import_module(module)
    except ImportError as error:
        raise RecipeError(f"function {address!r}: cannot import {module} ({error}); {EXPECTED_MODULE}") from error
    except Exception as error:  # raised by the module's own code
        raise RecipeError(f"function {address!r}: cannot import {module} ({type(error).__name__}: {error})") from error
    if not hasattr(function, name):
        raise RecipeError(f"function {address!r}: {module} has no {name!r}")
    function = getattr(function, name)
    if not callable(function):
        raise RecipeError(f"function {address!r} is {type(function).__name__}; expected a function of (prompts, completions)")
    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(type(function), "__call__", None)):  # noqa: B004
        raise RecipeError(f"function {address!r} is async; expected a plain function, which may call asyncio.run")
    if not signature_of(function, address).takes_texts:
        raise RecipeError(f"function {address!r} takes {_shown(function)}; expected a function of (prompts, completions)")
    return function


def _shown(function: Callable[..., object]) -> str:
    return str(inspect.signature(function))


def signature_of(function: Callable[..., object], address: str) -> Signature:
    """The signature of an imported function. A function without one (some C functions) is called with prompts and completions."""
    try:
        return _signature(address, inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return Signature(address, (Parameter("texts", Parameter.VAR_POSITIONAL),), by_position=True)


def signature_in_source(address: str) -> Signature | None:
    """The signature of ``package.module:name`` from its source code, without running the module.

    Returns None if there is no readable source, or if the name is not a plain function there (imported, decorated, or made at run time).
    """
    module, _, name = address.partition(":")
    source = source_of(module)
    if source is None:
        return None
    try:
        tree = ast.parse(source.read_text(encoding="utf-8", errors="replace"))
    except (SyntaxError, ValueError):
        return None
    defined = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == name]
    if len(defined) != 1 or defined[0] not in tree.body or defined[0].decorator_list:
        return None
    return _signature(address, _parameters(defined[0].args))


def _parameters(arguments: ast.arguments) -> list[Parameter]:
    """The parameters of a function definition. A parameter with a default gets the default None, because the value is not evaluated."""
    ordered: list[tuple[ast.arg, inspect._ParameterKind]] = [(argument, Parameter.POSITIONAL_ONLY) for argument in arguments.posonlyargs]
    ordered += [(argument, Parameter.POSITIONAL_OR_KEYWORD) for argument in arguments.args]
    without = len(ordered) - len(arguments.defaults)
    parameters = [
        Parameter(argument.arg, kind, default=Parameter.empty if index < without else None)
        for index, (argument, kind) in enumerate(ordered)
    ]
    if arguments.vararg is not None:
        parameters.append(Parameter(arguments.vararg.arg, Parameter.VAR_POSITIONAL))
    parameters += [
        Parameter(argument.arg, Parameter.KEYWORD_ONLY, default=Parameter.empty if default is None else None)
        for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    ]
    if arguments.kwarg is not None:
        parameters.append(Parameter(arguments.kwarg.arg, Parameter.VAR_KEYWORD))
    return parameters


def _signature(address: str, parameters: Iterable[Parameter]) -> Signature:
    """The signature for ``parameters``.

    Prompts and completions are passed by position if no parameter is named ``completions``. They are also passed by position if
    ``completions`` is the second parameter and the name of the first is not in GIVEN.
    """
    ordered = tuple(parameters)
    names = [one.name for one in ordered]
    second = len(ordered) > 1 and names[1] == "completions" and names[0] not in GIVEN
    return Signature(address, ordered, by_position=second or "completions" not in names)


def columns_asked_for(sources: Sequence[RewardInput], *, run: bool = True) -> Callable[[Row], JsonObject]:
    """A function that selects the columns of a data row that the functions and endpoints among ``sources`` need.

    The returned function raises DataError if a required column is missing. ``run=False``: no module is imported; a function whose source
    does not show its signature then adds no columns. Raises RecipeError if a function cannot be imported or takes fewer than two lists.
    """
    signatures: list[Signature | NamedColumns] = []
    for source in leaves(list(sources), "reward").values():
        if source.endpoint is not None:
            names = (*source.columns, *([source.label_column] if source.label_column is not None else []))
            signatures.append(NamedColumns(f"the reward {source.shown_name}", names))
        if source.function is not None:
            signature = signature_of(load_function(source.function), source.function) if run else signature_in_source(source.function)
            signatures += [signature] if signature is not None else []

    def columns(row: Row) -> JsonObject:
        selected: JsonObject = {}
        for one in signatures:
            selected |= one.columns(row)
        return selected

    return columns
