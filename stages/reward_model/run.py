"""The reward model: ranked completions in, one scalar per text out, with InstructGPT's loss (Ouyang et al. 2022, section 3.5).

All pairs of a prompt are one batch element: its K completions are scored once each, and the element weighs the same whatever K is.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from stages.config import (
    DataField,
    DataInput,
    DataSource,
    GenerationSettings,
    ModelField,
    ModelInput,
    OptimizerSettings,
    Strict,
    TrainingStepConfig,
)
from stages.corpora.curation import Curation
from stages.corpora.fitting import PromptFit
from stages.errors import DataError, ModelError, TrainingError
from stages.reward_model.collection import Collection
from stages.rewards.config import RewardInput, check_names, check_rubrics, reward_model_inputs, rubric_inputs

if TYPE_CHECKING:
    import torch

    from stages.corpora.comparisons import Comparison, Comparisons
    from stages.models.heads import RewardModel
    from stages.reward_model.preferences import EncodedComparison
    from stages.step import StepContext, StepResult
    from stages.training.checkpoints import Checkpoints


class RewardModelOptimizer(OptimizerSettings):
    """As ``OptimizerSettings``; batch sizes count prompts, each with all its completions."""

    learning_rate: float = Field(9e-6, gt=0, description="Peak learning rate.")
    final_learning_rate_fraction: float = Field(0.1, ge=0, le=1, description="Learning rate at the end, as a share of the peak.")
    batch_size: int = Field(64, ge=1, description="Prompts per optimizer step, summed over processes.")
    microbatch_size: int = Field(8, ge=1, description="Prompts per forward pass and process; the rest is gradient accumulation.")


class Normalization(Strict):
    """Where the zero of the scores lies, and their unit. A ranking loss leaves both open, and the KL penalty of PPO needs them."""

    to: Literal["center", "standardize", "none"] = Field(
        "center",
        description="center: mean 0 (Stiennon et al. 2020, Ouyang et al. 2022); standardize: mean 0 and variance 1 (Ziegler et al. 2019).",
    )
    on: Literal["demonstrations", "samples"] = Field(
        "demonstrations", description="Of which texts: demonstrations, or completions that a policy samples for the training prompts."
    )
    sampler: ModelField | None = Field(None, description="on: samples: the policy; null: the step's model.")
    num_samples: int = Field(256, ge=2, description="on: samples: how many.")
    before_training: bool = Field(False, description="on: samples: also before training, as Ziegler et al. 2019.")
    generation: GenerationSettings = GenerationSettings()

    @model_validator(mode="after")
    def _samples(self) -> Normalization:
        if self.on != "samples" and (self.sampler is not None or self.before_training):
            raise ValueError("normalization.sampler and before_training go with on: samples")
        return self


class RewardModelConfig(TrainingStepConfig):
    """Train a scalar head and its backbone on comparisons."""

    stage: Literal["reward_model"] = "reward_model"
    preset: str | None = Field(None, description="Published settings beneath the step's own, e.g. instructgpt2022 (recipe/presets.py).")
    model: ModelField = Field(description="A language model, which gets a new head, or a reward model to go on with.")
    data: DataInput = Field(description="Comparisons.")
    preferred: str | None = Field(None, description="For responses given as an object: the key of the preferred one.")
    demonstrations: DataField | None = Field(
        None, description="Texts whose mean reward becomes 0 (prompt + completion). null: the best completion of each training comparison."
    )
    beside: list[RewardInput] = Field(
        [], description="Other reward sources, measured on the same held-out comparisons: their accuracy stands beside this model's."
    )
    collect: Collection | None = Field(None, description="Also make comparisons of what policies say now; null: only those of data.")
    loss: Literal["pairs", "best_of"] = Field(
        "pairs", description="pairs: all C(K, 2) of a prompt (Ouyang et al. 2022); best_of: softmax over its K (Ziegler et al. 2019)."
    )
    normalization: Normalization = Normalization()
    num_seeds: int = Field(
        1,
        ge=1,
        description="Train so many times and keep the best (Stiennon et al. 2020). Half of the held-out comparisons decide, and "
        "the other half measures the one that was kept.",
    )
    group_by: list[str] = Field([], description="Columns by whose values held-out accuracy is split, e.g. annotator, batch, confidence.")
    prompt_fit: PromptFit | None = Field(None, description="Shorten prompts that are too long; null: let max_length cut their beginning.")
    curation: Curation = Field(Curation(), description="Which rows are used.")
    max_length: int | None = Field(None, ge=2, description="Longest prompt and completion, in tokens; longer ones lose their beginning.")
    training: RewardModelOptimizer = RewardModelOptimizer()

    @model_validator(mode="after")
    def _trainable(self) -> RewardModelConfig:
        if self.model.quantization != "none" and self.lora is None:
            raise ValueError(f"model.quantization={self.model.quantization!r} needs lora: quantized weights cannot be trained themselves")
        if self.num_seeds > 1 and self.keep_best:
            raise ValueError(f"keep_best={self.keep_best} goes with num_seeds=1; of several seeds the best is chosen already")
        check_names(self.beside, "beside")
        return self

    def model_inputs(self) -> dict[str, ModelInput]:
        inputs = {"model": self.model}
        if self.normalization.sampler is not None:
            inputs["normalization.sampler"] = self.normalization.sampler
        inputs |= reward_model_inputs(self.beside, "beside")
        return {**inputs, **(self.collect.model_inputs() if self.collect is not None else {})}

    def data_inputs(self) -> dict[str, list[DataSource]]:
        inputs = {"data.train": self.data.train}
        if self.data.validation is not None:
            inputs["data.validation"] = self.data.validation
        if self.collect is not None:
            inputs |= self.collect.data_inputs()
        inputs |= rubric_inputs(self.beside, "beside")
        return inputs if self.demonstrations is None else {**inputs, "demonstrations": self.demonstrations}

    def check_data(self) -> None:
        """Raise DataError for data this stage cannot use; no model is loaded."""
        from stages.corpora.comparisons import load_comparisons
        from stages.corpora.curation import Curator

        load_comparisons(self.data, preferred=self.preferred, curator=Curator(self.curation), group_by=self.group_by)
        self.load_demonstrations()
        check_rubrics(self.beside)
        if self.collect is not None:
            self.collect.check_data()

    def conversations(self) -> list[tuple[Any, Sequence[Any], str]]:
        """Rows of (prompt, its completions, the row's place) that the models of this step read; see ``chain/texts.py``."""
        from stages.corpora.comparisons import load_comparisons

        loaded = load_comparisons(self.data, preferred=self.preferred, group_by=self.group_by)
        compared = [(item.prompt, item.completions, item.location) for side in (loaded.train, loaded.validation) for item in side]
        return [*compared, *((prompt, [completion], "") for prompt, completion in self.load_demonstrations())]

    def load_demonstrations(self) -> list[tuple[Any, Any]]:
        """The named demonstrations as (prompt, completion); empty where none are named."""
        from stages.corpora.demonstrations import demonstration
        from stages.corpora.files import read_rows

        rows = [demonstration(row) for row in read_rows(self.demonstrations)] if self.demonstrations is not None else []
        return [(row["prompt"], row["completion"]) for row in rows]


@dataclass(frozen=True)
class Attempt:
    """A reward model trained with one seed: what training said, and how it did on the comparisons that decide between seeds."""

    seed: int
    trained: dict[str, float]
    accuracy: float


def run(config: RewardModelConfig, context: StepContext) -> StepResult:
    """Train, normalise, publish; with held-out accuracy and calibration before and after."""
    from stages.models.sharding import whole
    from stages.reward_model.collection import collect_comparisons
    from stages.rewards.learned import score_rows
    from stages.step import StepResult
    from stages.tokens.positions import row_length
    from stages.training.checkpoints import load_tensors, trainable
    from stages.training.trainer import gathered_weights, publish_best

    _check_texts(config, context)
    if config.collect is not None and config.collect.people is not None:
        collect_comparisons(config.collect, context, precision=config.precision)  # before a model waits for people in memory
    model = _new_model(config, context, context.seed)
    tokenizer = model.tokenizer
    assert tokenizer is not None
    max_length = row_length(config.max_length, model.config, tokenizer, unlimited=2048)
    comparisons, left_out = _load_comparisons(config, context, tokenizer)
    train_rows, lost = _usable([encode(item, tokenizer, max_length) for item in comparisons.train if item.num_pairs])
    validation = [item for item in comparisons.validation if item.num_pairs]
    encoded = [encode(item, tokenizer, max_length) for item in validation]
    heldout, lost_heldout = _usable(encoded)
    texts_of_heldout = [item for item, rows in zip(validation, encoded, strict=True) if rows.pairs[0]]
    for which, counts in (("", lost), ("held-out ", lost_heldout)):
        _say_lost(context, which, counts, max_length)
    deciding, measuring = (heldout, heldout) if config.num_seeds == 1 else (heldout[::2], heldout[1::2])
    texts_of_measuring = texts_of_heldout if config.num_seeds == 1 else texts_of_heldout[1::2]
    if config.training.epochs > 1:
        context.runtime.console.print(
            f"{context.name}: {config.training.epochs:g} epochs; reward models overfit soon (Ouyang et al. 2022, C.2: one epoch)"
        )
    texts = _texts_to_normalize_on(config, context, comparisons)
    scoring = {"pad_token_id": tokenizer.pad_token_id, "batch_size": 8 * config.training.microbatch_size}
    before = measure(model.to(context.runtime.device), measuring, **scoring)

    def normalise(model: RewardModel) -> tuple[float, float]:
        """(gain, standard deviation of the scores before it)."""
        rows = _encode_pairs(texts, tokenizer, max_length)
        with whole(model):
            scores = score_rows(rows, _inference(model.eval()), **scoring, device=context.runtime.device).double()
        mean, deviation = float(scores.mean()), float(scores.std(correction=0))
        if config.normalization.to == "standardize":
            return model.standardize(mean, deviation), deviation
        if config.normalization.to == "center":
            model.center(mean)
        return 1.0, deviation

    attempts: list[Attempt] = []
    trainer: Any = None
    for number in range(config.num_seeds):
        seed = context.seed + number
        if number:
            context.runtime.seed_everything(seed)  # an adapter is drawn from the process's stream
            model = _new_model(config, context, seed).to(context.runtime.device)
        if config.normalization.before_training:
            normalise(model)
        attempt, trainer = _train(config, context, model, train_rows, deciding, scoring, seed)
        attempts.append(attempt)
    best = max(attempts, key=lambda attempt: attempt.accuracy)  # of equals the first
    if best is not attempts[-1]:
        kept = _finished(context, best.seed).newest()
        if kept is None:
            raise TrainingError(f"{context.name}: the weights of seed {best.seed} were damaged on the disk; start the command again")
        load_tensors(trainable(model), kept.path / "model.safetensors")
    kind: dict[str, Any] = {"role": "reward_model", "base": context.models["model"] if config.lora is not None else None}
    shown = [item.rows[0] for item in heldout]  # what was saved is compared with the model in memory on the first of them
    publish_best(
        trainer,
        context,
        lambda folder, weights: model.save(folder, tokenizer, state_dict=weights, rows=shown),
        prepare=lambda: normalise(model),
        **kind,
    )
    gain, deviation = normalise(model)
    after = measure(model, measuring, gain=gain, **scoring)

    context.log(int(best.trained["optimizer_steps"]), {"heldout/accuracy": after["accuracy"], "heldout/loss": after["loss"]})
    context.runtime.console.print(
        f"{context.name}: held-out accuracy {before['accuracy']:.3f} -> {after['accuracy']:.3f} "
        f"(95 % {after['ci_low']:.3f} to {after['ci_high']:.3f}, {after['pairs']} pairs)"
    )
    beside = _measure_beside(config, context, texts_of_measuring, measuring)
    metrics = {
        "heldout_accuracy_before": before["accuracy"],
        **({"heldout_beside": beside} if beside else {}),
        **{f"heldout_{name}": value for name, value in after.items()},
        **best.trained,
        "comparisons": len(train_rows),
        "pairs": sum(item.pairs[0] for item in train_rows),
        "all_ties": sum(not item.num_pairs for item in comparisons.train),
        **lost.as_metrics(),
        **{f"heldout_{name}": value for name, value in lost_heldout.as_metrics().items()},
        "reward_bias": model.reward_bias,
        "reward_gain": gain,
        "demonstrations": len(texts),
        "demonstration_reward_std": deviation,
        **{f"curation_{reason}": number for reason, number in sorted(left_out.items())},
    }
    if config.collect is not None:
        metrics["collected"] = comparisons.collected
    if config.num_seeds > 1:
        metrics |= {"seeds": {str(attempt.seed): attempt.accuracy for attempt in attempts}, "selected_seed": best.seed}
    weights = gathered_weights(trainer)
    record = context.publish(lambda folder: model.save(folder, tokenizer, state_dict=weights, rows=shown), metrics=metrics, **kind)
    return StepResult(model=record, metrics=metrics)


def _measure_beside(
    config: RewardModelConfig, context: StepContext, comparisons: Sequence[Comparison], encoded: Sequence[EncodedComparison]
) -> dict[str, dict[str, Any]]:
    """How often each source of ``beside`` agrees with the held-out comparisons, by name; one source at a time is in memory."""
    from stages.corpora.messages import completion_text
    from stages.reward_model.preferences import agreement
    from stages.rewards.source import build_reward

    runtime = context.runtime
    prompts = [item.prompt for item in comparisons for _ in item.completions]
    completions = [completion_text(text) for item in comparisons for text in item.completions]
    found = {}
    for index, source in enumerate(config.beside):
        own = f"beside[{index}]"
        models = {f"beside[0]{place.removeprefix(own)}": model for place, model in context.models.items() if place.startswith(own)}
        reward = build_reward(
            [source], models, "beside", device=runtime.device, dtype=runtime.dtype(config.precision), cache_folder=context.cache_folder
        )
        measured = agreement(runtime.decide(partial(reward.score, prompts, completions)).total, encoded)
        name = source.shown_name
        found[name] = {key: measured[key] for key in ("accuracy", "ci_low", "ci_high", "pairs")}
        runtime.console.print(
            f"{context.name}: beside it {name}: held-out accuracy {measured['accuracy']:.3f} (95 % {measured['ci_low']:.3f} to "
            f"{measured['ci_high']:.3f})"
        )
    return found


COLLECTED = "collected by the step"  # stands for the annotator of comparisons that the step has made itself


def _check_texts(config: RewardModelConfig, context: StepContext) -> None:
    """Raise DataError, with the row's place, for a conversation that the chat template refuses; before any weights are loaded."""
    from stages.corpora.templates import check_rendering
    from stages.models.loading import load_tokenizer

    check_rendering(load_tokenizer(context.models["model"]), config.conversations())


def _new_model(config: RewardModelConfig, context: StepContext, seed: int) -> RewardModel:
    from stages.models.heads import RewardModel
    from stages.training.trainer import weights_dtype

    source, dtype = context.models["model"], weights_dtype(config, context)
    if source.record is not None and source.record.role == "reward_model":
        return RewardModel.from_pretrained(source, dtype=dtype, lora=config.lora, trainable=True)
    return RewardModel.from_language_model(source, dtype=dtype, lora=config.lora, seed=seed)


def _load_comparisons(config: RewardModelConfig, context: StepContext, tokenizer: Any) -> tuple[Comparisons, dict[str, int]]:
    """(the comparisons, collected ones among those to train on, their prompts made to fit; how many rows curation left out)."""
    from stages.corpora.comparisons import Comparisons, load_comparisons
    from stages.corpora.curation import Curator
    from stages.corpora.fitting import fit_prompt
    from stages.corpora.templates import count_tokens
    from stages.reward_model.collection import collect_comparisons

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


def _texts_to_normalize_on(config: RewardModelConfig, context: StepContext, comparisons: Comparisons) -> list[tuple[Any, Any]]:
    """(prompt, completion) pairs whose scores become those of mean 0."""
    if config.normalization.on == "demonstrations":
        return config.load_demonstrations() or [(item.prompt, item.best) for item in comparisons.train]
    import torch

    from stages.corpora.templates import encode_prompt
    from stages.models.loading import load_language_model, load_tokenizer
    from stages.sampling.generation import decode_completions, episode_seed
    from stages.sampling.sampler import LocalSampler

    source = context.models["normalization.sampler" if config.normalization.sampler is not None else "model"]
    if source.record is not None and source.record.role != "language_model":
        raise ModelError(
            f"normalization.on: samples needs a policy to sample from, and {source.ref!r} is a {source.record.role}; "
            "name one in normalization.sampler"
        )
    runtime, generation = context.runtime, config.normalization.generation
    tokenizer = load_tokenizer(source)
    policy = load_language_model(source, dtype=runtime.dtype(config.precision), trainable=False, tokenizer=tokenizer).to(runtime.device)
    distinct = list({repr(item.prompt): item.prompt for item in comparisons.train}.values())
    prompts = [distinct[index % len(distinct)] for index in range(config.normalization.num_samples)]
    sampler = LocalSampler(policy, tokenizer)
    seeds = [episode_seed(context.seed, -3, index) for index in range(len(prompts))]
    generated = sampler.sample([encode_prompt(tokenizer, prompt) for prompt in prompts], generation, seeds)
    texts = decode_completions(tokenizer, generated)
    del policy, sampler
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return list(zip(prompts, texts, strict=True))


def _train(
    config: RewardModelConfig,
    context: StepContext,
    model: RewardModel,
    rows: list[EncodedComparison],
    deciding: list[EncodedComparison],
    scoring: dict[str, int],
    seed: int,
) -> tuple[Attempt, Any]:
    """(what came of one seed, the trainer); with several seeds each keeps its checkpoints, and its weights once it is done."""
    from stages.training.checkpoints import load_tensors, save_tensors, trainable
    from stages.training.trainer import train, training_arguments

    several = config.num_seeds > 1
    own = replace(context, seed=seed, checkpoint_folder=context.checkpoint_folder / f"seed-{seed}") if several else context
    arguments = training_arguments(config.training, own, precision=config.precision, remove_unused_columns=False)
    trainer = _trainer(model, arguments, rows, scoring["pad_token_id"], config.loss)
    done = _finished(context, seed)
    found = done.newest() if several else None
    if found is not None:
        load_tensors(trainable(model), found.path / "model.safetensors")
        return Attempt(**json.loads((found.path / "attempt.json").read_text(encoding="utf-8"))), trainer
    context.runtime.seed_everything(seed)
    trained = train(
        trainer,
        own,
        f"{context.name}: reward model",
        room=f"train_seed_{seed}" if several else "train",
        rule=config,
        measure=lambda: measure(model, deciding, **scoring)["loss"],
    )
    accuracy = measure(model, deciding, **scoring)["accuracy"] if several else 0.0
    attempt = Attempt(seed, trained, accuracy)
    if several:
        context.runtime.console.print(f"{context.name}: seed {seed}: accuracy {accuracy:.3f} on the comparisons that decide")

        def fill(folder: Path) -> None:
            save_tensors(trainable(model), folder / "model.safetensors", write=context.runtime.is_main)
            if context.runtime.is_main:
                (folder / "attempt.json").write_text(json.dumps(vars(attempt)), encoding="utf-8")

        done.write(fill)
    return attempt, trainer


def _finished(context: StepContext, seed: int) -> Checkpoints:
    """Where what came of a seed is kept once it is done."""
    from stages.training.checkpoints import Checkpoints

    return Checkpoints(context.checkpoint_folder / f"seed-{seed}-done", context.runtime, keep_last=1)


def encode(comparison: Comparison, tokenizer: Any, max_length: int) -> EncodedComparison:
    """Prompt and completion as one row per completion, as the chat template ends it; what is too long loses its beginning."""
    from stages.corpora.messages import errors_at
    from stages.corpora.templates import encode_pair
    from stages.reward_model.preferences import EncodedComparison

    with errors_at(comparison.location):
        pairs = [encode_pair(tokenizer, comparison.prompt, completion) for completion in comparison.completions]
    return EncodedComparison(
        [ids[-max_length:] for ids, _ in pairs],
        comparison.ranks,
        comparison.groups,
        pairs[0][1],
        lengths=[len(ids) - prompt_length for ids, prompt_length in pairs],
        cut=sum(len(ids) > max_length for ids, _ in pairs),
    )


@dataclass(frozen=True)
class Lost:
    """What the length limit took from a list of comparisons: ``cut`` of ``rows``, and ``equal`` of ``pairs`` that are one text then."""

    rows: int
    cut: int
    pairs: int
    equal: int

    def as_metrics(self) -> dict[str, float]:
        """For the step's metrics."""
        return {"cut_share": self.cut / max(1, self.rows), "equal_pairs": self.equal}


def _usable(comparisons: list[EncodedComparison]) -> tuple[list[EncodedComparison], Lost]:
    """(comparisons with at least one pair of different rows, what was lost of all of them)."""
    pairs = [item.pairs for item in comparisons]
    lost = Lost(
        rows=sum(len(item.rows) for item in comparisons),
        cut=sum(item.cut for item in comparisons),
        pairs=sum(different + equal for different, equal in pairs),
        equal=sum(equal for _, equal in pairs),
    )
    return [item for item, (different, _) in zip(comparisons, pairs, strict=True) if different], lost


def _say_lost(context: StepContext, which: str, lost: Lost, max_length: int) -> None:
    console = context.runtime.console
    if lost.cut:
        console.print(f"{context.name}: {lost.cut} of {lost.rows} {which}texts lost their beginning to the limit of {max_length} tokens")
    if lost.equal:
        console.print(f"{context.name}: left out {lost.equal} of {lost.pairs} {which}pairs, whose two texts are the same tokens")
    if lost.equal == lost.pairs:
        raise DataError(
            f"no {which}comparison is left: the completions of each are the same tokens after the limit of {max_length}; raise max_length"
        )


def _encode_pairs(pairs: Sequence[tuple[Any, Any]], tokenizer: Any, max_length: int) -> list[list[int]]:
    from stages.corpora.templates import encode_pair

    # Collected and sampled completions may be cut; what the data holds was checked before.
    return [encode_pair(tokenizer, prompt, completion, sampled=True)[0][-max_length:] for prompt, completion in pairs]


def collate(comparisons: Sequence[EncodedComparison], pad_token_id: int) -> dict[str, torch.Tensor]:
    """All completions of a few prompts as one batch: input_ids and attention_mask [N, T]; ranks, prompt_index, text_index [N]."""
    import torch

    from stages.sampling.generation import right_pad

    rows = [torch.tensor(row) for item in comparisons for row in item.rows]
    lengths = torch.tensor([len(row) for row in rows])
    ids = right_pad(rows, pad_token_id)
    return {
        "input_ids": ids,
        "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long(),
        "ranks": torch.tensor([rank for item in comparisons for rank in item.ranks]),
        "prompt_index": torch.tensor([index for index, item in enumerate(comparisons) for _ in item.ranks]),
        "text_index": torch.tensor([number for item in comparisons for number in item.texts]),
    }


def _trainer(model: RewardModel, arguments: Any, rows: list[EncodedComparison], pad_token_id: int, loss: str = "pairs") -> Any:
    import torch
    from transformers import Trainer

    from stages.rl.ranking import best_of_ranked_losses, ranking_losses, ranking_pairs
    from stages.training.trainer import exact

    losses_of = ranking_losses if loss == "pairs" else best_of_ranked_losses

    class RankingTrainer(exact(Trainer)):  # type: ignore[misc]
        """A Trainer whose examples are prompts with all their completions, so that no prompt is ever split across steps."""

        loss_is_scaled_for_ga = True  # the loss below is a share of the mean over the whole step

        def compute_loss(
            self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None, **_: Any
        ) -> Any:
            scores = model(inputs["input_ids"], inputs["attention_mask"])
            losses = losses_of(scores, inputs["ranks"], inputs["prompt_index"], inputs["text_index"])
            loss = losses.sum() / num_items_in_batch * self.args.world_size  # DDP takes the mean over processes
            return (loss, {"scores": scores}) if return_outputs else loss

        def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> torch.Tensor:
            """Prompts of the step, on all processes, that have a preference."""
            number = 0
            for batch in batch_samples:
                better, _ = ranking_pairs(batch["ranks"], batch["prompt_index"], batch["text_index"])
                number += len(torch.unique(batch["prompt_index"][better]))
            return self.accelerator.gather(torch.tensor([number], device=device)).sum().clamp(min=1)

        def blank(self, batch: dict[str, Any]) -> dict[str, Any]:
            return {**batch, "ranks": torch.zeros_like(batch["ranks"])}  # all ties: no pairs

    return RankingTrainer(model=model, args=arguments, train_dataset=rows, data_collator=lambda items: collate(items, pad_token_id))


def _inference(model: RewardModel) -> Any:
    import torch

    def score(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return model.score(input_ids, attention_mask)

    return score


def measure(
    model: RewardModel, comparisons: Sequence[EncodedComparison], *, pad_token_id: int, batch_size: int, gain: float = 1.0
) -> dict[str, Any]:
    """How well the model's scores agree with held-out comparisons (stages.reward_model.preferences)."""
    from stages.models.sharding import whole
    from stages.reward_model.preferences import agreement
    from stages.rewards.learned import score_rows

    if not comparisons:
        raise DataError("no held-out comparison has a preference; name a validation source with pairs that are no ties")
    training = model.training
    model.eval()
    rows = [row for item in comparisons for row in item.rows]
    with whole(model):
        scores = score_rows(rows, _inference(model), pad_token_id, batch_size, device=next(model.parameters()).device)
    model.train(training)
    return agreement(scores, comparisons, gain=gain)
