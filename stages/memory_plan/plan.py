"""Compare the memory of a recipe's steps with the machine's memory, and find settings that fit if it is too much."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path

from pydantic import ValidationError

from stages.config import GenerationSettings, LoraSettings, ModelInput, StepConfig
from stages.errors import ModelError, RecipeError
from stages.json_types import JsonObject
from stages.memory.counting import kept_in, uncounted
from stages.memory.estimate import Machine, Memory
from stages.memory.lengths import Lengths
from stages.memory.models import View
from stages.memory.passes import Adapter, planned_form
from stages.memory.shapes import shape_of, shape_of_folder, shape_of_hub
from stages.memory_plan.steps import lengths_of, memory_of, refuse_unfit_adapters, task_of
from stages.models.adapters.stacks import Stack, stack_of, weights_of
from stages.process.tables import Table
from stages.recipe.schema import Recipe, RecipeStep, Reference, model_inputs
from stages.registry.ledger import Registry
from stages.registry.references import ResolvedModel

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
            views, missing = _views(step, made, unknown, registry)
            folder = _folder(step, registry, reused)
            if missing:
                unknown[step.name] = missing
                estimates.append(StepMemory(step.name, step.stage, None, _unknown_note(missing)))
            elif step.name not in reused:
                lengths = lengths_of(step.config, folder)
                refuse_unfit_adapters(step.config, _loaded(views, step.config), machine.kind)
                memory = memory_of(step.config, _loaded(views, step.config), lengths, machine, processes)
                advised = _advised(step, views, lengths, machine, processes, memory)
                estimates.append(replace(advised, uncounted=[*messages, *_outside(step.config)]))
            if (view := _made_by(step, views)) is not None:
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
                views, missing = _views(step, made, {}, registry)
                if not missing and step.name not in reused:
                    refuse_unfit_adapters(step.config, _loaded(views, step.config), device)
                if (view := _made_by(step, views)) is not None:
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


# The models that a step reads


def _views(
    step: RecipeStep, made: Mapping[str, View], unknown: Mapping[str, list[str]], registry: Registry
) -> tuple[dict[str, View], list[str]]:
    """Return (models by field path, refs of models with unknown size).

    If the model of another step has an unknown size, the result names the models that this step starts from.
    """
    views: dict[str, View] = {}
    missing: set[str] = set()
    for field_path, reference in step.models.items():
        view = made.get(reference.target) if reference.kind == "step" else _foreign(reference, registry)
        if view is not None:
            views[field_path] = view
        else:
            missing.update(unknown.get(reference.target, [reference.input.ref]))
    return views, sorted(missing)


def _unknown_note(refs: Sequence[str]) -> str:
    """Why the memory of a step is unknown."""
    models = f"{', '.join(refs)} {'is' if len(refs) == 1 else 'are'}"
    return f"the size of {models} unknown: there is no usable config.json in the Hub cache or the folder. A run downloads models of the Hub"


def _foreign(reference: Reference, registry: Registry) -> View | None:
    """A model from outside the recipe, with its adapters; None if its size is unknown."""
    model = _unread(reference, registry)
    # Without a cached adapter config, only a request could tell whether a Hub model is an adapter; a plan makes no requests.
    stack = Stack(model, ()) if model.kind == "hub" and not _is_cached_adapter(model) else stack_of(model)
    base = stack.base
    shape = shape_of_hub(base.path, base.input.revision) if base.kind == "hub" else shape_of_folder(Path(base.path))
    if shape is None:
        return None
    adapters = tuple((adapter.digest or adapter.path, _weights_in(_folder_of(adapter))) for adapter in stack.adapters)
    forms = tuple(str(_folder_of(adapter)) for adapter in stack.adapters if _is_here(adapter))
    return View(shape, weights_of(base), adapters, forms, generative=_is_generative(model))


def _is_generative(model: ResolvedModel) -> bool:
    """Whether a model is a generative reward model. For a Hub model, this is known only if its files are in the cache."""
    if model.record is not None:
        return bool(model.record.role == "generative_reward_model")
    from stages.models.reward_question import QUESTION_FILE

    if model.kind == "hub":
        from huggingface_hub import try_to_load_from_cache

        return isinstance(try_to_load_from_cache(model.path, QUESTION_FILE, revision=model.input.revision), str)
    return (Path(model.path) / QUESTION_FILE).exists()


def _unread(reference: Reference, registry: Registry) -> ResolvedModel:
    """The referenced model without its digest, because a plan does not read weights."""
    if reference.kind == "registry":
        return ResolvedModel.of_record(registry.get(reference.target), reference.input)
    return ResolvedModel(reference.input.ref, reference.kind, reference.target, "", reference.input)


def _is_cached_adapter(model: ResolvedModel) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(model.path, "adapter_config.json", revision=model.input.revision), str)


def _is_here(adapter: ResolvedModel) -> bool:
    """Whether the weights of an adapter can be read: those of the Hub are downloaded when a step needs them."""
    return adapter.kind != "hub" or (_folder_of(adapter) / "adapter_model.safetensors").exists()


def _folder_of(adapter: ResolvedModel) -> Path:
    """The folder of an adapter's files; for a Hub adapter, its folder in the cache."""
    if adapter.kind != "hub":
        return Path(adapter.path)
    from huggingface_hub import try_to_load_from_cache

    return Path(str(try_to_load_from_cache(adapter.path, "adapter_config.json", revision=adapter.input.revision))).parent


def _weights_in(folder: Path) -> float:
    """Number of weights in an adapter's files; 0 if they cannot be read."""
    return float(sum(_weights_in_file(file) for file in folder.glob("*.safetensors")))


