"""Check, before any training, whether external models fit their roles in the recipe. Reads only model configs."""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING

from stages.chain.resolving import resolve
from stages.errors import ModelError, RecipeError, StagesError
from stages.models.adapters.stacks import stack_of
from stages.recipe.source import value_at

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from stages.recipe.schema import Recipe, RecipeStep, Reference
    from stages.registry.ledger import Registry
    from stages.registry.references import ResolvedModel


class ModelChecks:
    """The checks of a recipe's models. Each model's config is read once, also if several steps name the model."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self._configs: dict[tuple[str, str, str | None], PreTrainedConfig | None] = {}

    def check(self, recipe: Recipe, step: RecipeStep) -> None:
        """Check family, quantization and attention of every model that a step reads, and whether it fits what the step does with it.

        Only configs are read; of the model that an earlier step makes, the config of the model that it starts from. A model whose config
        cannot be read is skipped; the step itself reports the error. Raises RecipeError with the location in the recipe.
        """
        for field_path, reference in step.models.items():
            config = self._config_of(recipe, reference)
            if config is None:
                continue
            try:
                _check(step, field_path, reference, config)
            except ModelError as error:
                raise RecipeError(f"{recipe.source.location(('steps', step.index))} ({step.name}): {field_path}: {error}") from error

    def _config_of(self, recipe: Recipe, reference: Reference) -> PreTrainedConfig | None:
        """A copy of the config of the model's base weights, because checks write into it; None if it cannot be read."""
        if reference.kind == "step":
            made = next(step for step in recipe.steps if step.name == reference.target)
            start = made.models.get("model", made.models.get("policy"))
            return _published(made, self._config_of(recipe, start)) if start is not None else None
        key = (reference.kind, reference.target, reference.input.revision)
        if key not in self._configs:
            base = _base(reference, self.registry)
            self._configs[key] = read_config(base) if base is not None else None
        return deepcopy(self._configs[key])


def _check(step: RecipeStep, field_path: str, reference: Reference, config: PreTrainedConfig) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    from stages.models.families import (
        refuse_quantization,
        refuse_scalar_head,
        refuse_unfit,
        refuse_without_classes,
        refuse_without_linear_layers,
    )
    from stages.models.layers.attention import attention_of
    from stages.models.packed_rows import refuse_mixing

    is_classifier = _is_classifier(step, field_path)
    auto = AutoModelForSequenceClassification if is_classifier else AutoModelForCausalLM
    (refuse_without_classes if is_classifier else refuse_unfit)(config, reference.input.ref)
    attention_of(auto, config, reference.input, torch.float32)
    if reference.input.quantization != "none":
        refuse_quantization(config, reference.input.quantization, reference.input.ref)
        refuse_without_linear_layers(auto, config, reference.input.quantization, reference.input.ref)
    if field_path == _start_of_a_scalar_model(step):
        refuse_scalar_head(config, reference.input.ref)
    if field_path == "model" and getattr(step.config, "packing", False):
        refuse_mixing(config, reference.input.ref)


def _start_of_a_scalar_model(step: RecipeStep) -> str | None:
    """The field of the model from which the step makes a reward model or a value network; None if it makes none."""
    if step.stage == "reward_model":
        return "model" if getattr(step.config, "generative", None) is None else None
    value_input = getattr(step.config, "value_input", None)
    field_path: str | None = value_input(lambda path: True) if value_input is not None else None
    return field_path


def _published(step: RecipeStep, config: PreTrainedConfig | None) -> PreTrainedConfig | None:
    """The config of the model that ``step`` makes from one with ``config``: full weights may be only the part for text."""
    from stages.models.families import text_part

    if config is None or getattr(step.config, "lora", None) is not None or text_part(config) is None:
        return config
    text: PreTrainedConfig = config.get_text_config()
    return text


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


def read_config(model: ResolvedModel) -> PreTrainedConfig | None:
    """The model's config; None if it cannot be read or needs remote code."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model.path, revision=model.input.revision, trust_remote_code=False)
    except Exception:  # many exception types are possible here; the step reports them when it loads the model
        return None
