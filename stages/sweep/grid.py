"""The grid of a sweep, read from the command line: axes of values, seeds, and overrides for every run.

aligned.kl.coef=[0.01,0.1]              an axis with two values
small.kl.coef+large.kl.coef=[0.01,0.1]  one axis; both fields get the same value
sft.data=[[a.jsonl],[a.jsonl,b.jsonl]]  values that are lists
aligned.rollout_batch_size=32           the same in every run
aligned.monitors+={model: judge}        an item that is added to a list in every run
seeds=3   seeds=[7,11]   aligned.seeds=3   a number of seeds, starting at the recipe's (or step's), or a list; for all steps, or one step
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from stages.errors import RecipeError
from stages.json_types import JsonObject
from stages.recipe.schema import Recipe, load_recipe
from stages.recipe.source import parse_value
from stages.registry.ledger import Registry

SEEDS = "seeds"
LONGEST_NAME = 80  # characters in a folder name


@dataclass(frozen=True)
class Axis:
    """Fields that take each of ``values`` together. ``label`` is the axis as written."""

    label: str
    fields: tuple[str, ...]
    values: list[object]


@dataclass(frozen=True)
class Point:
    """One run of a sweep: a value per axis, a seed per replicated field, and the resulting overrides."""

    values: JsonObject
    seeds: dict[str, int]
    overrides: tuple[str, ...]

    def __str__(self) -> str:
        shown = {**self.values, **self.seeds}
        return "  ".join(f"{label}={shown_value(value)}" for label, value in shown.items()) or "the recipe unchanged"


@dataclass(frozen=True)
class Grid:
    """All runs of a sweep."""

    axes: list[Axis]
    seeds: dict[str, list[int]]  # override target (seed, STEP.seed) -> seeds, all of equal length
    fixed: list[str] = field(default_factory=list)

    @property
    def num_replicates(self) -> int:
        return len(next(iter(self.seeds.values()))) if self.seeds else 1

    @property
    def name(self) -> str:
        """A folder name: the varied fields. Fixed overrides add a hash, because they define a different sweep."""
        labels = "-".join(axis.label for axis in self.axes) or SEEDS
        safe = "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in labels)
        hashed_name = [safe] if len(safe) > LONGEST_NAME else []
        if not (hashed_name or self.fixed):
            return safe
        return f"{safe[:LONGEST_NAME]}-{hashlib.sha256(repr([*hashed_name, *sorted(self.fixed)]).encode()).hexdigest()[:8]}"

    def points(self) -> Iterator[Point]:
        """All runs. Seeds vary slowest, so that results for the full grid are available early."""
        for replicate in range(self.num_replicates):
            seeds = {target: values[replicate] for target, values in self.seeds.items()}
            for chosen in itertools.product(*(axis.values for axis in self.axes)):
                values = {axis.label: value for axis, value in zip(self.axes, chosen, strict=True)}
                overrides = [
                    f"{target}={json.dumps(value, ensure_ascii=False)}"
                    for axis, value in zip(self.axes, chosen, strict=True)
                    for target in axis.fields
                ]
                overrides += [f"{target}={seed}" for target, seed in seeds.items()]
                yield Point(values, seeds, (*self.fixed, *overrides))


def read_grid(path: str, arguments: Sequence[str], registry: Registry | None = None) -> Grid:
    """The grid that ``arguments`` define. Raises RecipeError that names the argument."""
    axes: list[Axis] = []
    counts: dict[str, int | list[int]] = {}
    fixed: list[str] = []
    added: list[str] = []
    for argument in arguments:
        target, separator, written = argument.partition("=")
        target = target.strip()
        if not separator:
            raise RecipeError(f"{argument!r}: expected field=[value, value], field=value or seeds=3")
        value = parse_value(written, argument)
        if target.endswith("+"):
            added.append(argument)
        elif target.rpartition(".")[2] == SEEDS:
            counts[target.removesuffix(SEEDS) + "seed"] = _checked_seeds(value, argument)
        elif isinstance(value, list):
            if not value:
                raise RecipeError(f"{argument!r}: an axis needs at least one value")
            axes.append(Axis(target, tuple(part.strip() for part in target.split("+")), value))
        else:
            fixed += [f"{part.strip()}={written}" for part in target.split("+")]
    varied = [part for axis in axes for part in axis.fields]
    _check_once([*varied, *(text.partition("=")[0] for text in fixed), *{text.partition("+=")[0].strip() for text in added}])
    _check_once([*varied, *counts])  # seed=5 seeds=3 is allowed: three seeds starting at 5
    fixed += added
    base = load_recipe(path, fixed, registry)
    seeds = {target: _seeds(target, count, base) for target, count in counts.items()}
    if len({len(values) for values in seeds.values()}) > 1:
        said = ", ".join(f"{target}: {len(values)}" for target, values in seeds.items())
        raise RecipeError(f"seeds of several steps vary together, so their counts must be equal ({said})")
    return Grid(axes, seeds, fixed)


def _checked_seeds(value: object, argument: str) -> int | list[int]:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return value
    if isinstance(value, list) and value and all(isinstance(item, int) and item >= 0 for item in value):
        return value
    raise RecipeError(f"{argument!r}: expected a number of seeds (seeds=3) or a list (seeds=[7, 11])")


def _seeds(target: str, count: int | list[int], recipe: Recipe) -> list[int]:
    if isinstance(count, list):
        return count
    step = next((step for step in recipe.steps if f"{step.name}.seed" == target), None)
    if step is None and target != "seed":
        known = ", ".join(f"{step.name}.{SEEDS}" for step in recipe.steps)
        raise RecipeError(f"{target}s: the recipe has no such step; expected {SEEDS} or one of {known}")
    first = recipe.seed if step is None else step.seed
    return list(range(first, first + count))


def _check_once(targets: list[str]) -> None:
    for target in targets:
        if targets.count(target) > 1:
            raise RecipeError(f"{target} is given more than once; list all values in one axis: {target}=[1, 2]")


def shown_value(value: object) -> str:
    """A value as shown in a table."""
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
