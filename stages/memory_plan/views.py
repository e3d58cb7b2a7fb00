"""The models that the steps of a recipe read and make, as the memory plan sees them: without loading weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path

from stages.config import LoraSettings, ModelInput, StepConfig
from stages.memory.models import View
from stages.memory.passes import Adapter, planned_form
from stages.memory.shapes import shape_of, shape_of_folder, shape_of_hub, with_new_tokens
from stages.memory_plan.steps import task_of
from stages.models.adapters.stacks import Stack, stack_of, trained_on, weights_of
from stages.recipe.schema import RecipeStep, Reference, model_inputs
from stages.registry.ledger import Registry
from stages.registry.references import ResolvedModel


def views_of(
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


def unknown_note(refs: Sequence[str]) -> str:
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
    folders = [_folder_of(adapter) for adapter in stack.adapters]
    with_tokenizer = [folder for folder in (_folder_of(base, "config.json"), *folders) if (folder / "tokenizer.json").exists()]
    if with_tokenizer:
        shape = with_new_tokens(shape, with_tokenizer[-1])
    if stack.adapters:  # these have trained the new rows
        shape = replace(shape, new_rows=0)
    adapters = tuple((adapter.digest or adapter.path, _weights_in(folder)) for adapter, folder in zip(stack.adapters, folders, strict=True))
    forms = tuple(str(_folder_of(adapter)) for adapter in stack.adapters if _is_here(adapter))
    was_quantized = bool(stack.adapters) and trained_on(model).quantization != "none"
    return View(shape, weights_of(base), adapters, forms, generative=_is_generative(model), was_quantized=was_quantized)


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


def _folder_of(model: ResolvedModel, file: str = "adapter_config.json") -> Path:
    """The folder of a model's files; for a Hub model, that of ``file`` in the cache."""
    if model.kind != "hub":
        return Path(model.path)
    from huggingface_hub import try_to_load_from_cache

    return Path(str(try_to_load_from_cache(model.path, file, revision=model.input.revision))).parent


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


def made_by(step: RecipeStep, views: Mapping[str, View]) -> View | None:
    """The model that a step makes: its input with one more adapter, or a model with its own full weights."""
    config = step.config
    if getattr(config, "architecture", None) is not None:
        return _random_weights(config, views, step.name)
    trained = "model" if "model" in views else "policy"
    start = views.get(trained)
    if start is None or step.stage == "evaluation":
        return None
    generative = getattr(config, "generative", None) is not None
    lora = getattr(config, "lora", None)
    adapter = Adapter.of(lora) if isinstance(lora, LoraSettings) else None
    shape = replace(start.shape, new_rows=0)  # this step trains them
    if adapter is None:
        return View(shape, step.name, generative=generative)
    new = start.shape.adapter(adapter, task_of(config))
    published = (step.name, float(new.weights + new.start))  # the start becomes a part of the saved matrices
    adapters, forms = (*start.adapters, published), (*start.forms, planned_form(step.name, adapter))
    was_quantized = start.was_quantized or model_inputs(config)[trained].quantization != "none"
    return replace(start, shape=shape, adapters=adapters, forms=forms, generative=generative, was_quantized=was_quantized)


def loaded(views: Mapping[str, View], config: StepConfig) -> dict[str, View]:
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


def folder_of(step: RecipeStep, registry: Registry, reused: Mapping[str, Path]) -> Path | None:
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
