"""Check, before any training, whether external models fit their roles in the recipe. Reads only model configs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages.chain.resolving import resolve
from stages.errors import ModelError, RecipeError, StagesError
from stages.models.stacks import stack_of
from stages.recipe.source import value_at

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from stages.recipe.schema import Recipe, RecipeStep, Reference
    from stages.registry.ledger import Registry
    from stages.registry.references import ResolvedModel


def check_models(recipe: Recipe, step: RecipeStep, registry: Registry) -> None:
    """Check family, quantization and attention of every model that a step reads from a folder, the Hub or the registry.

    Only configs are read. A model whose config cannot be read is skipped; the step itself reports the error. Raises RecipeError with the
    location in the recipe.
    """
    for field_path, reference in step.models.items():
        if reference.kind == "step":
            continue
        try:
            _check(step, field_path, reference, registry)
        except ModelError as error:
            raise RecipeError(f"{recipe.source.location(('steps', step.index))} ({step.name}): {field_path}: {error}") from error


def _check(step: RecipeStep, field_path: str, reference: Reference, registry: Registry) -> None:
    base = _base(reference, registry)
    config = _config(base) if base is not None else None
    if base is None or config is None:
        return
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    from stages.models.attention import attention_of
    from stages.models.families import refuse_quantization, refuse_unfit, refuse_without_linear_layers

    is_classifier = _is_classifier(step, field_path)
    auto = AutoModelForSequenceClassification if is_classifier else AutoModelForCausalLM
    if not is_classifier:
        refuse_unfit(config, reference.input.ref)
    attention_of(auto, config, reference.input, torch.float32)
    if reference.input.quantization != "none":
        refuse_quantization(config, reference.input.quantization, reference.input.ref)
        refuse_without_linear_layers(auto, config, reference.input.quantization, reference.input.ref)


def _is_classifier(step: RecipeStep, field_path: str) -> bool:
    """Whether the model in field ``field_path`` is a sequence classifier: in the sentiment stage, or a reward source with a label."""
    if step.stage == "sentiment":
        return True

    source = field_path.rpartition(".")[0]
    return bool(source) and getattr(value_at(step.config, source), "label", None) is not None


def _base(reference: Reference, registry: Registry) -> ResolvedModel | None:
    """The base model with full weights below any adapters; None if it cannot be determined now."""
    try:
        return stack_of(resolve(reference, registry)).base
    except (StagesError, OSError, ValueError):
        return None


def _config(model: ResolvedModel) -> PreTrainedConfig | None:
    """The model's config; None if it cannot be read or needs remote code."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model.path, revision=model.input.revision, trust_remote_code=False)
    except Exception:  # many exception types are possible here; the step reports them when it loads the model
        return None
