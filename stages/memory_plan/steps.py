"""The planner of each stage: the module ``memory`` of its folder, which estimates the memory of a step of that stage."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from stages.config import OptimizerSettings, StepConfig
from stages.memory.counting import refuse_unfit_stacks
from stages.memory.estimate import Machine, Memory, dtype_bytes, fillable, with_heap
from stages.memory.lengths import Counter, Lengths
from stages.memory.models import View, loading
from stages.memory.passes import Adapter, PassKind, Task, planned_form
from stages.recipe.schema import STAGES


@dataclass(frozen=True)
class Planner:
    """The functions of a stage's ``memory`` module. Each gets a config of that stage."""

    lengths_of: Callable[[StepConfig, Counter], Lengths]
    estimate: Callable[[StepConfig, Mapping[str, View], Lengths, Machine, int], Memory]
    heap: Callable[[StepConfig], str]  # a key of stages.memory.estimate.HEAP
    stacks: Callable[[StepConfig, Mapping[str, View], Adapter], tuple[tuple[str, ...], ...]]  # see PassKind.stacks


def lengths_of(config: StepConfig, folder: Path | None) -> Lengths:
    """The lengths of a step's data.

    Lengths that the stage does not need keep their defaults. ``folder``: that of the model it reads, if any.
    """
    planner = _planner(config.stage)
    return Lengths() if planner is None else planner.lengths_of(config, Counter(folder))


def memory_of(config: StepConfig, models: Mapping[str, View], lengths: Lengths, machine: Machine, processes: int) -> Memory | None:
    """The estimate of a step; None if its stage has no planner, or if the size of a model is unknown."""
    planner = _planner(config.stage)
    if planner is None or any(view.shape.vocabulary == 0 for view in models.values()):
        return None
    heap = planner.heap(config)

    def needed(settings: StepConfig) -> Memory:
        memory = with_heap(planner.estimate(settings, models, lengths, machine, processes), machine, heap)
        loaded = loading(models.values(), memory, dtype_bytes(settings.precision, machine), machine)
        return replace(memory, awake=max(memory.awake, loaded.awake), passing=max(memory.passing, loaded.total))

    training = getattr(config, "training", None)
    if machine.kind == "cpu" or processes > 1 or not isinstance(training, OptimizerSettings) or training.microbatch_size != "auto":
        return needed(config)
    # On one GPU the passes of a Trainer fill what is there (training/microbatches.py): the largest of these sizes that fits.
    rows = training.batch_size
    while True:
        sized = config.model_copy(update={"training": training.model_copy(update={"microbatch_size": rows})})
        memory = needed(sized)
        if rows == 1 or memory.total <= fillable(machine):
            return memory
        rows //= 2


def refuse_unfit_adapters(config: StepConfig, models: Mapping[str, View], device: str) -> None:
    """Raise ModelError if the step cannot put its new adapters on its models, with the other adapters that stay unmerged there.

    ``device``: cpu or cuda.
    """
    planner, adapter = _planner(config.stage), Adapter.of(getattr(config, "lora", None))
    start = models.get("policy", models.get("model"))
    if planner is None or adapter is None or start is None:
        return
    stacks = planner.stacks(config, models, adapter)
    if (
        start.quantization == "none"
        and not any(form for stack in stacks for form in stack if not form.startswith("["))
        and len(stacks) == 1
    ):
        return  # counting the new adapter is enough
    shape, task = start.shape, task_of(config)
    kind = PassKind(
        shape.config,
        shape.vocabulary,
        device,
        weights=4,
        compute=4,
        trains=True,
        quantization=start.quantization,
        task=task,
        stacks=stacks,
        new_rows=shape.new_rows,
    )
    folders = {form for stack in stacks for form in stack if not form.startswith("[")}
    refuse_unfit_stacks(kind, tuple(Path(folder).stat().st_mtime_ns for folder in sorted(folders)))


TASKS: dict[str, Task] = {"reward_model": "FEATURE_EXTRACTION", "sentiment": "SEQ_CLS"}
"""The class that a stage trains, if it is not a language model."""


def task_of(config: StepConfig) -> Task:
    """The class of the model that a step trains."""
    return "CAUSAL_LM" if getattr(config, "generative", None) is not None else TASKS.get(config.stage, "CAUSAL_LM")


def _heap(config: StepConfig) -> str:
    """The key of HEAP for a Trainer's step."""
    return "trainer with adapters" if getattr(config, "lora", None) is not None else "trainer"


def _planner(stage: str) -> Planner | None:
    address = STAGES[stage].memory
    if address is None:
        return None
    module = importlib.import_module(address)
    return Planner(module.lengths_of, module.estimate, getattr(module, "heap", _heap), getattr(module, "stacks", _stacks))


def _stacks(config: StepConfig, models: Mapping[str, View], adapter: Adapter) -> tuple[tuple[str, ...], ...]:
    """The adapters of a Trainer's step: those below are merged into weights that are not quantized."""
    view = models["model"]
    return ((*(view.forms if view.quantization != "none" else ()), planned_form("new", adapter)),)
