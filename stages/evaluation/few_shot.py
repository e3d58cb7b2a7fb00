"""Few-shot prompting: its settings, the text before each prompt, and the prompts that choose between several texts."""

from __future__ import annotations

import random

from pydantic import Field, model_validator

from stages.config import DataField, Strict
from stages.corpora.conversations.messages import Prompt, completion_text, transcript
from stages.corpora.demonstrations import demonstration
from stages.corpora.files import read_rows
from stages.corpora.prompts import PromptRow, load_prompt_rows
from stages.errors import DataError
from stages.rewards.config import RewardInput
from stages.rewards.signature import columns_asked_for


class FewShotChoice(Strict):
    """Prompt engineering with a reward model (Ouyang et al. 2022, section 3.5): use the prompt whose answers score best."""

    reward: RewardInput = Field(description="Reward source that scores the answers to the validation prompts.")
    data: DataField = Field(description="Validation prompts; prompts of the evaluation are excluded.")
    num_prompts: int = Field(32, ge=1, description="Validation prompts answered in each try.")
    tries: int = Field(4, ge=2, description="Sets of examples to try (for each instruction).")


class FewShot(Strict):
    """Few-shot prompting: examples are put before every prompt."""

    data: DataField = Field(description="Demonstrations from which the examples are drawn.")
    num_examples: int = Field(3, ge=1, description="Examples before each prompt, drawn once with the step's seed.")
    instruction: str | list[str] = Field("", description="Text before the first example; from a list, choose selects one.")
    template: str = Field("{prompt}\n{completion}\n\n", description="One example; the prompt to answer uses the part before {completion}.")
    stop: str = Field("\n", min_length=1, description="Cut the completion where this text begins (the start of another example).")
    choose: FewShotChoice | None = Field(None, description="Choose examples and instruction with a reward model; null: the first draw.")

    @model_validator(mode="after")
    def _consistent(self) -> FewShot:
        if self.template.find("{prompt}") < 0 or self.template.find("{completion}") < self.template.find("{prompt}"):
            raise ValueError(f"template must contain {{prompt}} and then {{completion}}, got {self.template!r}")
        if isinstance(self.instruction, list) and (self.choose is None or not self.instruction):
            raise ValueError("instruction is a list: give it at least one text, and set choose, which selects one of them")
        return self


def few_shot_text(settings: FewShot, seed: int, *, draw: int = 0, instruction: int = 0) -> str:
    """The text before every prompt: the instruction and the ``draw``-th set of ``num_examples`` demonstrations.

    Raises DataError if there are too few demonstrations.
    """
    rows = read_rows(settings.data)
    if len(rows) < settings.num_examples:
        raise DataError(
            f"few_shot.data has {len(rows)} rows, fewer than num_examples={settings.num_examples}; add rows, or lower num_examples"
        )
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
    """The input of a candidate: the few-shot text, then the prompt up to the start of its completion."""
    head = settings.template.partition("{completion}")[0]
    # Trailing white space belongs to the completion, because a tokenizer joins it to the first word.
    return [(text + head.replace("{prompt}", transcript(prompt))).rstrip(" ") for prompt in prompts]


def validation_prompts(settings: FewShot, heldout: list[Prompt], *, run: bool = True) -> list[PromptRow]:
    """The prompts for choosing few-shot examples, without evaluation prompts. Raises DataError if there are none."""
    assert settings.choose is not None
    known = {repr(prompt) for prompt in heldout}
    columns = columns_asked_for([settings.choose.reward], run=run)
    rows = load_prompt_rows(settings.choose.data, split="validation", columns=columns)
    unused = [row for row in rows if repr(row.prompt) not in known]
    if not unused:
        raise DataError("all prompts of few_shot.choose.data are evaluation prompts; use different prompts for the choice")
    return unused[: settings.choose.num_prompts]
