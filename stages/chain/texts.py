"""Conversations checked before anything is trained: every model of a recipe that reads them must have a chat template that writes them.

A step's tokenizer is that of the model which its chain began with, with the template that an sft step on the way gave it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stages.errors import DataError, ModelError

if TYPE_CHECKING:
    from stages.recipe.schema import Recipe, RecipeStep, Reference
    from stages.registry.ledger import Registry

CHECKED = 2000  # conversations of a step; the step itself checks all of them before it loads a model
KEEPS_TOKENIZER = {"sft": "model", "dpo": "model", "reward_model": "model", "ppo": "policy"}
"""Of stages that make a model: the field of the model whose tokenizer it gets."""


def check_texts(recipe: Recipe, step: RecipeStep, registry: Registry) -> None:
    """Render the conversations of a step with the template of every model that will read them; only tokenizers are loaded.

    Texts are left alone, as are models whose tokenizer is not there yet. Raises DataError with the step and the place of the row.
    """
    rows = getattr(step.config, "conversations", None)
    shown = [row for row in rows() if not all(isinstance(text, str) for text in (row[0], *row[1]))][:CHECKED] if rows is not None else []
    if not shown:
        return
    from stages.corpora.templates import check_rendering

    for place, reference in _readers(recipe, step).items():
        tokenizer = _tokenizer(recipe, reference, registry, step.config.template if step.stage == "sft" else None)
        if tokenizer is None:
            continue
        try:
            check_rendering(tokenizer, shown)
        except DataError as error:
            raise DataError(f"{recipe.source.place(('steps', step.index))} ({step.name}): {place} cannot read {error}") from error


def _readers(recipe: Recipe, step: RecipeStep) -> dict[str, Reference]:
    """The models that read a step's conversations as a chat, by field path; a classifier reads texts."""
    stages = {other.name: other.stage for other in recipe.steps}
    found = {}
    for place, reference in step.models.items():
        name = place.removeprefix("candidates.")
        asked = place != name and name in step.config.candidates and step.config.candidates[name].few_shot is None
        judges = reference.kind == "step" and stages[reference.target] == "reward_model"
        if place in ("model", "policy") or asked or judges:
            found[place] = reference
    return found


def _tokenizer(recipe: Recipe, reference: Reference, registry: Registry, template: str | None) -> Any:
    """The tokenizer that a model of the recipe will have, with ``template``; None where it is not known yet."""
    from stages.chain.run import resolve
    from stages.corpora.templates import set_template
    from stages.models.loading import load_tokenizer

    steps = {step.name: step for step in recipe.steps}
    while reference.kind == "step":
        step = steps[reference.target]
        if step.stage not in KEEPS_TOKENIZER:
            return None
        template = template or getattr(step.config, "template", None)
        reference = step.models[KEEPS_TOKENIZER[step.stage]]
    try:
        tokenizer = load_tokenizer(resolve(reference, registry))
        if template is not None:
            set_template(tokenizer, template)
    except ModelError:  # the step says what is wrong with its model
        return None
    return tokenizer
