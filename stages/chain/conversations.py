"""Check conversations before any training: every model that reads them must have a chat template that can render them.

A step's tokenizer is that of the first model in its chain, with the template that an sft step sets.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages.chain.resolving import resolve
from stages.corpora.templates import check_rendering, set_template
from stages.errors import DataError, ModelError, StagesError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from stages.recipe.schema import Recipe, RecipeStep, Reference
    from stages.registry.ledger import Registry

CHECKED = 2000  # conversations per step; the step itself checks all of them before it loads a model
KEEPS_TOKENIZER = {"sft": "model", "dpo": "model", "reward_model": "model", "ppo": "policy"}
"""For stages that make a model: the field of the input model whose tokenizer the new model keeps."""


def check_texts(recipe: Recipe, step: RecipeStep, registry: Registry) -> None:
    """Render a step's conversations with the template of every model that will read them. Only tokenizers are loaded.

    Skips plain texts, and models whose tokenizer does not exist yet. Raises DataError with the step and the row's location.
    """
    rows = getattr(step.config, "conversations", None)
    shown = [row for row in rows() if not all(isinstance(text, str) for text in (row[0], *row[1]))][:CHECKED] if rows is not None else []
    if not shown:
        return

    for field_path, reference in _readers(recipe, step).items():
        source = _tokenizer_source(recipe, step, reference)
        tokenizer = _tokenizer(*source, registry) if source is not None else None
        if tokenizer is None:
            continue
        try:
            check_rendering(tokenizer, shown)
        except DataError as error:
            raise DataError(
                f"{recipe.source.location(('steps', step.index))} ({step.name}): the model of {field_path} cannot read {error}"
            ) from error


def tokenizer_digests(recipe: Recipe, step: RecipeStep, registry: Registry) -> dict[str, str]:
    """The inputs of ``check_texts`` in addition to the step: the digest of each reader's first model, and its template, by field path.

    Empty for a stage that reads no conversations.
    """
    if getattr(step.config, "conversations", None) is None:
        return {}
    digests = {}
    for field_path, reference in _readers(recipe, step).items():
        if (source := _tokenizer_source(recipe, step, reference)) is not None:
            first, template = source
            try:
                digests[field_path] = f"{resolve(first, registry).digest} {template}"
            except StagesError:  # the step itself reports this error
                digests[field_path] = "unresolved"
    return digests


def _readers(recipe: Recipe, step: RecipeStep) -> dict[str, Reference]:
    """The models that read a step's conversations as chats, by field path. Classifiers and generative reward models read plain text."""
    if getattr(step.config, "generative", None) is not None:
        return {}
    scalar = {other.name for other in recipe.steps if other.stage == "reward_model" and getattr(other.config, "generative", None) is None}
    candidates = getattr(step.config, "candidates", {})
    readers = {}
    for field_path, reference in step.models.items():
        name = field_path.removeprefix("candidates.")
        asked = field_path != name and name in candidates and candidates[name].few_shot is None
        judges = reference.kind == "step" and reference.target in scalar
        if field_path in ("model", "policy") or asked or judges:
            readers[field_path] = reference
    return readers


def _tokenizer_source(recipe: Recipe, step: RecipeStep, reference: Reference) -> tuple[Reference, str | None] | None:
    """The first model of the chain that leads to the model ``reference`` of ``step``, and the template that the steps between them set.

    The template is None if they set none. Returns None if a step between them makes a tokenizer.
    """
    template: str | None = getattr(step.config, "template", None) if step.stage == "sft" else None
    steps = {other.name: other for other in recipe.steps}
    while reference.kind == "step":
        step = steps[reference.target]
        if step.stage not in KEEPS_TOKENIZER:
            return None
        template = template or getattr(step.config, "template", None)
        reference = step.models[KEEPS_TOKENIZER[step.stage]]
    return reference, template


def _tokenizer(reference: Reference, template: str | None, registry: Registry) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a model, with ``template``; None if it cannot be loaded."""
    from stages.models.loading import load_tokenizer

    try:
        tokenizer = load_tokenizer(resolve(reference, registry))
        if template is not None:
            set_template(tokenizer, template)
    except ModelError:  # the step itself reports this error
        return None
    return tokenizer