def _weights_in_file(file: Path) -> int:
    """Number of weights in a safetensors file, read from its header: 8 bytes with its length, and JSON with the shape of each tensor."""
    try:
        with file.open("rb") as opened:
            header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    except (OSError, ValueError):
        return 0
    return sum(prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")


def _made_by(step: RecipeStep, views: Mapping[str, View]) -> View | None:
    """The model that a step makes: its input with one more adapter, or a model with its own full weights."""
    config = step.config
    if getattr(config, "architecture", None) is not None:
        return _random_weights(config, views, step.name)
    start = views.get("model", views.get("policy"))
    if start is None or step.stage == "evaluation":
        return None
    generative = getattr(config, "generative", None) is not None
    lora = getattr(config, "lora", None)
    adapter = Adapter.of(lora) if isinstance(lora, LoraSettings) else None
    if adapter is None:
        return View(start.shape, step.name, generative=generative)
    weights = start.shape.adapter(adapter, task_of(config)).weights
    adapters, forms = (*start.adapters, (step.name, float(weights))), (*start.forms, planned_form(step.name, adapter))
    return replace(start, adapters=adapters, forms=forms, generative=generative)


def _loaded(views: Mapping[str, View], config: StepConfig) -> dict[str, View]:
    """The models with the step's loading options. A model that the step creates from random weights is included."""
    inputs: dict[str, ModelInput] = model_inputs(config)
    loaded = {
        field_path: replace(view, quantization=inputs[field_path].quantization, double=inputs[field_path].double_quantization)
        for field_path, view in views.items()
    }
    if (made := _random_weights(config, views, "random weights")) is not None:
        loaded["model"] = made
    return loaded


def _random_weights(config: StepConfig, views: Mapping[str, View], base: str) -> View | None:
    """The initial model of a step with an ``architecture``; None without one, or if its size cannot be determined."""
    architecture = getattr(config, "architecture", None)
    shape = shape_of(architecture) if architecture is not None else None
    if shape is None:
        return None
    tokenizer = views.get("tokenizer")
    vocabulary = (
        tokenizer.shape.vocabulary if tokenizer is not None else getattr(getattr(config, "tokenizer", None), "vocab_size", 0) or 1024
    )
    return View(replace(shape, vocabulary=vocabulary), base)


def _folder(step: RecipeStep, registry: Registry, reused: Mapping[str, Path]) -> Path | None:
    """A folder with a tokenizer that reads the step's texts; None if there is none yet."""
    for field_path in ("policy", "model", *step.models):
        reference = step.models.get(field_path)
        if reference is None:
            continue
        if reference.kind == "step" and reference.target in reused:
            return reused[reference.target]
        if reference.kind == "folder":
            return Path(reference.target)
        if reference.kind == "registry":
            return registry.get(reference.target).path
    return None


# What would fit


def _advised(
    step: RecipeStep, views: Mapping[str, View], lengths: Lengths, machine: Machine, processes: int, memory: Memory | None
) -> StepMemory:
    if memory is None:
        return StepMemory(step.name, step.stage, None, "the size of its model cannot be read from its config")
    room = machine.bytes - PROCESS[machine.kind]
    if memory.total <= room:
        return StepMemory(step.name, step.stage, memory)

    def total(config: StepConfig) -> float:
        try:
            estimate = memory_of(config, _loaded(views, config), lengths, machine, processes)
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
    return StepMemory(step.name, step.stage, memory, f"with these settings {_gib(_total_of(step.config, chosen, total))}", advice)


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


# Showing


def memory_table(steps: Sequence[StepMemory], machine: Machine) -> Table:
    """Table of every step's estimate with its parts."""
    columns = ("weights", "adapters", "gradients", "optimizer", "KV cache", "activations", "logits")
    table = Table("step", *columns, "total", "of the machine", title="Peak memory per process (GiB)")
    table.title_justify = "left"
    for step in steps:
        if step.memory is None:
            table.add_row(step.name, *("?" for _ in columns), "?", step.note)
            continue
        memory = step.memory
        parts = (
            memory.weights + memory.awake,
            memory.adapters,
            memory.gradients,
            memory.optimizer,
            memory.kv_cache,
            memory.activations,
            memory.logits,
        )
        total = memory.total + PROCESS[machine.kind]
        share = f"{total / machine.bytes:.0%}" if total <= machine.bytes else f"[red]{total / machine.bytes:.0%}: does not fit[/]"
        table.add_row(step.name, *(_gib(part) for part in parts), f"[bold]{_gib(total)}[/]", share)
    table.caption_justify = "left"
    table.caption = f"{machine.name}: {_gib(machine.bytes)} GiB; total includes {_gib(PROCESS[machine.kind])} GiB for the process itself"
    if machine.kind == "cpu":
        table.caption += ", and freed blocks that the allocator keeps"
    return table


def advice_lines(steps: Sequence[StepMemory]) -> list[str]:
    """Advice for each step that does not fit; and what the estimates leave out or take from constants, with the steps."""
    lines = []
    for step in steps:
        if step.advice:
            lines.append(f"{step.name} would fit ({step.note.removeprefix('with these settings ')} GiB) with: {' '.join(step.advice)}")
        elif step.memory is not None and step.note:
            lines.append(f"{step.name}: {step.note}")
    for message in dict.fromkeys(message for step in steps for message in step.uncounted):
        names = [step.name for step in steps if message in step.uncounted]
        lines.append(f"{', '.join(names)}: {message}")
    return lines


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}" if size < 100 * GIB else f"{size / GIB:.0f}"
