"""The reward model stage: ranked completions in, one scalar per text out, with InstructGPT's loss (Ouyang et al. 2022, section 3.5).

All pairs of a prompt are one batch element: each of its K completions is scored once, and the element's weight does not depend on K.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedTokenizerBase

from stages.corpora.comparisons import Comparison, Comparisons, load_comparisons
from stages.corpora.conversations.messages import Completion, Prompt
from stages.corpora.curation import Curator
from stages.corpora.encoding.fitting import fit_prompt
from stages.corpora.templates import check_rendering, count_tokens, encode_prompt
from stages.engines.opening import step_sampler
from stages.errors import DataError, ModelError, TrainingError
from stages.json_types import JsonObject
from stages.metric_names import (
    HELDOUT_ACCURACY_BEFORE,
    HELDOUT_BESIDE,
    NUM_COMPARISONS,
    NUM_DEMONSTRATIONS,
    NUM_PAIRS,
    curation_names,
    heldout_names,
)
from stages.models.heads import RewardModel
from stages.models.loaded import LoadedModel
from stages.models.loading import load_tokenizer
from stages.models.sharding import unsharded
from stages.process.console import made_of_each
from stages.reward_model.collection import collect_comparisons
from stages.reward_model.config import RewardModelConfig
from stages.reward_model.generative import run_generative
from stages.reward_model.measuring import inference, measure, measure_beside, say_measured
from stages.reward_model.preferences import Agreement, EncodedComparison
from stages.reward_model.rows import Lost, encode, encode_pairs, say_lost, usable
from stages.reward_model.training import Attempt, RankingTrainer, finished, new_model, train_with_seed
from stages.rewards.learned import score_rows
from stages.sampling.generation import decode_completions, episode_seed
from stages.step import Publication, StepContext, StepResult
from stages.tokens.positions import row_length
from stages.training.best import gathered_weights, publish_best
from stages.training.checkpoints import load_tensors, trainable


def run(config: RewardModelConfig, context: StepContext) -> StepResult:
    """Train, normalise and publish; measure held-out accuracy and calibration before and after."""
    if config.generative is not None:
        return run_generative(config, context, lambda tokenizer: _load_comparisons(config, context, tokenizer))
    _check_texts(config, context)
    if config.collect is not None and config.collect.people is not None:
        collect_comparisons(config.collect, context, precision=config.precision)  # may wait for annotators, so do it before loading
    model = new_model(config, context, context.seed)
    tokenizer = model.tokenizer
    assert tokenizer is not None
    max_length = row_length(config.max_length, model.config, tokenizer, unlimited=2048)
    data = _load_data(config, context, tokenizer, max_length)
    _warn_of_overfitting(config, context)
    texts = _texts_to_normalize_on(config, context, data.comparisons)
    rows_of_texts = encode_pairs(texts, tokenizer, max_length)
    scoring = {"pad_token_id": tokenizer.pad_token_id, "batch_size": config.training.measuring_rows}
    before = measure(model.to(context.runtime.device), data.measuring, **scoring)

    def normalise(model: RewardModel) -> tuple[float, float]:
        return _normalise(config, context, model, rows_of_texts, scoring)

    model, trainer, attempts = _train_all_seeds(config, context, model, data, scoring, normalise)
    best = max(attempts, key=lambda attempt: attempt.accuracy)  # the first of equal ones
    if best is not attempts[-1]:
        _load_attempt(context, model, best)
    kind: Publication = {"role": "reward_model", "base": context.models["model"] if config.lora is not None else None}
    shown = [item.rows[0] for item in data.heldout]  # rows on which the saved model is compared with the model in memory
    publish_best(
        trainer,
        context,
        lambda folder, weights: model.save(folder, tokenizer, state_dict=weights, rows=shown),
        prepare=lambda: normalise(model),
        **kind,
    )
    gain, deviation = normalise(model)
    after = measure(model, data.measuring, gain=gain, **scoring)
    say_measured(context, int(best.trained["optimizer_steps"]), before, after)
    beside = measure_beside(config, context, data.texts_of_measuring, data.measuring)
    scale: JsonObject = {
        "reward_bias": model.reward_bias,
        "reward_gain": gain,
        NUM_DEMONSTRATIONS: len(texts),
        "demonstration_reward_std": deviation,
    }
    metrics = _metrics(config, data, attempts, best, before, after, beside, scale)
    weights = gathered_weights(trainer)
    record = context.publish(lambda folder: model.save(folder, tokenizer, state_dict=weights, rows=shown), metrics=metrics, **kind)
    return StepResult(model=record, metrics=metrics)


def _train_all_seeds(
    config: RewardModelConfig,
    context: StepContext,
    model: RewardModel,
    data: _Data,
    scoring: dict[str, int],
    normalise: Callable[[RewardModel], object],
) -> tuple[RewardModel, RankingTrainer, list[Attempt]]:
    """Train ``model``, and a new model for each further seed. Returns the last model, its trainer, and one attempt per seed."""
    attempts: list[Attempt] = []
    for seed in range(context.seed, context.seed + config.num_seeds):
        if seed != context.seed:
            context.runtime.seed_everything(seed)  # adapter weights are drawn from the process's generator
            model = new_model(config, context, seed).to(context.runtime.device)
        if config.normalization.before_training:
            normalise(model)
        attempt, trainer = train_with_seed(config, context, model, data.train, data.deciding, scoring, seed)
        attempts.append(attempt)
    return model, trainer, attempts


# Data

COLLECTED = "collected by the step"  # annotator name of comparisons made by the step


def _check_texts(config: RewardModelConfig, context: StepContext) -> None:
    """Raise DataError with the row's location for a conversation that the chat template rejects, before weights are loaded."""
    check_rendering(load_tokenizer(context.models["model"]), config.conversations())


