"""Comparisons for reward models: a prompt and K >= 2 ranked completions. K may differ between rows, and ranks may tie.

prompt + completions + ranks         ranks: 0 is best, equal ranks tie
prompt + responses (+ scores)        best first; equal scores tie
prompt + chosen + rejected           the usual pair: text, or turns that follow the prompt
conversations + chosen + rejected    ShareGPT's pair: a conversation that ends with a user turn, and two answers
chosen + rejected                    full conversations, or hh-rlhf's dialogues; their common beginning is the prompt
info + summaries + choice            openai/summarize_from_feedback as published; ``worker`` is the annotator
prompt + responses as an object      {name: text}; ``preferred`` names the best one, the others tie
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from stages.config import DataInput
from stages.corpora.conversations.messages import (
    Completion,
    Prompt,
    holds_turns,
    open_conversation,
    prompt_of,
    split_answers,
    split_dialogue,
)
from stages.corpora.files import read_splits
from stages.corpora.rows import Row, near_column, renaming, structure_in, text_of
from stages.corpora.splits import say_shared
from stages.corpora.summaries import compared_prompt, compared_summaries, is_comparison
from stages.errors import DataError
from stages.json_types import is_finite_number

if TYPE_CHECKING:
    from stages.corpora.rows import RowFilter

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Completions of one prompt and their ranks (0 is best; equal ranks tie).

    ``location``: where the row is in its file, such as ``file:line``.
    """

    prompt: Prompt
    completions: Sequence[Completion]
    ranks: list[int]
    annotator: str | None = None
    groups: dict[str, str] = field(default_factory=dict)  # columns by which accuracy is split
    location: str = field(default="", compare=False)

    @property
    def num_pairs(self) -> int:
        """Number of pairs whose ranks differ."""
        return sum(a != b for index, a in enumerate(self.ranks) for b in self.ranks[:index])

    @property
    def best(self) -> Completion:
        return self.completions[self.ranks.index(min(self.ranks))]


@dataclass(frozen=True)
class Comparisons:
    """Training comparisons and held-out comparisons."""

    train: list[Comparison]
    validation: list[Comparison]
    collected: int = 0  # number of training comparisons that the step itself sampled and labelled


def load_comparisons(
    data: DataInput, *, preferred: str | None = None, curator: RowFilter | None = None, group_by: Sequence[str] = ()
) -> Comparisons:
    """Load both splits. Raises DataError for a malformed row, and for a split in which every comparison is a tie."""
    splits = []
    for rows, which in zip(read_splits(data, curator), ("training", "held-out"), strict=True):
        made = [replace(comparison(row, preferred=preferred), groups=_groups(row, group_by), location=row.location) for row in rows]
        if not any(item.num_pairs for item in made):
            raise DataError(f"the {which} comparisons ({len(made)} rows, first {rows[0].location}) are all ties; expected a preference")
        _say_contradictions(made, which)
        splits.append(made)
    say_shared(*(((repr((item.prompt, sorted(map(repr, item.completions)))), item.location) for item in made) for made in splits))
    return Comparisons(splits[0], splits[1])


def _say_contradictions(comparisons: Sequence[Comparison], which: str) -> None:
    """Warn about comparisons whose order of two texts is the opposite of another comparison with the same prompt."""
    by_prompt: dict[str, list[Comparison]] = {}
    for item in comparisons:
        by_prompt.setdefault(repr(item.prompt), []).append(item)
    against = [item for items in by_prompt.values() if len(items) > 1 for item in _contradictory(items)]
    if against:
        logger.warning(
            "%d of %d %s comparisons contradict another one: same prompt, same two texts, other order (the first: %s)",
            len(against),
            len(comparisons),
            which,
            against[0].location,
        )


