"""The memory of reward sources and judges whose model is loaded in this process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from stages.memory.estimate import Machine, Memory, Phase
from stages.memory.lengths import CHARACTERS_PER_TOKEN
from stages.memory.models import View, inference_phase
from stages.rewards.config import RewardInput, leaves

Judge = tuple[RewardInput, View]
"""A source of a recipe, and its model."""


def judges_of(sources: Sequence[RewardInput], field_path: str, models: Mapping[str, View]) -> list[Judge]:
    """The sources with a model, including members of ensembles. ``models``: by field path (``reward[0].model``)."""
    by_path = leaves(list(sources), field_path).items()
    return [(source, models[f"{path}.model"]) for path, source in by_path if f"{path}.model" in models]


def is_generative(judge: Judge) -> bool:
    """Whether the source asks a language model, and so needs its output layer."""
    source, view = judge
    return source.answers is not None or view.generative


def is_reward_model(judge: Judge) -> bool:
    """Whether the source is a scalar head on a transformer, which can share a backbone."""
    return judge[0].label is None and not is_generative(judge)


def frozen_judge(judge: Judge, compute: int) -> Memory:
    """The loaded model of a source."""
    source, view = judge
    return view.as_classifier.frozen(compute) if source.label is not None else view.frozen(compute, output=is_generative(judge))


def scoring_phase(judge: Judge, completions: int, prompt: int, new: int, compute: int, machine: Machine) -> Phase:
    """The largest pass of a source over ``completions`` texts: prompts of up to ``prompt`` tokens with ``new`` tokens.

    Texts that are too long are cut. A language model reads each text twice, with a question and one of two answers, and makes the logits of
    all tokens.
    """
    source, view = judge
    columns = min(_columns(judge, prompt, new), view.shape.positions)
    if not is_generative(judge):
        rows = min(source.batch_size, completions)
        return inference_phase(view, rows, columns, compute, machine, masked=source.label is not None)
    rows = min(source.batch_size, 2 * completions)
    logits = rows * columns * view.shape.vocabulary * compute
    return inference_phase(view, rows, columns, compute, machine, logits=logits, masked=True)


def _columns(judge: Judge, prompt: int, new: int) -> int:
    """The most tokens of a text that a source reads, if it can read all."""
    source, _ = judge
    if is_generative(judge):
        asked = int(len(source.question) / CHARACTERS_PER_TOKEN)
        return asked + new + (prompt if "{prompt}" in source.question else 0)
    return new if source.label is not None and source.reads == "completion" else prompt + new
