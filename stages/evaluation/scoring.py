"""Scores of completions by a reward source, divided among the processes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from stages.errors import ModelError
from stages.evaluation.config import EvaluationConfig
from stages.rewards.building import build_source
from stages.rewards.details import Details
from stages.rewards.source import judge

if TYPE_CHECKING:
    from stages.corpora.conversations.messages import Prompt
    from stages.rewards.config import RewardInput
    from stages.step import StepContext


def score_texts(
    config: EvaluationConfig,
    context: StepContext,
    reward: RewardInput,
    field_path: str,
    prompts: Sequence[Prompt],
    completions: Sequence[str],
    details: Details,
) -> list[float | None]:
    """A reward source's score of every completion, or None where it does not apply. Each process scores its share.

    Prints how many texts were cut, and adds this to ``context.cut_texts``.
    """
    runtime = context.runtime
    source = build_source(
        reward,
        context.models.get(f"{field_path}.model"),
        device=runtime.device,
        dtype=runtime.dtype(config.precision),
        cache_folder=context.cache_folder,
    )

    def work(own: list[int]) -> list[tuple[float | None, bool]]:
        judgement = judge(source, [prompts[row] for row in own], [completions[row] for row in own], details.rows(own))
        cut = judgement.cut.tolist() if judgement.cut is not None else [False] * len(own)
        return [(None if math.isnan(score) else score, lost) for score, lost in zip(judgement.scores.tolist(), cut, strict=True)]

    made = runtime.distribute(len(completions), work)
    if cut := sum(lost for _, lost in made):
        said = f"{reward.shown_name} truncated the beginning of {cut} of {len(made)} texts that were too long"
        runtime.console.print(f"{context.name}: {said}")
    counted = context.cut_texts.setdefault(field_path, {"reader": reward.shown_name, "count": 0, "of": 0})
    counted["count"] += cut
    counted["of"] += len(made)
    return [score for score, _ in made]


def every_score(
    config: EvaluationConfig,
    context: StepContext,
    reward: RewardInput,
    field_path: str,
    prompts: Sequence[Prompt],
    completions: Sequence[str],
    details: Details,
) -> list[float]:
    """``score_texts`` for a source that must choose. Raises ModelError if it does not apply to a completion."""
    scores = score_texts(config, context, reward, field_path, prompts, completions, details)
    known = [score for score in scores if score is not None]
    if len(known) < len(scores):
        text = completions[scores.index(None)]
        raise ModelError(f"{field_path}: {reward.shown_name} returned None for {text[:80]!r}; selection needs a score for every completion")
    return known