@dataclass(frozen=True)
class _Data:
    """The comparisons of the step as token ids. Those without a preference, or without room for one, are left out.

    ``deciding``: held-out comparisons that choose among several seeds. ``measuring``: those of the published accuracy, with their texts.
    With one seed both are ``heldout``; with several they are its two halves. ``lost``: what did not fit the maximum length. ``left_out``:
    numbers of rows that the curation left out, by reason.
    """

    comparisons: Comparisons
    train: list[EncodedComparison]
    heldout: list[EncodedComparison]
    deciding: list[EncodedComparison]
    measuring: list[EncodedComparison]
    texts_of_measuring: list[Comparison]
    lost: Lost
    lost_heldout: Lost
    left_out: dict[str, int]


def _load_data(config: RewardModelConfig, context: StepContext, tokenizer: PreTrainedTokenizerBase, max_length: int) -> _Data:
    """Load and encode the comparisons. Says how many did not fit ``max_length`` tokens."""
    comparisons, left_out = _load_comparisons(config, context, tokenizer)

    def encoded_of(items: Sequence[Comparison]) -> list[EncodedComparison]:
        preferences = [item for item in items if item.num_pairs]
        return made_of_each("encoding comparisons", lambda item: encode(item, tokenizer, max_length), preferences)

    train, lost = usable(encoded_of(comparisons.train))
    validation = [item for item in comparisons.validation if item.num_pairs]
    encoded = encoded_of(validation)
    heldout, lost_heldout = usable(encoded)
    texts = [item for item, rows in zip(validation, encoded, strict=True) if rows.pairs[0]]
    for which, counts in (("", lost), ("held-out ", lost_heldout)):
        say_lost(context, which, counts, max_length)
    if config.num_seeds > 1 and len(heldout) < 2:
        raise DataError(
            f"num_seeds={config.num_seeds} needs two held-out comparisons, one to select the best model and one to measure it, but there "
            f"is {len(heldout)}. Add validation data, or set num_seeds: 1"
        )
    halves = (heldout, heldout, texts) if config.num_seeds == 1 else (heldout[::2], heldout[1::2], texts[1::2])
    return _Data(comparisons, train, heldout, *halves, lost, lost_heldout, left_out)


def _load_comparisons(
    config: RewardModelConfig, context: StepContext, tokenizer: PreTrainedTokenizerBase
) -> tuple[Comparisons, dict[str, int]]:
    """Return (the comparisons, including collected ones, with fitted prompts; the numbers of filtered rows by reason)."""
    curator = Curator(config.curation, count_tokens(tokenizer))
    loaded = load_comparisons(config.data, preferred=config.preferred, curator=curator, group_by=config.group_by)
    train, validation = loaded.train, loaded.validation
    if config.collect is not None:
        collected = collect_comparisons(config.collect, context, precision=config.precision)
        train = [*train, *(replace(item, annotator=item.annotator or COLLECTED) for item in collected)]
    fit = config.prompt_fit
    if fit is not None:
        train, validation = (
            [replace(item, prompt=fit_prompt(item.prompt, fit, tokenizer, item.location)) for item in side] for side in (train, validation)
        )
    return Comparisons(train, validation, len(train) - len(loaded.train)), dict(curator.left_out)


