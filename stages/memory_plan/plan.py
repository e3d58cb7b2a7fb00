"""Compare the memory of a recipe's steps with the machine's memory."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from stages.config import GenerationSettings, StepConfig
from stages.errors import ModelError
from stages.memory.counting import kept_in, uncounted
from stages.memory.estimate import Machine
from stages.memory.models import View
from stages.memory_plan.advice import StepMemory, with_advice
from stages.memory_plan.steps import lengths_of, memory_of, refuse_unfit_adapters
from stages.memory_plan.views import folder_of, loaded, made_by, unknown_note, views_of
from stages.recipe.schema import Recipe, model_inputs
from stages.registry.ledger import Registry


def plan_memory(
    recipe: Recipe, registry: Registry, machine: Machine, *, reused: Mapping[str, Path] | None = None, processes: int = 1
) -> list[StepMemory]:
    """Estimate each step that would run. ``reused``: model folders of completed steps.

    Raises ModelError if the adapter of a step does not fit its model.
    """
    with kept_in(_counts(registry)):
        return _plan_memory(recipe, registry, machine, reused or {}, processes)


def _counts(registry: Registry) -> Path:
    """The file in which the home keeps what was counted."""
    return registry.root.parent / "cache" / "activations.json"


def _plan_memory(recipe: Recipe, registry: Registry, machine: Machine, reused: Mapping[str, Path], processes: int) -> list[StepMemory]:
    made: dict[str, View] = {}
    unknown: dict[str, list[str]] = {}  # by step: the models of unknown size that it starts from
    estimates = []
    for step in recipe.steps:
        with uncounted() as messages, _named(step.name):
            views, missing = views_of(step, made, unknown, registry)
            folder = folder_of(step, registry, reused)
            if missing:
                unknown[step.name] = missing
                estimates.append(StepMemory(step.name, step.stage, None, unknown_note(missing)))
            elif step.name not in reused:
                lengths = lengths_of(step.config, folder)
                refuse_unfit_adapters(step.config, loaded(views, step.config), machine.kind)
                memory = memory_of(step.config, loaded(views, step.config), lengths, machine, processes)
                advised = with_advice(step, views, lengths, machine, processes, memory)
                estimates.append(replace(advised, uncounted=[*messages, *_outside(step.config)]))
            if (view := made_by(step, views)) is not None:
                made[step.name] = view
    return estimates


def check_adapters(recipe: Recipe, registry: Registry, device: str, *, reused: Collection[str]) -> None:
    """Raise ModelError if the new adapter of a step cannot be put on its models, which are made without memory for their weights.

    ``device``: cpu or cuda. ``reused``: steps that do not run. A model of unknown size is not checked.
    """
    last = max((step.index for step in recipe.steps if step.name not in reused and getattr(step.config, "lora", None)), default=-1)
    made: dict[str, View] = {}
    with kept_in(_counts(registry)), uncounted():
        for step in recipe.steps[: last + 1]:
            with _named(step.name):
                views, missing = views_of(step, made, {}, registry)
                if not missing and step.name not in reused:
                    refuse_unfit_adapters(step.config, loaded(views, step.config), device)
                if (view := made_by(step, views)) is not None:
                    made[step.name] = view


@contextmanager
def _named(step: str) -> Iterator[None]:
    """Context manager that adds the name of a step to a ModelError."""
    try:
        yield
    except ModelError as error:
        raise ModelError(f"{step}: {error}") from error


def _outside(config: StepConfig) -> list[str]:
    """What no plan can count: one sentence for each item, with the reason."""
    collect = getattr(config, "collect", None)
    said = []
    for generation in (getattr(config, "generation", None), getattr(collect, "generation", None)):
        if isinstance(generation, GenerationSettings) and generation.vllm is not None:
            start = generation.vllm.start
            shared = start is not None and start.gpus is None
            taken = f", which take up to {start.gpu_memory_utilization:.0%} of the first GPU," if shared and start is not None else ""
            said.append(f"the weights and the KV cache of the vLLM servers{taken} are not part of the plan")
    if any(source.quantization == "int8" for source in model_inputs(config).values()):
        said.append("int8 also keeps the columns of activations with outliers, whose number depends on the texts; they are not counted")
    return said
