"""Check conversations before any training: every model that reads them must have a chat template that can render them.

A step's tokenizer is that of the first model in its chain, with the templates and template arguments that the steps set.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from stages.chain.resolving import resolve
from stages.corpora.templates import check_rendering, set_template
from stages.errors import DataError, ModelError, RecipeError, StagesError
from stages.tokens.template_arguments import Arguments, set_arguments

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from stages.recipe.schema import Recipe, RecipeStep, Reference
    from stages.registry.ledger import Registry

CHECKED = 2000  # conversations per step; the step itself checks all of them before it loads a model
KEEPS_TOKENIZER = {"sft": "model", "dpo": "model", "reward_model": "model", "ppo": "policy"}
"""For stages that make a model: the field of the input model whose tokenizer the new model keeps."""


class _Change(NamedTuple):
    """What a step of the chain changes in the tokenizer of its model: template arguments, then the template."""

    arguments: Arguments
    template: str | None

    def apply(self, tokenizer: PreTrainedTokenizerBase) -> None:
        set_arguments(tokenizer, self.arguments)
        if self.template is not None:
            set_template(tokenizer, self.template)


class _TokenizerSource(NamedTuple):
    """The first model of a chain, without template arguments, and the changes that the steps after it make to its tokenizer."""

    first: Reference
    changes: list[_Change]


def check_template_arguments(recipe: Recipe, step: RecipeStep, registry: Registry) -> None:
    """Raise RecipeError for ``template_arguments`` that the model's chat template does not use.

    Skips a model whose tokenizer does not exist yet or cannot be loaded.
    """
    for field_path, reference in step.models.items():
        source = _tokenizer_source(recipe, step, reference) if reference.input.template_arguments else None
        tokenizer = _load(source, registry) if source is not None else None
        if source is None or tokenizer is None:
            continue
        try:
            for change in source.changes[:-1]:
                change.apply(tokenizer)
        except ModelError:  # the earlier step reports this error
            continue
        try:
            set_arguments(tokenizer, reference.input.template_arguments, reference.input.ref)
        except ModelError as error:
            raise RecipeError(f"{recipe.source.location(('steps', step.index))} ({step.name}): {field_path}: {error}") from error


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
        tokenizer = _tokenizer(source, registry) if source is not None else None
        if tokenizer is None:
            continue
        try:
            check_rendering(tokenizer, shown)
        except DataError as error:
            raise DataError(
                f"{recipe.source.location(('steps', step.index))} ({step.name}): {field_path}: this model cannot read {error}"
            ) from error


def tokenizer_digests(recipe: Recipe, step: RecipeStep, registry: Registry) -> dict[str, str]:
    """The inputs of ``check_texts`` in addition to the step, by field path: the digest of each reader's first model, and the changes.

    Empty for a stage that reads no conversations.
    """
    if getattr(step.config, "conversations", None) is None:
        return {}
    digests = {}
    for field_path, reference in _readers(recipe, step).items():
        if (source := _tokenizer_source(recipe, step, reference)) is not None:
            try:
                digests[field_path] = f"{resolve(source.first, registry).digest} {source.changes}"
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


def _tokenizer_source(recipe: Recipe, step: RecipeStep, reference: Reference) -> _TokenizerSource | None:
    """Where the tokenizer comes from that ``step`` uses with the model ``reference``.

    Returns None if a step on the way makes a tokenizer.
    """
    changes = [_Change(reference.input.template_arguments, getattr(step.config, "template", None) if step.stage == "sft" else None)]
    steps = {other.name: other for other in recipe.steps}
    while reference.kind == "step":
        step = steps[reference.target]
        if step.stage not in KEEPS_TOKENIZER:
            return None
        reference = step.models[KEEPS_TOKENIZER[step.stage]]
        changes.insert(0, _Change(reference.input.template_arguments, getattr(step.config, "template", None)))
    bare = reference.input.model_copy(update={"template_arguments": {}})
    return _TokenizerSource(replace(reference, input=bare), changes)


def _load(source: _TokenizerSource, registry: Registry) -> PreTrainedTokenizerBase | None:
    """The tokenizer before the changes; None if it cannot be loaded."""
    from stages.models.loading import load_tokenizer

    try:
        return load_tokenizer(resolve(source.first, registry))
    except ModelError:  # the step itself reports this error
        return None


def _tokenizer(source: _TokenizerSource, registry: Registry) -> PreTrainedTokenizerBase | None:
    """The tokenizer with the changes; None if it cannot be loaded or changed."""
    tokenizer = _load(source, registry)
    try:
        if tokenizer is not None:
            for change in source.changes:
                change.apply(tokenizer)
    except ModelError:  # the step itself reports this error
        return None
    return tokenizer
