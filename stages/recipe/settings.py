"""All settings of a step, and the origin of each value: the command line, the recipe, a preset, or a default."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pydantic import BaseModel
from rich.text import Text

from stages.json_types import JsonObject
from stages.process.tables import Table
from stages.recipe.presets import PRESETS
from stages.recipe.schema import Recipe, RecipeStep
from stages.recipe.source import Steps, entry, show


@dataclass(frozen=True)
class Setting:
    """One value. ``kind`` is override, recipe, preset or default; ``origin`` gives the exact location."""

    path: str
    value: object
    kind: str
    origin: str

    def as_json(self) -> JsonObject:
        return {"setting": self.path, "value": self.value, "from": self.kind, "origin": self.origin}


def settings_of_step(recipe: Recipe, step: RecipeStep) -> list[Setting]:
    """All settings in schema order."""
    return [_setting(recipe, step, path, value) for path, value in _leaves(step.config, ())]


def preset_settings(recipe: Recipe, step: RecipeStep) -> list[Setting]:
    """The settings that the step's preset defines, even if the recipe overrides them; empty without a preset."""
    if step.preset is None:
        return []
    known = {*PRESETS[step.preset.name].stages[step.stage], *step.preset.values}
    return [setting for setting in settings_of_step(recipe, step) if setting.path in known]


def _setting(recipe: Recipe, step: RecipeStep, path: Steps, value: object) -> Setting:
    where = _where(recipe, step.index, path)
    name = show(path)
    if where is not None:
        kind = "override" if where.startswith("override") else "recipe"
        return Setting(name, value, kind, where)
    filled = step.preset.values.get(name) if step.preset is not None else None
    if filled is not None and step.preset is not None:
        return Setting(name, value, "preset", f"{step.preset.name}: {filled.origin}")
    return Setting(name, value, "default", "default")


def _where(recipe: Recipe, index: int, path: Steps) -> str | None:
    """The location in the recipe, or the override, that sets ``path``; None if neither does."""
    node = recipe.source.steps[index]
    reached: Steps = ("steps", index)
    for depth, key in enumerate(path):
        if isinstance(node, dict) and key in node or isinstance(node, list) and isinstance(key, int) and key < len(node):
            node = entry(node, key)
            reached = (*reached, key)
        elif isinstance(node, dict | list):
            # A block without this key leaves it unset. A list with one data source may be written as that source.
            if isinstance(node, dict) and isinstance(key, int):
                continue
            return None
        else:
            # A bare value in place of a block (model: sft) sets only the reference; the block's other fields are unset.
            if not set(path[depth:]) <= {"model", "ref", "path", 0}:
                return None
            break
    return recipe.source.location(reached).rpartition(": ")[0]


def _leaves(value: object, path: Steps) -> Iterator[tuple[Steps, object]]:
    if isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from _leaves(getattr(value, name), (*path, name))
    elif isinstance(value, dict) and value and all(isinstance(item, BaseModel) for item in value.values()):
        for key, item in value.items():
            yield from _leaves(item, (*path, key))
    elif isinstance(value, list) and value and all(isinstance(item, BaseModel) for item in value):
        for index, item in enumerate(value):
            yield from _leaves(item, (*path, index))
    else:
        yield path, value


def settings_table(step: RecipeStep, settings: list[Setting]) -> Table:
    """The settings as a terminal table. Values from the recipe or the command line are highlighted."""
    title = f"{step.name} ({step.stage}){f': preset {step.preset.name}' if step.preset is not None else ''}"
    table = Table("setting", "value", "from", title=title, title_justify="left", caption_justify="left")
    if step.preset is not None and step.preset.note is not None:
        table.caption = f"Note: {step.preset.note}."
    styles = {"override": "bold yellow", "recipe": "bold", "preset": "", "default": "dim"}
    for setting in settings:
        style = styles[setting.kind]
        table.add_row(*(Text(text, style=style) for text in (setting.path, _word(setting.value), setting.origin)))
    return table


def _word(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value) if isinstance(value, str) and (not value or value != value.strip() or not value.isprintable()) else str(value)
