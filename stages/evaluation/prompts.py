"""The prompts of an evaluation: held-out prompts, what each candidate sees, and few-shot texts."""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from stages.errors import DataError
from stages.evaluation.config import EvaluationConfig, FewShot

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from stages.corpora.messages import Prompt
    from stages.corpora.prompts import PromptRow
    from stages.registry.references import ResolvedModel


@dataclass(frozen=True)
class Exclusion:
    """An exclusion: the number of excluded items, the total, and the reason. The report shows all exclusions."""

    what: str
    count: int
    of: int
    expected: bool = False  # intended by the recipe (duplicates, training prompts), not a data problem

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def check_data(config: EvaluationConfig) -> None:
    """Raise DataError for data that an evaluation cannot use. No model is loaded."""
    from stages.corpora.completions import load_completions, prompt_key
    from stages.corpora.judgements import load_judgements
    from stages.judges.config import JudgementsFile

    config.check_rewards()
    rows, _ = load_heldout(config, run=False)
    prompts = [row.prompt for row in rows]
    keys = {prompt_key(prompt) for prompt in prompts}
    for name, candidate in config.candidates.items():
        if candidate.completions is not None and not keys & set(load_completions(candidate.completions)):
            raise DataError(f"candidate {name!r}: its completions answer none of the {len(prompts)} prompts; prompts must be equal")
        if candidate.few_shot is not None:
            few_shot_text(candidate.few_shot, 0)
            if candidate.few_shot.choose is not None:
                validation_prompts(candidate.few_shot, prompts, run=False)
    for judge in config.judges:
        if isinstance(judge, JudgementsFile):
            judgements = load_judgements(judge.judgements)
            if not judgements.candidates & set(config.candidates):
                known = f"it judges {', '.join(sorted(judgements.candidates)[:10])}; candidates are {', '.join(config.candidates)}"
                raise DataError(f"judge {judge.shown_name!r}: its judgements contain no candidate; {known}")
    heldout_texts(config)
    for task in config.tasks.values():
        task.load()


def load_heldout(config: EvaluationConfig, *, run: bool = True) -> tuple[list[PromptRow], list[Exclusion]]:
    """Load the distinct held-out prompts with the columns that reward functions request, and the exclusions.

    ``run=False``: do not import function modules. Raises DataError if ``exclude`` leaves no prompt.
    """
    from stages.corpora.files import read_rows
    from stages.corpora.prompts import PromptRow, load_prompts, prompt_in
    from stages.rewards.signature import columns_asked_for

    excluded = load_prompts(config.exclude, prompt_words=config.prompt_words) if config.exclude is not None else []
    known = {repr(prompt) for prompt in excluded}
    columns = columns_asked_for(config.scorers(), run=run)
    rows = [PromptRow(prompt_in(row, config.prompt_words), columns(row)) for row in read_rows(config.data, split="test")]
    distinct = list({repr(row): row for row in rows}.values())
    apart = [row for row in distinct if repr(row.prompt) not in known]
    if not apart:
        raise DataError(f"all {len(distinct)} prompts of data occur in exclude; use different data, or raise prompt_words")
    exclusions = [
        Exclusion("prompts that occur more than once, counted once", len(rows) - len(distinct), len(rows), expected=True),
        Exclusion("prompts that occur in the training data (exclude)", len(distinct) - len(apart), len(distinct), expected=True),
    ]
    return apart[: config.num_prompts], [item for item in exclusions if item.count]


def heldout_texts(config: EvaluationConfig) -> list[str]:
    """The texts for the perplexity; empty if there are none."""
    from stages.corpora.files import read_rows
    from stages.corpora.rows import text_of

    return [text_of(row, "text") for row in read_rows(config.perplexity, split="test")] if config.perplexity is not None else []


# Few-shot prompts


def few_shot_text(settings: FewShot, seed: int, *, draw: int = 0, instruction: int = 0) -> str:
    """The text before every prompt: the instruction and the ``draw``-th set of ``num_examples`` demonstrations.

    Raises DataError if there are too few demonstrations.
    """
    from stages.corpora.demonstrations import demonstration
    from stages.corpora.files import read_rows
    from stages.corpora.messages import completion_text, transcript

    rows = read_rows(settings.data)
    if len(rows) < settings.num_examples:
        raise DataError(f"few_shot.data has {len(rows)} rows, fewer than num_examples={settings.num_examples}")
    stream = random.Random(f"few shot {seed}" if draw == 0 else f"few shot {seed} {draw}")
    chosen = [demonstration(row) for row in stream.sample(rows, settings.num_examples)]
    # Not str.format, because a text may contain braces.
    texts = [
        settings.template.replace("{prompt}", transcript(row["prompt"])).replace("{completion}", completion_text(row["completion"]))
        for row in chosen
    ]
    before = settings.instruction if isinstance(settings.instruction, str) else settings.instruction[instruction]
    return before + "".join(texts)


def few_shot_prompts(settings: FewShot, text: str, prompts: list[Prompt]) -> list[Prompt]:
    """What a candidate sees: the few-shot text, then the prompt up to the start of its completion."""
    from stages.corpora.messages import transcript

    head = settings.template.partition("{completion}")[0]
    # Trailing white space belongs to the completion, because a tokenizer joins it to the first word.
    return [(text + head.replace("{prompt}", transcript(prompt))).rstrip(" ") for prompt in prompts]


def validation_prompts(settings: FewShot, heldout: list[Prompt], *, run: bool = True) -> list[PromptRow]:
    """The prompts for choosing few-shot examples, without evaluation prompts. Raises DataError if there are none."""
    from stages.corpora.prompts import load_prompt_rows
    from stages.rewards.signature import columns_asked_for

    assert settings.choose is not None
    known = {repr(prompt) for prompt in heldout}
    columns = columns_asked_for([settings.choose.reward], run=run)
    rows = load_prompt_rows(settings.choose.data, split="validation", columns=columns)
    unused = [row for row in rows if repr(row.prompt) not in known]
    if not unused:
        raise DataError("all prompts of few_shot.choose.data are evaluation prompts; use different prompts for the choice")
    return unused[: settings.choose.num_prompts]


# Tokens


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: list[Prompt]) -> list[list[int]]:
    """Token ids of each prompt, template included."""
    from stages.corpora.templates import encode_prompt

    return [encode_prompt(tokenizer, prompt) for prompt in prompts]


def positions_of(model: ResolvedModel) -> int:
    """The maximum sequence length of a model and its tokenizer, in tokens. Uses the config of the base weights."""
    from stages.models.loading import config_of, load_tokenizer
    from stages.tokens.positions import readable_length

    return readable_length(config_of(model), load_tokenizer(model)) or 1_000_000
