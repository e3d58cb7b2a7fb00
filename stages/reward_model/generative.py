"""A generative reward model: a language model that answers a question about a completion with one of two answers.

It is trained on comparisons or used without training. The score of a completion is the log-odds of the two answers. B texts, T tokens, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from stages.corpora.comparisons import Comparison, Comparisons
from stages.corpora.conversations.messages import completion_text
from stages.errors import DataError, ModelError
from stages.json_types import JsonObject
from stages.metric_names import (
    HELDOUT_ACCURACY_BEFORE,
    HELDOUT_BESIDE,
    NUM_COMPARISONS,
    NUM_PAIRS,
    curation_names,
    heldout_names,
)
from stages.models.loading import load_language_model, load_tokenizer
from stages.models.parts import evaluation_mode, moved_to
from stages.models.reward_question import RewardQuestion
from stages.models.saving import save_model
from stages.models.sharding import unsharded
from stages.process.console import made_of_each
from stages.reward_model.config import RewardModelConfig
from stages.reward_model.measuring import measure_beside, say_measured
from stages.reward_model.preferences import NO_PREFERENCE, Agreement, EncodedComparison, agreement
from stages.reward_model.rows import say_lost, usable
from stages.reward_model.training import RankingTrainer, make_trainer
from stages.rewards.details import Judgement
from stages.rewards.generative import GenerativeSource
from stages.rewards.source import judge
from stages.step import Publication, StepContext, StepResult
from stages.tokens.continuation import plain_ids
from stages.tokens.positions import row_length
from stages.training.arguments import training_arguments, weights_dtype
from stages.training.best import gathered_weights, publish_best
from stages.training.running import train

if TYPE_CHECKING:
    from stages.model_types import TransformersModel

ROLE = "generative_reward_model"


class LogOdds(nn.Module):
    """log P(first) - log P(second) of two one-token answers after each text: the difference of two logits at its last token."""

    def __init__(self, language_model: TransformersModel, first: int, second: int) -> None:
        super().__init__()
        self.language_model = language_model
        self.first, self.second = first, second
        self.config = self.language_model.config

    def forward(self, input_ids: Tensor, attention_mask: Tensor, *, right_padded: bool = True) -> Tensor:
        """Scores [B] (fp32) of right-padded texts [B, T]. ``right_padded`` is an argument only because ``RewardModel.forward`` has it."""
        assert right_padded
        logits = self.language_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        last = logits[torch.arange(len(input_ids), device=logits.device), attention_mask.sum(dim=1) - 1].float()
        return last[:, self.first] - last[:, self.second]

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: JsonObject | None = None, **options: object) -> None:
        """Enable gradient checkpointing in the language model."""
        self.language_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=gradient_checkpointing_kwargs)


def run_generative(
    config: RewardModelConfig, context: StepContext, load: Callable[[PreTrainedTokenizerBase], tuple[Comparisons, dict[str, int]]]
) -> StepResult:
    """Measure on held-out comparisons, train if the config asks for it, and publish the model with its question and answers.

    ``load(tokenizer)`` returns the comparisons, and the number of rows that were left out, by reason. Raises ModelError if ``model`` is not
    a language model, DataError if no held-out comparison has a preference.
    """
    assert config.generative is not None
    trains, source = config.generative.train, context.models["model"]
    judging = _load_judging(config, context)
    comparisons, left_out = load(judging.tokenizer)
    heldout = [item for item in comparisons.validation if item.num_pairs]
    encoded = made_of_each("encoding comparisons", lambda item: encode(item, judging), heldout)
    counted, lost = usable(encoded)
    say_lost(context, "held-out ", lost, judging.max_length or 0)
    texts = [item for item, rows in zip(heldout, encoded, strict=True) if rows.pairs[0]]
    before = after = measure(judging, texts, counted)
    trained: dict[str, float] = {}
    trainer: RankingTrainer | None = None
    if trains:
        trainer, trained = _train(config, context, judging, comparisons, lambda: measure(judging, texts, counted))
        after = measure(judging, texts, counted)
    say_measured(context, int(trained.get("optimizer_steps", 0)), before if trains else None, after)
    beside = measure_beside(config, context, texts, counted)
    metrics = {
        **({HELDOUT_ACCURACY_BEFORE: before["accuracy"]} if trains else {}),
        **({HELDOUT_BESIDE: beside} if beside else {}),
        **heldout_names(after),
        **trained,
        **heldout_names(lost.as_metrics()),
        **curation_names(left_out),
    }
    kind: Publication = {"role": ROLE, "base": source if config.lora is not None else None}
    save = partial(_save, judging, [item.rows[0] for item in counted])
    if trainer is not None:
        publish_best(trainer, context, save, **kind)
    weights = gathered_weights(trainer) if trainer is not None else None
    record = context.publish(lambda folder: save(folder, weights), metrics=metrics, **kind)
    return StepResult(model=record, metrics=metrics)


def _load_judging(config: RewardModelConfig, context: StepContext) -> GenerativeSource:
    """Load the language model with its question. Raises ModelError if ``model`` is not a language model."""
    assert config.generative is not None
    trains, source = config.generative.train, context.models["model"]
    if source.record is not None and source.record.role not in ("language_model", ROLE):
        raise ModelError(f"model: {source.ref!r} is a {source.record.role.replace('_', ' ')}; generative needs a language model")
    tokenizer = load_tokenizer(source)
    dtype = weights_dtype(config, context) if trains else context.runtime.dtype(config.precision)
    model = moved_to(
        load_language_model(source, dtype=dtype, lora=config.lora, trainable=trains, tokenizer=tokenizer), context.runtime.device
    )
    return GenerativeSource(
        context.name,
        model,
        tokenizer,
        RewardQuestion(config.generative.question, (config.generative.answers[0], config.generative.answers[1])),
        batch_size=config.training.measuring_rows,
        max_length=row_length(config.max_length, model.config, tokenizer, unlimited=2048),
        ref=source.ref,
    )


def _save(judging: GenerativeSource, rows: list[list[int]], folder: Path, weights: dict[str, Tensor] | None) -> None:
    """Save the model with its question.

    ``weights``: those of the trainer if they are sharded. ``rows``: token ids on which the saved model is compared with ``judging``.
    """
    own = None if weights is None else {name.removeprefix("language_model."): value for name, value in weights.items()}
    save_model(judging.model, judging.tokenizer, folder, state_dict=own, rows=rows)
    judging.asked.write(folder)


def encode(comparison: Comparison, judging: GenerativeSource) -> EncodedComparison:
    """The question about each completion as one row of token ids."""
    texts = [completion_text(completion) for completion in comparison.completions]
    rows = [judging.encode(comparison.prompt, text) for text in texts]
    return EncodedComparison(
        [ids for ids, _, _ in rows],
        comparison.ranks,
        comparison.groups,
        lengths=[len(plain_ids(judging.tokenizer, text)) for text in texts],
        cut=sum(cut for _, cut, _ in rows),
    )


def measure(judging: GenerativeSource, comparisons: Sequence[Comparison], encoded: Sequence[EncodedComparison]) -> Agreement:
    """Agreement of the log-odds with held-out comparisons. Raises DataError if there are none."""
    if not comparisons:
        raise DataError(NO_PREFERENCE)
    prompts = [item.prompt for item in comparisons for _ in item.completions]
    completions = [completion_text(text) for item in comparisons for text in item.completions]
    with evaluation_mode(judging.model), unsharded(judging.model):
        judgement: Judgement = judge(judging, prompts, completions)
    return agreement(judgement.scores, encoded)


def _train(
    config: RewardModelConfig,
    context: StepContext,
    judging: GenerativeSource,
    comparisons: Comparisons,
    measured: Callable[[], Agreement],
) -> tuple[RankingTrainer, dict[str, float]]:
    """Train with the ranking loss on the log-odds, as for a scalar reward model. Returns (trainer, training metrics).

    Raises ModelError unless both answers are one token each.
    """
    answers = [judging.answer_ids(answer) for answer in judging.asked.answers]
    if any(len(ids) != 1 for ids in answers):
        shown = ", ".join(f"{answer!r} ({len(ids)} tokens)" for answer, ids in zip(judging.asked.answers, answers, strict=True))
        raise ModelError(f"generative.train needs answers of one token each, got {shown}; choose other answers, or remove train")
    preferences = [item for item in comparisons.train if item.num_pairs]
    rows, lost = usable(made_of_each("encoding comparisons", lambda item: encode(item, judging), preferences))
    say_lost(context, "", lost, judging.max_length or 0)
    scorer = LogOdds(judging.model, answers[0][0], answers[1][0])
    arguments = training_arguments(config.training, context, precision=config.precision, remove_unused_columns=False)
    trainer = make_trainer(scorer, arguments, rows, judging.tokenizer.pad_token_id, config.loss)
    context.runtime.seed_everything(context.seed)
    trained = train(trainer, context, f"{context.name}: generative reward model", rule=config, measure=lambda: measured()["loss"])
    counts = {NUM_COMPARISONS: len(rows), NUM_PAIRS: sum(item.pairs[0] for item in rows), **lost.as_metrics()}
    return trainer, {**trained, **counts}
