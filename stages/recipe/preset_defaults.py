"""Apply a preset: its settings are defaults for those that a step of a recipe does not set."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

from stages.json_types import JsonObject
from stages.recipe.presets import PRESETS, Settings, Value
from stages.recipe.source import RecipeSource, Steps, nearest, parse_path


@dataclass(frozen=True)
class Applied:
    """A preset as applied to a step: the values that it sets, by field path, and a note on what it cannot set."""

    name: str
    values: Settings
    note: str | None


def apply_preset(content: Mapping[str, object], path: Steps, source: RecipeSource) -> tuple[JsonObject, Applied | None]:
    """Return (the step's content with preset values added, the applied preset).

    Raises RecipeError for an unknown preset or missing field.
    """
    name, stage = content.get("preset"), content.get("stage")
    if name is None:
        return dict(content), None
    if not isinstance(name, str) or name not in PRESETS:
        raise source.error((*path, "preset"), f"got {name!r}, which is not a preset; {nearest(name, PRESETS)}")
    preset = PRESETS[name]
    if not isinstance(stage, str) or stage not in preset.stages:
        reason = preset.missing.get(str(stage), f"only for {', '.join(preset.stages)}")
        raise source.error((*path, "preset"), f"{name!r} has nothing for the stage {stage}: {reason}")
    merged = copy.deepcopy(dict(content))
    values = _scaled(preset.stages[stage], merged)
    filled = {field_path: value for field_path, value in values.items() if _fill(merged, parse_path(field_path), value.value)}
    for field_path, purpose in preset.required.get(stage, {}).items():
        keys = parse_path(field_path)
        if _lacks(merged, keys):
            block = keys[0]
            raise source.error(path, f"the preset {name!r} needs {field_path}: {purpose}. Or set {block}: null to do without it")
    return merged, Applied(name, filled, preset.notes.get(stage))


def _scaled(settings: Settings, content: Mapping[str, object]) -> Settings:
    """Fit the settings to the recipe's batch sizes: keep the number of minibatches."""
    scaled = dict(settings)
    if "rollout_batch_size" in settings:
        rollout, minibatch = settings["rollout_batch_size"].value, settings["minibatch_size"].value
        assert isinstance(rollout, int) and isinstance(minibatch, int)
        num_minibatches = rollout // minibatch
        given, small = content.get("rollout_batch_size"), content.get("minibatch_size")
        if isinstance(given, int) and small is None:
            parts = max(count for count in range(1, num_minibatches + 1) if given % count == 0) if given > 0 else 1
            scaled["minibatch_size"] = _because(settings["minibatch_size"], given // parts, f"{parts} minibatches")
        elif isinstance(small, int) and given is None:
            scaled["rollout_batch_size"] = _because(
                settings["rollout_batch_size"], small * num_minibatches, f"{num_minibatches} minibatches"
            )
    return scaled


def _because(value: Value, scaled: int, reason: str) -> Value:
    return Value(scaled, f"{value.source}, scaled to the recipe's batch: {reason}", value.published)


def _fill(content: JsonObject, path: Steps, value: object) -> bool:
    """Set ``value`` at ``path`` unless the recipe sets it. A block set to null counts as set."""
    node = content
    for key in map(str, path[:-1]):
        below = node.setdefault(key, {})
        if not isinstance(below, dict):
            return False
        node = below
    last = str(path[-1])
    if last in node:
        return False
    node[last] = copy.deepcopy(value)
    return True


def _lacks(content: Mapping[str, object], path: Steps) -> bool:
    """Whether the recipe does not set ``path``. A block set to null counts as set."""
    node: object = content
    for key in path:
        if not isinstance(node, dict):
            return False
        if key not in node:
            return True
        node = node[key]
    return False
