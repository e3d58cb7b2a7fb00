"""Prompts for PPO and evaluation: the column ``prompt`` (text or messages), or the first words of a ``text``."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from stages.config import DataSource
from stages.corpora.comparisons import comparison
from stages.corpora.conversations.messages import (
    Prompt,
    conversation_column,
    holds_turns,
    location_of,
    messages_of,
    prompt_of,
    split_dialogue,
    split_messages,
    transcript,
)
from stages.corpora.demonstrations import demonstration
from stages.corpora.files import read_rows
from stages.corpora.rows import Row, renaming, text_of
from stages.corpora.summaries import compared_prompt, is_comparison, is_post, post_prompt
from stages.corpora.templates import check_rendering, render_pair
from stages.errors import DataError
from stages.json_types import JsonObject
from stages.process.console import announce
from stages.tokens.template_arguments import arguments_in, without_arguments

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from stages.corpora.rows import RowFilter
    from stages.registry.references import ResolvedModel


logger = logging.getLogger(__name__)
Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class PromptRow:
    """A prompt, and the other columns of its row that the caller requested."""

    prompt: Prompt
    columns: JsonObject = field(default_factory=dict)


def load_prompts(
    sources: Sequence[DataSource],
    *,
    prompt_words: int | None = None,
    limit: int | None = None,
    split: str = "train",
    curator: RowFilter | None = None,
) -> list[Prompt]:
    """Load distinct prompts in data order. ``prompt_words``: use only this many first words of each text. Raises DataError on bad rows."""
    rows = load_prompt_rows(sources, prompt_words=prompt_words, limit=limit, split=split, curator=curator)
    return [row.prompt for row in rows]


def load_prompt_rows(
    sources: Sequence[DataSource],
    *,
    prompt_words: int | None = None,
    limit: int | None = None,
    split: str = "train",
    curator: RowFilter | None = None,
    columns: Callable[[Row], JsonObject] = lambda row: {},
) -> list[PromptRow]:
    """Like ``load_prompts``, with the values that ``columns`` selects from each row. Equal prompts with different values are kept.

    Raises DataError if ``curator`` leaves no prompt.
    """
    prompts: list[PromptRow] = []
    seen: set[str] = set()
    num_repeated = 0
    rows = read_rows(sources, split=split)
    for row in rows if curator is None else curator.training(rows):
        prompt_row = PromptRow(prompt_in(row, prompt_words), columns(row))
        key = repr(prompt_row)
        if key not in seen:
            seen.add(key)
            prompts.append(prompt_row)
        else:
            num_repeated += 1
        if limit is not None and len(prompts) == limit:
            break
    names = ", ".join(source.path for source in sources)
    if num_repeated:
        announce(("repeated prompts", names), f"{names}: left out {num_repeated} prompts that repeat an earlier one")
    if not prompts:
        raise DataError(f"{names}: curation leaves no prompt; relax its limits")
    return prompts


def prompt_in(row: Row, words: int | None = None) -> Prompt:
    """The prompt of a row of any schema. ``words``: use only this many first words of its text. Raises DataError if there is no prompt."""
    if words is not None:
        column = "text" if "text" in row else "prompt"
        return " ".join(text_of(row, column).replace("<br />", " ").split()[:words])
    if holds_turns(row.get("chosen")) and "rejected" in row:
        return comparison(row).prompt
    if "prompt" in row:
        return prompt_of(row)
    if (conversation := conversation_column(row)) is not None:
        messages = messages_of(row, conversation)
        return split_messages(row, conversation)[0] if messages[-1]["role"] == "assistant" else messages
    if "instruction" in row:
        return demonstration(Row({**row, "output": row.get("output") or "-"}))["prompt"]
    if is_post(row):
        return post_prompt(row)
    if is_comparison(row):
        return compared_prompt(row)
    if isinstance(row.get("chosen"), list):
        return split_messages(row, "chosen")[0]
    if "chosen" in row:
        return split_dialogue(text_of(row, "chosen"), row, "chosen")[0]
    raise DataError(
        f"{row.location}: columns {', '.join(row)} contain no prompt; expected prompt, instruction, messages, conversations, chosen, or "
        "text with prompt_words" + renaming(row, "prompt", "instruction", "messages", "conversations", "chosen")
    )


def check_readers(models: Iterable[ResolvedModel], prompts: Sequence[Prompt]) -> None:
    """Render ``prompts`` with the chat template of each of ``models`` (resolved) that reads chats.

    These are registry language models and reward models; classifiers read plain text. Only tokenizers are loaded. Raises DataError with the
    location of a conversation that a template rejects.
    """
    from stages.models.loading import load_tokenizer

    for model in models:
        if model.record is not None and model.record.role in ("language_model", "reward_model"):
            check_rendering(load_tokenizer(model), ((prompt, [], location_of(prompt)) for prompt in prompts))


def compare_template_arguments(models: Iterable[ResolvedModel]) -> None:
    """Log a warning if two models of a step have the same chat template, but write a conversation differently because of its arguments."""
    from stages.models.loading import load_tokenizer

    first: dict[str, tuple[ResolvedModel, PreTrainedTokenizerBase]] = {}  # by template without arguments
    for model in models:
        if model.record is not None and model.record.role == "classifier":
            continue
        tokenizer = load_tokenizer(model)
        known, other = first.setdefault(str(without_arguments(tokenizer)), (model, tokenizer))
        own, others = arguments_in(tokenizer), arguments_in(other)
        with_reply = any(one.record is not None and one.record.role == "reward_model" for one in (known, model))
        if own != others and _written(tokenizer, with_reply=with_reply) != _written(other, with_reply=with_reply):
            logger.warning(
                "%s reads conversations with template_arguments %s, and %s with %s: they read different texts. Give both the same, "
                "unless you want this difference",
                known.ref,
                others or "none",
                model.ref,
                own or "none",
            )


def _written(tokenizer: PreTrainedTokenizerBase, *, with_reply: bool) -> str:
    """What the chat template writes for a test conversation; empty if it rejects it."""
    try:
        shown, written = render_pair(tokenizer, "hello", "hello")
    except DataError:
        return ""
    return shown + written if with_reply else shown


def plain_text(prompt: Prompt) -> str:
    """A prompt as one text with speaker names; see ``messages.transcript``."""
    return transcript(prompt)


def shuffled_forever(items: Sequence[Item], seed: int) -> Iterator[Item]:
    """Endless stream of ``items``. Each epoch has a new order, drawn from ``seed`` and the epoch's index."""
    epoch = 0
    while True:
        order = list(items)
        random.Random(f"{seed} {epoch}").shuffle(order)
        yield from order
        epoch += 1
