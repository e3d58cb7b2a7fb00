"""Direct preference optimisation (Rafailov et al. 2023) on the reward model's own comparisons, through TRL's DPOTrainer.

What most people would do instead of PPO, so the evaluation's baseline for it. A ranked list becomes its pairs; ties make none.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from stages.config import DataInput, DataSource, ModelField, ModelInput, OptimizerSettings, TrainingStepConfig
from stages.corpora.curation import Curation
from stages.errors import DataError, ModelError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from stages.corpora.comparisons import Comparison
    from stages.corpora.messages import Completion
    from stages.step import StepContext, StepResult


class DPOOptimizer(OptimizerSettings):
    """As ``OptimizerSettings``; batch sizes count pairs."""

    learning_rate: float = Field(1e-6, gt=0, description="Peak learning rate; TRL's default. Models of a few million parameters need more.")
    schedule: Literal["constant", "linear", "cosine"] = Field("linear", description="Shape after warmup.")
    warmup_fraction: float = Field(0.1, ge=0, lt=1, description="Share of the optimizer steps used for linear warmup.")
    batch_size: int = Field(32, ge=1, description="Pairs per optimizer step, summed over processes.")
    microbatch_size: int = Field(8, ge=1, description="Pairs per forward pass and process; the rest is gradient accumulation.")


class DPOStepConfig(TrainingStepConfig):
    """Train ``model`` to prefer what was preferred, held near its reference."""

    stage: Literal["dpo"] = "dpo"
    model: ModelField = Field(description="Language model to train, usually an sft step.")
    reference: ModelField | None = Field(None, description="Frozen model that the loss holds it to; null: the model as it starts.")
    data: DataInput = Field(description="Comparisons, as for the reward model.")
    curation: Curation = Field(Curation(), description="Which rows are used; as the reward model's, to train on the same ones.")
    preferred: str | None = Field(None, description="For responses given as an object: the key of the preferred one.")
    pairs_per_prompt: int | None = Field(None, ge=1, description="Use so many pairs of a longer list, drawn by the seed; null: all.")
    beta: float = Field(0.1, gt=0, description="Strength of the pull to the reference: the KL coefficient that PPO would have.")
    loss: Literal["sigmoid", "ipo", "hinge", "robust"] = Field("sigmoid", description="sigmoid: the paper's; the others as in TRL.")
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="Assumed share of comparisons that are the wrong way round.")
    max_length: int | None = Field(
        None, ge=2, description="Longest prompt and completion, in tokens; longer pairs are left out, and said. null: all positions."
    )
    training: DPOOptimizer = DPOOptimizer()

    @model_validator(mode="after")
    def _trainable(self) -> DPOStepConfig:
        if self.model.quantization != "none" and self.lora is None:
            raise ValueError(f"model.quantization={self.model.quantization!r} needs lora: quantized weights cannot be trained themselves")
        return self

    def model_inputs(self) -> dict[str, ModelInput]:
        return {"model": self.model} if self.reference is None else {"model": self.model, "reference": self.reference}

    def data_inputs(self) -> dict[str, list[DataSource]]:
        inputs = {"data.train": self.data.train}
        return inputs if self.data.validation is None else {**inputs, "data.validation": self.data.validation}

    def check_data(self) -> None:
        """Raise DataError for data this stage cannot use; no model is loaded."""
        from stages.corpora.comparisons import load_comparisons
        from stages.corpora.curation import Curator

        load_comparisons(self.data, preferred=self.preferred, curator=Curator(self.curation))

    def conversations(self) -> list[tuple[Any, Sequence[Any], str]]:
        """Rows of (prompt, its completions, the row's place) that the models of this step read; see ``chain/texts.py``."""
        from stages.corpora.comparisons import load_comparisons

        loaded = load_comparisons(self.data, preferred=self.preferred)
        return [(item.prompt, item.completions, item.location) for side in (loaded.train, loaded.validation) for item in side]


@dataclass(frozen=True)
class Pair:
    """Token ids of a prompt and of its better and worse completion, each as the chat template ends it."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]

    @property
    def length(self) -> int:
        """Tokens of the longer of the two sequences."""
        return len(self.prompt_ids) + max(len(self.chosen_ids), len(self.rejected_ids))


def run(config: DPOStepConfig, context: StepContext) -> StepResult:
    """Train; publish the policy with its held-out accuracy as a reward model in disguise, and how far it went from the reference."""
    from stages.corpora.comparisons import load_comparisons
    from stages.corpora.curation import Curator
    from stages.corpora.templates import count_tokens
    from stages.models.adapters import as_it_starts, refuse_output_adapter
    from stages.models.loading import load_language_model, load_tokenizer, save_model
    from stages.step import StepResult
    from stages.tokens.positions import row_length
    from stages.training.trainer import gathered_weights, publish_best, train, weights_dtype

    source = context.models["model"]
    tokenizer = load_tokenizer(source)
    curator = Curator(config.curation, count_tokens(tokenizer))
    comparisons = load_comparisons(config.data, preferred=config.preferred, curator=curator)
    encoded, encoded_heldout = (encode(config, side, tokenizer, context.seed) for side in (comparisons.train, comparisons.validation))
    model = load_language_model(source, dtype=weights_dtype(config, context), lora=config.lora, tokenizer=tokenizer)
    refuse_output_adapter(model, config.lora)
    max_length: int = row_length(config.max_length, model.config, tokenizer, unlimited=1024)
    pairs, left_out = _usable(encoded, max_length, context, "training")
    heldout, heldout_left_out = _usable(encoded_heldout, max_length, context, "held-out")
    reference = _reference(config, context, tokenizer)

    with as_it_starts(model) if reference is None else nullcontext():
        by_reference = _logprobs(config, context, reference if reference is not None else model, heldout, tokenizer)
    trainer = _trainer(config, context, model, reference, tokenizer, pairs)

    def measured() -> dict[str, float]:
        return measure(_logprobs(config, context, model, heldout, tokenizer), by_reference, beta=config.beta)

    trained = train(trainer, context, f"{context.name}: dpo", rule=config, measure=lambda: measured()["loss"])
    after = measured()
    context.log(trainer.state.global_step, {"heldout/accuracy": after["accuracy"], "heldout/margin": after["margin"]})
    context.runtime.console.print(
        f"{context.name}: held-out accuracy {after['accuracy']:.3f} (95 % {after['ci_low']:.3f} to {after['ci_high']:.3f}, "
        f"{len(heldout)} pairs), margin {after['margin']:.3f}"
    )
    metrics = {
        **{f"heldout_{name}": value for name, value in after.items()},
        **trained,
        "comparisons": len(comparisons.train),
        "pairs": len(pairs),
        "heldout_pairs": len(heldout),
        **left_out,
        **{f"heldout_{reason}": number for reason, number in heldout_left_out.items()},
        **{f"curation_{reason}": number for reason, number in sorted(curator.left_out.items())},
    }
    published: dict[str, Any] = {"role": "language_model", "base": source if config.lora is not None else None}
    shown = [[*pair.prompt_ids, *pair.chosen_ids] for pair in heldout]  # what was saved is compared on the first of them
    publish_best(
        trainer, context, lambda folder, weights: save_model(model, tokenizer, folder, state_dict=weights, rows=shown), **published
    )
    weights = gathered_weights(trainer)
    record = context.publish(
        lambda folder: save_model(model, tokenizer, folder, state_dict=weights, rows=shown), metrics=metrics, **published
    )
    return StepResult(model=record, metrics=metrics)


# Pairs


def pairs_of(comparison: Comparison, limit: int | None, seed: int) -> list[tuple[Completion, Completion]]:
    """(better, worse) of every two completions of different rank; ``limit`` draws so many of them."""
    ranked = list(zip(comparison.completions, comparison.ranks, strict=True))
    pairs = [(better, worse) for better, rank in ranked for worse, other in ranked if rank < other]
    if limit is None or len(pairs) <= limit:
        return pairs
    return random.Random(f"pairs {seed} {comparison.prompt!r}").sample(pairs, limit)


def encode(config: DPOStepConfig, comparisons: Sequence[Comparison], tokenizer: PreTrainedTokenizerBase, seed: int) -> list[Pair]:
    """Pairs as tokens, by the template the model keeps: training, sampling and scoring see one and the same text.

    All that follows the prompt counts; where a completion has several turns, the turns of others in it count, too, as in TRL. Raises
    DataError, with the row's place, for a conversation that the chat template refuses.
    """
    from stages.corpora.messages import errors_at
    from stages.corpora.templates import encode_pair

    rows = []
    for comparison in comparisons:
        with errors_at(comparison.location):
            for better, worse in pairs_of(comparison, config.pairs_per_prompt, seed):
                (chosen, length), (rejected, _) = (encode_pair(tokenizer, comparison.prompt, text) for text in (better, worse))
                rows.append(Pair(chosen[:length], chosen[length:], rejected[length:]))
    return rows


def _usable(rows: list[Pair], max_length: int, context: StepContext, which: str) -> tuple[list[Pair], dict[str, int]]:
    """(the pairs of at most ``max_length`` tokens whose two texts differ, how many were left out by reason)."""
    fitting = [row for row in rows if row.length <= max_length]
    kept = [row for row in fitting if row.chosen_ids != row.rejected_ids]
    if len(kept) < len(fitting):
        equal = f"left out {len(fitting) - len(kept)} of {len(fitting)} {which} pairs, whose two texts are the same tokens"
        context.runtime.console.print(f"{context.name}: {equal}")
    if fitting and not kept:
        raise DataError(f"no {which} pair is left: the completions of all {len(fitting)} are the same tokens")
    if not kept:
        shortest = min((row.length for row in rows), default=0)
        raise DataError(f"no {which} pair fits max_length={max_length}: the shortest of {len(rows)} has {shortest} tokens")
    if len(fitting) < len(rows):
        left_out = len(rows) - len(fitting)
        context.runtime.console.print(f"{context.name}: left out {left_out} of {len(rows)} {which} pairs longer than {max_length} tokens")
    return kept, {"too_long_pairs": len(rows) - len(fitting), "equal_pairs": len(fitting) - len(kept)}


# Training


def _reference(config: DPOStepConfig, context: StepContext, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The frozen reference; None where it is the model without its fresh adapter. Raises ModelError for another vocabulary."""
    from stages.models.loading import load_language_model, load_tokenizer

    if config.reference is None and config.lora is not None:
        return None
    source = context.models["reference" if config.reference is not None else "model"]
    if load_tokenizer(source).get_vocab() != tokenizer.get_vocab():
        own = context.models["model"].ref
        raise ModelError(f"reference {source.ref!r} has another vocabulary than the model {own!r}; they must share one")
    return load_language_model(source, dtype=context.runtime.dtype(config.precision), trainable=False, tokenizer=tokenizer)


def _trainer(
    config: DPOStepConfig, context: StepContext, model: Any, reference: Any, tokenizer: PreTrainedTokenizerBase, pairs: list[Pair]
) -> Any:
    import torch
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer
    from trl.models.utils import disable_gradient_checkpointing

    from stages.models.adapters import as_it_starts, without_copies
    from stages.models.loading import quiet_transformers
    from stages.models.sharding import shard
    from stages.training.trainer import exact, training_arguments

    class TokenizedDPOTrainer(exact(DPOTrainer)):  # type: ignore[misc]
        """A DPOTrainer whose rows are token ids already, and whose loss is a share of the mean over the whole step."""

        loss_is_scaled_for_ga = True

        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
            own = pairs_in(inputs)
            if self.precompute_ref_logps:
                inputs = {**inputs, **self._reference_logprobs(inputs)}
            with _gathering_unequal_shares(self.accelerator, counts=own > 0):
                loss = super().compute_loss(model, inputs, return_outputs)
            if num_items_in_batch is None:
                return loss
            return loss * own / num_items_in_batch * self.args.world_size  # DDP takes the mean over processes

        def _reference_logprobs(self, inputs: Any) -> dict[str, torch.Tensor]:
            """Log-probabilities [pairs] of the completions by the model as it started: the adapters below the fresh one act."""
            masked = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
            tensors = {name: value for name, value in inputs.items() if name != "completion_mask"}
            checkpointing = disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs)
            with torch.no_grad(), checkpointing, as_it_starts(self.model):
                outputs = self.model(**tensors, use_cache=False, labels=masked, fused_lm_head=True)
            chosen, rejected = outputs.log_probs.sum(dim=1).chunk(2)
            return {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}

        def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: Any) -> Any:
            """Pairs of the step, on all processes."""
            number = sum(pairs_in(batch) for batch in batch_samples)
            return self.accelerator.gather(torch.tensor([number], device=device)).sum()

        def blank(self, batch: dict[str, Any]) -> dict[str, Any]:
            return {**batch, "completion_mask": torch.zeros_like(batch["completion_mask"])}

    def pairs_in(batch: Any) -> int:
        """Pairs that count: every completion has an end token at least."""
        return int(batch["completion_mask"].any(dim=1).sum()) // 2

    options = {"beta": config.beta, "loss_type": [config.loss], "label_smoothing": config.label_smoothing, "max_length": None}
    with quiet_transformers(), without_copies(model):
        arguments = training_arguments(config.training, context, precision=config.precision, kind=DPOConfig, **options)
        columns = {name: [getattr(pair, name) for pair in pairs] for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
        trainer = TokenizedDPOTrainer(
            model=model, ref_model=reference, args=arguments, train_dataset=Dataset.from_dict(columns), processing_class=tokenizer
        )
    # TRL's reference of an adapter is a copy of that adapter alone; ours is every adapter below it.
    trainer.precompute_ref_logps = reference is None
    if trainer.ref_model is not None and context.runtime.shards:
        shard(trainer.ref_model, add_up=False)
    for parameter in model.parameters():
        # TRL makes a quantized model's adapter bf16, in which small updates are lost
        if parameter.requires_grad and parameter.dtype.itemsize < 4:
            parameter.data = parameter.data.float()
    return trainer


@contextmanager
def _gathering_unequal_shares(accelerator: Any, *, counts: bool) -> Iterator[None]:
    """TRL gathers its metrics pair by pair; here processes may have different numbers of pairs, or none that ``counts``."""
    import torch

    gather = accelerator.gather

    def unequal(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dim() == 0:
            return gather(tensor)
        padded = accelerator.pad_across_processes(tensor if counts else torch.full_like(tensor, torch.nan), pad_index=torch.nan)
        gathered = gather(padded)
        return gathered[~gathered.isnan()]

    if accelerator.num_processes > 1:
        accelerator.gather = unequal
    try:
        yield
    finally:
        accelerator.gather = gather


# Measuring


def _logprobs(
    config: DPOStepConfig, context: StepContext, model: Any, pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase
) -> torch.Tensor:
    """Log-probabilities of whole completions [N, 2]: the chosen one's, the rejected one's."""
    import torch

    from stages.models.responses import Policy, sequence_batch
    from stages.models.sharding import whole

    model = model.to(context.runtime.device)
    training = model.training
    policy = Policy(model.eval(), temperature=1.0, autocast=None)
    rows = [(pair.prompt_ids, response) for pair in pairs for response in (pair.chosen_ids, pair.rejected_ids)]
    sums = torch.empty(len(rows), dtype=torch.float64)
    order = sorted(range(len(rows)), key=lambda place: len(rows[place][0]) + len(rows[place][1]))
    size = 4 * config.training.microbatch_size
    with torch.inference_mode(), whole(model):
        for start in range(0, len(order), size):
            places = order[start : start + size]
            prompts, responses = [rows[place][0] for place in places], [rows[place][1] for place in places]
            batch = sequence_batch(prompts, responses, int(tokenizer.pad_token_id), policy.device)
            parts = policy.logprobs(batch).double().cpu().split([len(response) for response in responses])
            sums[places] = torch.stack([part.sum() for part in parts])
    model.train(training)
    return sums.view(-1, 2)


def measure(policy: torch.Tensor, reference: torch.Tensor, *, beta: float) -> dict[str, float]:
    """How well the implicit reward beta * log(policy / reference) ranks held-out pairs. Log-probabilities [N, 2], chosen first.

    ``chosen_log_ratio``, ``rejected_log_ratio``: nats by which the policy moved; both fall where DPO forgets what it was shown.
    """
    import torch

    from stages.stats.intervals import wilson_interval

    ratios = policy - reference
    margins = beta * (ratios[:, 0] - ratios[:, 1])
    correct = int((margins > 0).sum())
    low, high = wilson_interval(correct, len(margins))
    return {
        "accuracy": correct / len(margins),
        "ci_low": low,
        "ci_high": high,
        "loss": float(torch.nn.functional.softplus(-margins).mean()),
        "margin": float(margins.mean()),
        "chosen_log_ratio": float(ratios[:, 0].mean()),
        "rejected_log_ratio": float(ratios[:, 1].mean()),
    }