def _contradictory(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Those of the comparisons of one prompt that contradict another one."""
    preferences = {pair for item in comparisons for pair in _preferences(item)}
    return [item for item in comparisons if any((worse, better) in preferences for better, worse in _preferences(item))]


def _preferences(item: Comparison) -> Iterator[tuple[str, str]]:
    """(better text, worse text) of each pair whose ranks and texts differ."""
    ranked = [(repr(completion), rank) for completion, rank in zip(item.completions, item.ranks, strict=True)]
    for better, high in ranked:
        for worse, low in ranked:
            if high < low and better != worse:
                yield better, worse


def comparison(row: Row, *, preferred: str | None = None) -> Comparison:
    """Convert one row to ranked completions. ``preferred``: the best key of completions that are an object.

    Raises DataError with the row's location for a row of another form.
    """
    annotator = row.get("annotator")
    name = annotator if isinstance(annotator, str) else None
    if "chosen" in row and "rejected" in row:
        return Comparison(*_chosen_and_rejected(row), [0, 1], name)
    if is_comparison(row):
        worker = row.get("worker")
        return Comparison(compared_prompt(row), *compared_summaries(row), name or (worker if isinstance(worker, str) else None))
    column = next((column for column in ("completions", "responses") if column in row), None)
    if column is None:
        raise DataError(
            f"{row.location}: columns {', '.join(row)} are not a comparison; expected prompt + completions + ranks, prompt + responses "
            "(+ scores), info + summaries + choice, or (prompt +) chosen + rejected"
            + (
                renaming(row, "prompt chosen rejected", "chosen rejected", "prompt completions ranks", "prompt responses scores")
                or _rated(row)
            )
        )
    answers, ranks = _ranked(row, column, preferred)
    if all(holds_turns(answer) for answer in answers):
        prompt, completions = split_answers(row, {f"{column}, entry {index}": answer for index, answer in enumerate(answers, 1)})
        return Comparison(prompt, completions, ranks, name)
    for index, text in enumerate(answers, 1):
        if not isinstance(text, str):
            raise DataError(f"{row.location}: {column}, entry {index} is {type(text).__name__}; expected text")
    return Comparison(prompt_of(row), answers, ranks, name)


def _rated(row: Row) -> str:
    """The end of a message about a row with the rating of one completion; empty for other rows."""
    if near_column("completion", row) is None or not any(is_finite_number(value) for value in row.values()):
        return ""
    return ". Ratings: put all completions of a prompt into one row, as prompt + responses + scores"


def _chosen_and_rejected(row: Row) -> tuple[Prompt, list[Completion]]:
    """(the prompt, [chosen, rejected]) of a row with these columns: completions of a prompt, conversations, or dialogues as text."""
    sides = {column: row[column] for column in ("chosen", "rejected")}
    if any(holds_turns(side) for side in sides.values()) or open_conversation(row) is not None:
        return split_answers(row, sides)
    if "prompt" in row:
        return prompt_of(row), [text_of(row, column) for column in sides]
    first, chosen = split_dialogue(text_of(row, "chosen"), row, "chosen")
    other, rejected = split_dialogue(text_of(row, "rejected"), row, "rejected")
    if first != other:
        # A few hh-rlhf dialogues differ before the last turn: their common prefix is the prompt, the rest is compared.
        common = _common(first + chosen, other + rejected)
        first, chosen, rejected = common, (first + chosen)[len(common) :], (other + rejected)[len(common) :]
    return first, [chosen, rejected]


def _ranked(row: Row, column: str, preferred: str | None) -> tuple[list[Any], list[int]]:
    """(the completions in ``column``, not yet checked; their ranks)."""
    value = structure_in(row, column)
    if isinstance(value, dict):
        if preferred not in value:
            raise DataError(f"{row.location}: {column} is an object; set preferred to one of {', '.join(value)} (got {preferred!r})")
        value, ranks = list(value.values()), [int(key != preferred) for key in value]
    elif isinstance(value, list):
        ranks = _ranks(row, column, len(value))
    else:
        raise DataError(f"{row.location}: {column} is {type(value).__name__} ({value!r:.60}); expected a list of texts, or its JSON text")
    if len(value) < 2:
        raise DataError(f"{row.location}: {len(value)} completion(s); a comparison needs at least 2. Add one, or remove the row")
    return value, ranks


def _groups(row: Row, columns: Sequence[str]) -> dict[str, str]:
    for column in columns:
        if column not in row:
            raise DataError(f"{row.location}: group_by names {column!r}, and the row has {', '.join(row)}; name one of these columns")
    return {column: str(row[column]) for column in columns}


def _ranks(row: Row, column: str, count: int) -> list[int]:
    given = structure_in(row, "ranks" if "ranks" in row else "scores")
    if given is None:
        if column == "completions":
            raise DataError(f"{row.location}: completions without ranks; expected ranks (0 best, equal numbers tie) or scores")
        return list(range(count))  # responses: best first
    if not isinstance(given, list) or len(given) != count or not all(isinstance(item, bool) or is_finite_number(item) for item in given):
        raise DataError(f"{row.location}: expected {count} numbers in {'ranks' if 'ranks' in row else 'scores'}, got {given!r:.80}")
    ordered = sorted(set(given), reverse="ranks" not in row)
    return [ordered.index(item) for item in given]


def _common(first: str, second: str) -> str:
    """The longest common prefix that ends with an assistant marker."""
    length = next((index for index, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second)))
    head, mark, _ = first[:length].rpartition("\n\nAssistant:")
    return head + mark
