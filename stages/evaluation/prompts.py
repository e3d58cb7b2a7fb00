"""The held-out prompts of an evaluation, and a record of what was excluded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from stages.config import DataSource
from stages.corpora.files import read_rows
from stages.corpora.prompts import PromptRow, load_prompts, prompt_in
from stages.errors import DataError
from stages.json_types import JsonObject
from stages.rewards.config import RewardInput
from stages.rewards.signature import columns_asked_for


@dataclass(frozen=True)
class Exclusion:
    """An exclusion: the number of excluded items, the total, and the reason. The report shows all exclusions."""

    what: str
    count: int
    of: int
    expected: bool = False  # intended by the recipe (duplicates, training prompts), not a data problem

    def as_json(self) -> JsonObject:
        return asdict(self)


def load_heldout(
    data: Sequence[DataSource],
    *,
    exclude: Sequence[DataSource] | None,
    prompt_words: int | None,
    num_prompts: int | None,
    scorers: Sequence[RewardInput],
    run: bool = True,
) -> tuple[list[PromptRow], list[Exclusion]]:
    """Load the distinct held-out prompts with the columns that the reward functions of ``scorers`` request, and the exclusions.

    ``prompt_words``: use so many first words of a text as the prompt; None uses all. ``num_prompts``: the most prompts; None loads all.
    ``run=False``: do not import function modules. Raises DataError if ``exclude`` leaves no prompt.
    """
    excluded = load_prompts(exclude, prompt_words=prompt_words) if exclude is not None else []
    known = {repr(prompt) for prompt in excluded}
    columns = columns_asked_for(scorers, run=run)
    rows = [PromptRow(prompt_in(row, prompt_words), columns(row)) for row in read_rows(data, split="test")]
    distinct = list({repr(row): row for row in rows}.values())
    apart = [row for row in distinct if repr(row.prompt) not in known]
    if not apart:
        raise DataError(f"all {len(distinct)} prompts of data occur in exclude; use different data, or raise prompt_words")
    exclusions = [
        Exclusion("prompts that occur more than once, counted once", len(rows) - len(distinct), len(rows), expected=True),
        Exclusion("prompts that occur in the training data (exclude)", len(distinct) - len(apart), len(distinct), expected=True),
    ]
    return apart[:num_prompts], [item for item in exclusions if item.count]
