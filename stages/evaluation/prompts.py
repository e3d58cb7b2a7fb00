"""The prompts of an evaluation: those held out, what each candidate is shown for them, and the few-shot text before them."""

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
    """Something that was left out: how many of how many, and why. The report shows every one."""

    what: str
    count: int
    of: int
    expected: bool = False  # what the recipe asks for (a prompt counts once, training prompts are left out), and no flaw of the data

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def check_data(config: EvaluationConfig) -> None:
    """Raise DataError for data an evaluation cannot use; no model is loaded."""
    from stages.corpora.completions import load_completions, prompt_key
    from stages.corpora.judgements import load_judgements
    from stages.judges.config import JudgementsFile

    config.check_rewards()
    rows, _ = load_heldout(config, run=False)
    prompts = [row.prompt for row in rows]
    keys = {prompt_key(prompt) for prompt in prompts}
    for name, candidate in config.candidates.items():
        if candidate.completions is not None and not keys & set(load_completions(candidate.completions)):
            raise DataError(f"candidate {name!r}: its completions answer none of the {len(prompts)} prompts; a prompt must match whole")
        if candidate.few_shot is not None:
            few_shot_text(candidate.few_shot, 0)
            if candidate.few_shot.choose is not None:
                validation_prompts(candidate.few_shot, prompts, run=False)
    for judge in config.judges:
        if isinstance(judge, JudgementsFile):
            judgements = load_judgements(judge.judgements)
            if not judgements.candidates & set(config.candidates):
                known = f"it judges {', '.join(sorted(judgements.candidates)[:10])}; candidates are {', '.join(config.candidates)}"
                raise DataError(f"judge {judge.shown_name!r}: its judgements are about no candidate; {known}")
    heldout_texts(config)
    for task in config.tasks.values():
        task.load()


def load_heldout(config: EvaluationConfig, *, run: bool = True) -> tuple[list[PromptRow], list[Exclusion]]:
    """The held-out prompts with the columns that reward functions ask for, each once, and what was left out of them.

    ``run=False``: no module of a function is imported. Raises DataError where ``exclude`` leaves no prompt.
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
        raise DataError(f"all {len(distinct)} prompts of data occur in exclude; name data kept apart, or raise prompt_words")
    exclusions = [
        Exclusion("prompts that occur more than once, counted once", len(rows) - len(distinct), len(rows), expected=True),
        Exclusion("prompts that occur in the training data (exclude)", len(distinct) - len(apart), len(distinct), expected=True),
    ]
    return apart[: config.num_prompts], [item for item in exclusions if item.count]


def heldout_texts(config: EvaluationConfig) -> list[str]:
    """The texts of the perplexity; empty where none are named."""
    from stages.corpora.files import read_rows, text_of

    return [text_of(row, "text") for row in read_rows(config.perplexity, split="test")] if config.perplexity is not None else []


# Few-shot prompts


def few_shot_text(settings: FewShot, seed: int, *, draw: int = 0, instruction: int = 0) -> str:
    """The text put before every prompt: the instruction and ``num_examples`` demonstrations, the ``draw``-th set of them.

    Raises DataError where there are too few.
    """
    from stages.corpora.demonstrations import demonstration
    from stages.corpora.files import read_rows
    from stages.corpora.messages import completion_text, transcript

    rows = read_rows(settings.data)
    if len(rows) < settings.num_examples:
        raise DataError(f"few_shot.data has {len(rows)} rows, fewer than num_examples={settings.num_examples}")
    stream = random.Random(f"few shot {seed}" if draw == 0 else f"few shot {seed} {draw}")
    chosen = [demonstration(row) for row in stream.sample(rows, settings.num_examples)]
    # Not str.format: a text of a data set may hold braces.
    texts = [
        settings.template.replace("{prompt}", transcript(row["prompt"])).replace("{completion}", completion_text(row["completion"]))
        for row in chosen
    ]
    before = settings.instruction if isinstance(settings.instruction, str) else settings.instruction[instruction]
    return before + "".join(texts)


def few_shot_prompts(settings: FewShot, text: str, prompts: list[Prompt]) -> list[Prompt]:
    """What a candidate is shown: the text, then the prompt up to where its completion begins."""
    from stages.corpora.messages import transcript

    head = settings.template.partition("{completion}")[0]
    # White space at the end is the completion's: a tokenizer joins it to the first word.
    return [(text + head.replace("{prompt}", transcript(prompt))).rstrip(" ") for prompt in prompts]


def validation_prompts(settings: FewShot, heldout: list[Prompt], *, run: bool = True) -> list[PromptRow]:
    """The prompts by which few-shot examples are chosen, none of which is evaluated on. Raises DataError where there are none."""
    from stages.corpora.prompts import load_prompt_rows
    from stages.rewards.signature import columns_asked_for

    assert settings.choose is not None
    known = {repr(prompt) for prompt in heldout}
    columns = columns_asked_for([settings.choose.reward], run=run)
    rows = load_prompt_rows(settings.choose.data, split="validation", columns=columns)
    found = [row for row in rows if repr(row.prompt) not in known]
    if not found:
        raise DataError("few_shot.choose.data holds no prompt that is not evaluated on; the choice needs prompts of its own")
    return found[: settings.choose.num_prompts]


# Tokens


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: list[Prompt]) -> list[list[int]]:
    """Token ids of each prompt, as the model is shown it."""
    from stages.corpora.templates import encode_prompt

    return [encode_prompt(tokenizer, prompt) for prompt in prompts]


def positions_of(model: ResolvedModel) -> int:
    """The longest sequence, in tokens, that a model and its tokenizer can read. The config is that of the weights below all adapters."""
    from stages.models.loading import config_of, load_tokenizer
    from stages.tokens.positions import readable_length

    return readable_length(config_of(model), load_tokenizer(model)) or 1_000_000
