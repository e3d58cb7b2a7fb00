"""The memory of one step in the plan, and settings with which it fits into the machine."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from pydantic import ValidationError

from stages.config import StepConfig
from stages.errors import ModelError, RecipeError
from stages.json_types import JsonObject
from stages.memory.estimate import Machine, Memory
from stages.memory.lengths import Lengths
from stages.memory.models import View
from stages.memory_plan.steps import memory_of
from stages.memory_plan.views import loaded
from stages.recipe.schema import RecipeStep

GIB = 2**30
PROCESS = {"cpu": 450 << 20, "cuda": 700 << 20}
"""Python with its libraries; on a GPU the CUDA context and kernels."""


@dataclass(frozen=True)
class StepMemory:
    """The memory need of a step. ``memory`` is None if it is unknown; ``note`` gives the reason.

    ``uncounted``: what the estimate leaves out or takes from constants, and why; one sentence each.
    """

    name: str
    stage: str
    memory: Memory | None
    note: str = ""
    advice: list[str] = field(default_factory=list)  # overrides that make it fit
    uncounted: list[str] = field(default_factory=list)

    def as_json(self) -> JsonObject:
        return {
            "name": self.name,
            "bytes": self.memory.as_json() if self.memory is not None else None,
            "note": self.note,
            "advice": self.advice,
            "uncounted": self.uncounted,
        }


def with_advice(
    step: RecipeStep, views: Mapping[str, View], lengths: Lengths, machine: Machine, processes: int, memory: Memory | None
) -> StepMemory:
    """The memory of a step; if it is too much for the machine, with the smallest change of settings that fits."""
    if memory is None:
        return StepMemory(step.name, step.stage, None, "the size of its model cannot be read from its config")
    room = machine.bytes - PROCESS[machine.kind]
    if memory.total <= room:
        return StepMemory(step.name, step.stage, memory)

    def total(config: StepConfig) -> float:
        try:
            estimate = memory_of(config, loaded(views, config), lengths, machine, processes)
        except ModelError:  # e.g. an adapter that the model cannot have
            return float("inf")
        return float("inf") if estimate is None else estimate.total

    config, chosen = step.config, []
    for path, value in _remedies(step.config, views):
        changed = _with(config, path, value)
        if changed is None or total(changed) >= total(config):
            continue
        config = changed
        chosen.append((path, value))
        if total(config) <= room:
            break
    else:
        note = "no known setting makes it fit; use a smaller model or a larger machine"
        return StepMemory(step.name, step.stage, memory, note)
    for remedy in list(chosen[:-1]):  # remove changes that a later one made unnecessary
        fewer = step.config
        for path, value in (other for other in chosen if other != remedy):
            fewer = _with(fewer, path, value) or fewer
        if total(fewer) <= room:
            chosen.remove(remedy)
    advice = [f"{step.name}.{path}={_shown(value)}" for path, value in chosen]
    return StepMemory(step.name, step.stage, memory, f"with these settings {gib(_total_of(step.config, chosen, total))}", advice)


def _total_of(config: StepConfig, chosen: Sequence[tuple[str, object]], total: Callable[[StepConfig], float]) -> float:
    for path, value in chosen:
        config = _with(config, path, value) or config
    return float(total(config))


def _remedies(config: StepConfig, views: Mapping[str, View]) -> list[tuple[str, object]]:
    """Changes that save memory, cheapest first. The first three do not change the training result."""
    sizes = []
    setting = "microbatch_size" if config.stage == "ppo" else "training.microbatch_size"
    owner = config if config.stage == "ppo" else getattr(config, "training", None)
    size: int = getattr(owner, "rows_per_pass", 1)  # on a GPU, auto fills the free memory
    while size > 1:
        size //= 2
        sizes.append((setting, size))
    remedies: list[tuple[str, object]] = [*sizes[:2]]
    if getattr(config, "training", None) is not None:
        remedies += [("training.gradient_checkpointing", True), *sizes[2:]]
    if hasattr(config, "generation"):
        remedies += [("generation.batch_size", 32), ("generation.batch_size", 8)]
    if config.stage == "ppo":
        remedies.append(("offload", True))
    if getattr(config, "training", None) is not None:
        remedies += [("training.optimizer", "adamw_8bit"), ("lora", {"r": 16})]
    # All roles on one base must be quantized to share it.
    quantized = [name for name, view in views.items() if not view.shape.encoder]
    remedies += [(f"{name}.quantization", "nf4") for name in quantized]
    return remedies


def _with(config: StepConfig, path: str, value: object) -> StepConfig | None:
    """``config`` with one setting changed; None if the result is invalid."""
    content = config.model_dump()
    *outer, last = re.findall(r"[^.\[\]]+", path)
    node = content
    for key in outer:
        node = node[int(key)] if isinstance(node, list) else node[key]
    node[last] = value
    try:
        return type(config).model_validate(content)
    except (ValidationError, RecipeError):
        return None


def _shown(value: object) -> str:
    return {True: "true", False: "false"}.get(value, str(value)) if isinstance(value, bool) else json.dumps(value).strip('"')


def gib(size: float) -> str:
    return f"{size / GIB:.2f}" if size < 100 * GIB else f"{size / GIB:.0f}"
