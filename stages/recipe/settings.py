"""Every setting of a step as it will run, and where its value comes from: the command line, the recipe, a preset, or a default."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from rich.table import Table
from rich.text import Text

from stages.recipe.schema import Recipe, RecipeStep
from stages.recipe.source import Steps, show


@dataclass(frozen=True)
class Setting:
    """One value: ``kind`` is override, recipe, preset or default; ``origin`` says where exactly."""

    path: str
    value: Any
    kind: str
    origin: str

    def as_json(self) -> dict[str, Any]:
        return {"setting": self.path, "value": self.value, "from": self.kind, "origin": self.origin}


def settings_of_step(recipe: Recipe, step: RecipeStep) -> list[Setting]:
    """All settings, in the order of the schema."""
    return [_setting(recipe, step, path, value) for path, value in _leaves(step.config, ())]


def preset_settings(recipe: Recipe, step: RecipeStep) -> list[Setting]:
    """The settings that the step's preset has, whether or not the recipe overrode them; empty without a preset."""
    from stages.recipe.presets import PRESETS

    if step.preset is None:
        return []
    known = {*PRESETS[step.preset.name].stages[step.stage], *step.preset.values}
    return [setting for setting in settings_of_step(recipe, step) if setting.path in known]


def _setting(recipe: Recipe, step: RecipeStep, path: Steps, value: Any) -> Setting:
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
    """The place in the recipe, or the override, that says what stands at ``path``; None where neither does."""
    node: Any = recipe.source.content["steps"][index]
    reached: Steps = ("steps", index)
    for depth, key in enumerate(path):
        if isinstance(node, dict) and key in node or isinstance(node, list) and isinstance(key, int) and key < len(node):
            node = node[key]  # type: ignore[index]
            reached = (*reached, key)
        elif isinstance(node, dict | list):
            # A block without this key leaves it open; a list of data sources may be written as its only item.
            if isinstance(node, dict) and isinstance(key, int):
                continue
            return None
        else:
            # A bare value that stands for a block (model: sft) says what is referred to, and leaves the block's other fields open.
            if not set(path[depth:]) <= {"model", "ref", "path", 0}:
                return None
            break
    return recipe.source.place(reached).rpartition(": ")[0]


def _leaves(value: Any, path: Steps) -> Iterator[tuple[Steps, Any]]:
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


def settings_table(recipe: Recipe, step: RecipeStep, settings: list[Setting]) -> Table:
    """The settings for a terminal; what the recipe or the command line sets stands out."""
    title = f"{step.name} ({step.stage}){f': preset {step.preset.name}' if step.preset is not None else ''}"
    table = Table("setting", "value", "from", title=title, title_justify="left", caption_justify="left")
    if step.preset is not None and step.preset.note is not None:
        table.caption = f"Beside these: {step.preset.note}."
    styles = {"override": "bold yellow", "recipe": "bold", "preset": "", "default": "dim"}
    for setting in settings:
        style = styles[setting.kind]
        table.add_row(*(Text(text, style=style) for text in (setting.path, _word(setting.value), setting.origin)))
    return table


def _word(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value) if isinstance(value, str) and (not value or value != value.strip() or not value.isprintable()) else str(value)