def _texts_to_normalize_on(config: RewardModelConfig, context: StepContext, comparisons: Comparisons) -> list[tuple[Prompt, Completion]]:
    """(prompt, completion) pairs whose mean score becomes 0."""
    if config.normalization.on == "demonstrations":
        return config.load_demonstrations() or [(item.prompt, item.best) for item in comparisons.train]
    source = context.models["normalization.sampler" if config.normalization.sampler is not None else "model"]
    if source.record is not None and source.record.role != "language_model":
        raise ModelError(
            f"normalization.on: samples needs a policy to sample from, but {source.ref!r} is a {source.record.role}; "
            "set normalization.sampler"
        )
    runtime, generation = context.runtime, config.normalization.generation
    policy = LoadedModel.frozen(source, runtime.dtype(config.precision), runtime.device)
    tokenizer = policy.tokenizer
    distinct = list({repr(item.prompt): item.prompt for item in comparisons.train}.values())
    prompts = [distinct[index % len(distinct)] for index in range(config.normalization.num_samples)]
    seeds = [episode_seed(context.seed, -3, index) for index in range(len(prompts))]
    with step_sampler(generation, policy, context) as sampler:
        generated = sampler.sample([encode_prompt(tokenizer, prompt) for prompt in prompts], generation, seeds)
    texts = decode_completions(tokenizer, generated)
    del policy, sampler
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return list(zip(prompts, texts, strict=True))


# Training


def _warn_of_overfitting(config: RewardModelConfig, context: StepContext) -> None:
    if config.training.epochs > 1:
        context.runtime.console.print(
            f"{context.name}: {config.training.epochs:g} epochs; reward models overfit quickly (Ouyang et al. 2022, C.2: one epoch)"
        )


def _normalise(
    config: RewardModelConfig, context: StepContext, model: RewardModel, rows: list[list[int]], scoring: dict[str, int]
) -> tuple[float, float]:
    """Normalise the scores on the texts ``rows``. Returns (gain, previous standard deviation of the scores)."""
    with unsharded(model):
        pad, size = scoring["pad_token_id"], scoring["batch_size"]
        scores = score_rows(rows, inference(model.eval()), pad, size, context.runtime.device, known_by=model).double()
    mean, deviation = float(scores.mean()), float(scores.std(correction=0))
    if config.normalization.to == "standardize":
        return model.standardize(mean, deviation), deviation
    if config.normalization.to == "center":
        model.center(mean)
    return 1.0, deviation


def _load_attempt(context: StepContext, model: RewardModel, attempt: Attempt) -> None:
    """Load the final weights of an earlier attempt into ``model``. Raises TrainingError if they are damaged."""
    kept = finished(context, attempt.seed).newest()
    if kept is None:
        raise TrainingError(f"{context.name}: the saved weights of seed {attempt.seed} are damaged; run the command again")
    load_tensors(trainable(model), kept.path / "model.safetensors")


def _metrics(
    config: RewardModelConfig,
    data: _Data,
    attempts: list[Attempt],
    best: Attempt,
    before: Agreement,
    after: Agreement,
    beside: dict[str, dict[str, float]],
    scale: JsonObject,
) -> JsonObject:
    """The summary of the step. ``beside``: held-out agreement of other rewards. ``scale``: how the scores were normalised."""
    metrics: JsonObject = {
        HELDOUT_ACCURACY_BEFORE: before["accuracy"],
        **({HELDOUT_BESIDE: beside} if beside else {}),
        **heldout_names(after),
        **best.trained,
        NUM_COMPARISONS: len(data.train),
        NUM_PAIRS: sum(item.pairs[0] for item in data.train),
        "all_ties": sum(not item.num_pairs for item in data.comparisons.train),
        **data.lost.as_metrics(),
        **heldout_names(data.lost_heldout.as_metrics()),
        **scale,
        **curation_names(data.left_out),
    }
    if config.collect is not None:
        metrics["collected"] = data.comparisons.collected
    if config.num_seeds > 1:
        metrics |= {"seeds": {str(attempt.seed): attempt.accuracy for attempt in attempts}, "selected_seed": best.seed}
    return metrics
