"""Which role the model in each field of a step must have: a language model, a reward model, a classifier."""

from __future__ import annotations

import re

from stages.chain.resolving import resolve
from stages.errors import RecipeError, StagesError
from stages.recipe.schema import Recipe, RecipeStep, Reference
from stages.recipe.source import value_at
from stages.registry.ledger import Registry

MADE_BY = {
    "pretraining": "language_model",
    "sft": "language_model",
    "dpo": "language_model",
    "ppo": "language_model",
    "reward_model": "reward_model",
    "sentiment": "classifier",
}
POLICIES = {
    "pretraining": "model",
    "sft": "model",
    "dpo": "model|reference",
    "ppo": "policy|reference",
    "reward_model": r"collect\.policies\[\d+\]\.model|normalization\.sampler",
}
"""Fields per stage whose model samples texts, or is trained to."""
LANGUAGE_MODEL = ("language_model", "generative_reward_model")
REWARD_MODEL = ("reward_model", "generative_reward_model")


def check_roles(recipe: Recipe, step: RecipeStep, registry: Registry) -> None:
    """Raise RecipeError if a field of the step reads a model of a role that it cannot use.

    Models of folders and of the Hub have no known role; their loader checks them.
    """
    for field_path, reference in step.models.items():
        role, expected = _role(recipe, reference, registry), _expected(step, field_path)
        if role is not None and expected is not None and role not in expected:
            location = f"{recipe.source.location(('steps', step.index))} ({step.name}): {field_path}"
            raise RecipeError(f"{location}: {reference.input.ref!r} is a {role.replace('_', ' ')}; {_advice(expected, role)}")


def _role(recipe: Recipe, reference: Reference, registry: Registry) -> str | None:
    if reference.kind == "step":
        made = next(step for step in recipe.steps if step.name == reference.target)
        is_generative = getattr(made.config, "generative", None) is not None
        return "generative_reward_model" if is_generative else MADE_BY.get(made.stage)
    try:
        record = resolve(reference, registry).record if reference.kind == "registry" else None
    except StagesError:  # reported when the step is planned
        return None
    return record.role if record is not None else None


def _expected(step: RecipeStep, field_path: str) -> tuple[str, ...] | None:
    """The roles that a field accepts; None for a field that accepts several kinds of models and decides itself."""
    source = value_at(step.config, field_path.rpartition(".")[0]) if "." in field_path else None
    if hasattr(source, "answers") and hasattr(source, "label"):
        return LANGUAGE_MODEL if source.answers is not None else ("classifier",) if source.label is not None else REWARD_MODEL
    is_candidate = step.stage == "evaluation" and field_path.startswith("candidates.") and ".reward" not in field_path
    if is_candidate or re.fullmatch(POLICIES.get(step.stage, ""), field_path):
        return LANGUAGE_MODEL
    if step.stage == "reward_model" and field_path == "model":
        return (*LANGUAGE_MODEL, "reward_model")
    return None


def _advice(expected: tuple[str, ...], role: str) -> str:
    if expected == REWARD_MODEL:
        if role == "classifier":
            return "set label to the class whose score is the reward"
        return "a reward needs a reward model, a classifier with a label, or a language model with answers"
    names = {LANGUAGE_MODEL: "a language model", ("classifier",): "a classifier, because label is set"}
    return f"expected {names.get(expected, 'a language model or a reward model')}"
