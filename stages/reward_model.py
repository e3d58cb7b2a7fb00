"""The reward model: ranked completions in, one scalar per text out, with InstructGPT's loss (Ouyang et al. 2022, section 3.5).

All pairs of a prompt are one batch element: its K completions are scored once each, and the element weighs the same whatever K is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from stages.config import DataField, DataInput, DataSource, ModelField, ModelInput, OptimizerSettings, TrainingStepConfig
from stages.errors import DataError

if TYPE_CHECKING:
    import torch

    from stages.corpora.comparisons import Comparison
    from stages.models.heads import RewardModel
    from stages.runtime import StepContext, StepResult

MARGINS = (0.25, 0.5, 1.0, 2.0)  # edges of the score margins by which held-out accuracy is split


class RewardModelOptimizer(OptimizerSettings):
    """As ``OptimizerSettings``; batch sizes count prompts, each with all its completions."""

    learning_rate: float = Field(9e-6, gt=0, description="Peak learning rate.")
    final_learning_rate_fraction: float = Field(0.1, ge=0, le=1, description="Learning rate at the end, as a share of the peak.")
    batch_size: int = Field(64, ge=1, description="Prompts per optimizer step, summed over processes.")
    microbatch_size: int = Field(8, ge=1, description="Prompts per forward pass and process; the rest is gradient accumulation.")


class RewardModelConfig(TrainingStepConfig):
    """Train a scalar head and its backbone on comparisons."""

    stage: Literal["reward_model"] = "reward_model"
    model: ModelField = Field(description="A language model, which gets a new head, or a reward model to go on with.")
    data: DataInput = Field(description="Comparisons.")
    preferred: str | None = Field(None, description="For responses given as an object: the key of the preferred one.")
    demonstrations: DataField | None = Field(
        None, description="Texts whose mean reward becomes 0 (prompt + completion). null: the best completion of each training comparison."
    )
    max_length: int | None = Field(None, ge=2, description="Longest prompt and completion, in tokens; longer ones lose their beginning.")
    training: RewardModelOptimizer = RewardModelOptimizer()

    @model_validator(mode="after")
    def _trainable(self) -> RewardModelConfig:
        if self.model.quantization != "none" and self.lora is None:
            raise ValueError(f"model.quantization={self.model.quantization!r} needs lora: quantized weights cannot be trained themselves")
        return self

    def model_inputs(self) -> dict[str, ModelInput]:
        return {"model": self.model}

    def data_inputs(self) -> dict[str, list[DataSource]]:
        inputs = {"data.train": self.data.train}
        if self.data.validation is not None:
            inputs["data.validation"] = self.data.validation
        return inputs if self.demonstrations is None else {**inputs, "demonstrations": self.demonstrations}

    def check_data(self) -> None:
        """Raise DataError for data this stage cannot use; no model is loaded."""
        from stages.corpora.comparisons import load_comparisons

        load_comparisons(self.data, preferred=self.preferred)
        self.load_demonstrations()

    def load_demonstrations(self) -> list[tuple[Any, str]]:
        """The named demonstrations as (prompt, completion); empty where none are named."""
        from stages.corpora.demonstrations import demonstration
        from stages.corpora.files import read_rows

        rows = [demonstration(row) for row in read_rows(self.demonstrations)] if self.demonstrations is not None else []
        return [(row["prompt"], row["completion"]) for row in rows]


@dataclass(frozen=True)
class EncodedComparison:
    """The completions of one prompt as token rows (prompt included), and their ranks."""

    rows: list[list[int]]
    ranks: list[int]


def run(config: RewardModelConfig, context: StepContext) -> StepResult:
    """Train, centre on the demonstrations, publish; with held-out accuracy and calibration before and after."""
    from stages.corpora.comparisons import load_comparisons
    from stages.models.heads import RewardModel
    from stages.rewards.learned import score_rows
    from stages.runtime import StepResult
    from stages.training import gathered_weights, train, training_arguments, weights_dtype

    source = context.models["model"]
    dtype = weights_dtype(config, context)
    if source.record is not None and source.record.role == "reward_model":
        model = RewardModel.from_pretrained(source, dtype=dtype, lora=config.lora, trainable=True)
    else:
        model = RewardModel.from_language_model(source, dtype=dtype, lora=config.lora, seed=context.seed)
    tokenizer = model.tokenizer
    assert tokenizer is not None
    comparisons = load_comparisons(config.data, preferred=config.preferred)
    max_length = config.max_length or getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2048
    train_rows = [encode(item, tokenizer, max_length) for item in comparisons.train if item.num_pairs]
    heldout = [encode(item, tokenizer, max_length) for item in comparisons.validation if item.num_pairs]
    if config.training.epochs > 1:
        context.runtime.console.print(
            f"{context.name}: {config.training.epochs:g} epochs; reward models overfit soon (Ouyang et al. 2022, C.2: one epoch)"
        )

    arguments = training_arguments(config.training, context, precision=config.precision, remove_unused_columns=False)
    trainer = _trainer(model, arguments, train_rows, tokenizer.pad_token_id)
    evaluate = {"pad_token_id": tokenizer.pad_token_id, "batch_size": 8 * config.training.microbatch_size}
    before = measure(model.to(context.runtime.device), heldout, **evaluate)
    trained = train(trainer, context, f"{context.name}: reward model")

    demonstrations = config.load_demonstrations() or [(item.prompt, item.best) for item in comparisons.train]
    scores = score_rows(_encode_pairs(demonstrations, tokenizer, max_length), _inference(model), **evaluate, device=context.runtime.device)
    model.center(float(scores.double().mean()))
    after = measure(model, heldout, **evaluate)
    context.log(trainer.state.global_step, {"heldout/accuracy": after["accuracy"], "heldout/loss": after["loss"]})
    context.runtime.console.print(
        f"{context.name}: held-out accuracy {before['accuracy']:.3f} -> {after['accuracy']:.3f} "
        f"(95 % {after['ci_low']:.3f} to {after['ci_high']:.3f}, {after['pairs']} pairs)"
    )
    metrics = {
        "heldout_accuracy_before": before["accuracy"],
        **{f"heldout_{name}": value for name, value in after.items()},
        **trained,
        "comparisons": len(train_rows),
        "pairs": sum(item.num_pairs for item in comparisons.train),
        "all_ties": len(comparisons.train) - len(train_rows),
        "reward_bias": model.reward_bias,
        "demonstrations": len(demonstrations),
        "demonstration_reward_std": float(scores.double().std(correction=0)),
    }
    weights = gathered_weights(trainer)
    record = context.publish(
        lambda folder: model.save(folder, tokenizer, state_dict=weights),
        role="reward_model",
        metrics=metrics,
        base=source if config.lora is not None else None,
    )
    return StepResult(model=record, metrics=metrics)


def encode(comparison: Comparison, tokenizer: Any, max_length: int) -> EncodedComparison:
    """Prompt and completion as one row per completion, closed by the end token; what is too long loses its beginning."""
    rows = _encode_pairs([(comparison.prompt, completion) for completion in comparison.completions], tokenizer, max_length)
    return EncodedComparison(rows, comparison.ranks)


def _encode_pairs(pairs: Sequence[tuple[Any, str]], tokenizer: Any, max_length: int) -> list[list[int]]:
    from stages.corpora.templates import encode_pair

    return [encode_pair(tokenizer, prompt, completion)[0][-max_length:] for prompt, completion in pairs]


def collate(comparisons: Sequence[EncodedComparison], pad_token_id: int) -> dict[str, torch.Tensor]:
    """All completions of a few prompts as one batch: input_ids and attention_mask [N, T], ranks [N], prompt_index [N]."""
    import torch

    from stages.generation import right_pad

    rows = [torch.tensor(row) for item in comparisons for row in item.rows]
    lengths = torch.tensor([len(row) for row in rows])
    ids = right_pad(rows, pad_token_id)
    return {
        "input_ids": ids,
        "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long(),
        "ranks": torch.tensor([rank for item in comparisons for rank in item.ranks]),
        "prompt_index": torch.tensor([index for index, item in enumerate(comparisons) for _ in item.ranks]),
    }


def _trainer(model: RewardModel, arguments: Any, rows: list[EncodedComparison], pad_token_id: int) -> Any:
    from transformers import Trainer

    from stages.numerics.ranking import ranking_loss

    class RankingTrainer(Trainer):
        """A Trainer whose examples are prompts with all their completions, so that no prompt is ever split across steps."""

        def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **_: Any) -> Any:
            scores = model(inputs["input_ids"], inputs["attention_mask"])
            loss = ranking_loss(scores, inputs["ranks"], inputs["prompt_index"])
            return (loss, {"scores": scores}) if return_outputs else loss

        def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
            # A checkpoint only has to be read by this trainer again: the module's own state.
            from safetensors.torch import save_file

            state = self.model.state_dict() if state_dict is None else state_dict
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            save_file({name: value.detach().cpu().contiguous() for name, value in state.items()}, folder / "model.safetensors")

        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
            from safetensors.torch import load_file

            (model or self.model).load_state_dict(load_file(f"{resume_from_checkpoint}/model.safetensors"))

    return RankingTrainer(model=model, args=arguments, train_dataset=rows, data_collator=lambda items: collate(items, pad_token_id))


def _inference(model: RewardModel) -> Any:
    import torch

    def score(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return model.score(input_ids, attention_mask)

    return score


def measure(model: RewardModel, comparisons: Sequence[EncodedComparison], *, pad_token_id: int, batch_size: int) -> dict[str, Any]:
    """Held-out accuracy over pairs with its 95 % interval, loss, calibration, and accuracy by margin.

    The probability that a model gives its own preference is sigmoid(margin); calibration compares it with how often it is right.
    """
    import torch

    from stages.numerics.classification import calibration_bins, expected_calibration_error
    from stages.numerics.intervals import wilson_interval
    from stages.numerics.ranking import ranking_loss, ranking_pairs
    from stages.rewards.learned import score_rows

    if not comparisons:
        raise DataError("no held-out comparison has a preference; name a validation source with pairs that are no ties")
    training = model.training
    model.eval()
    rows = [row for item in comparisons for row in item.rows]
    scores = score_rows(rows, _inference(model), pad_token_id, batch_size, device=next(model.parameters()).device)
    model.train(training)
    ranks = torch.tensor([rank for item in comparisons for rank in item.ranks])
    prompt_index = torch.tensor([index for index, item in enumerate(comparisons) for _ in item.ranks])
    better, worse = ranking_pairs(ranks, prompt_index)
    margins = scores[better] - scores[worse]
    correct = margins > 0
    confidence = margins.abs().sigmoid()
    low, high = wilson_interval(int(correct.sum()), len(correct))
    by_prompt = [float(correct[prompt_index[better] == index].double().mean()) for index in range(len(comparisons))]
    clustered_low, clustered_high = _clustered_interval(by_prompt)
    return {
        "accuracy": float(correct.double().mean()),
        "ci_low": low,
        "ci_high": high,
        "accuracy_by_prompt": sum(by_prompt) / len(by_prompt),
        "accuracy_by_prompt_ci_low": clustered_low,
        "accuracy_by_prompt_ci_high": clustered_high,
        "pairs": len(correct),
        "loss": float(ranking_loss(scores, ranks, prompt_index)),
        "calibration_error": expected_calibration_error(confidence, correct),
        "calibration": calibration_bins(confidence, correct),
        "accuracy_by_margin": _by_margin(margins.abs(), correct),
        "score_mean": float(scores.double().mean()),
        "score_std": float(scores.double().std(correction=0)),
    }


def _clustered_interval(shares: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean over prompts by the bootstrap; pairs of one prompt are not independent, prompts are."""
    import torch

    values = torch.tensor(shares, dtype=torch.float64)
    draws = torch.randint(len(values), (2000, len(values)), generator=torch.Generator().manual_seed(0))
    means = values[draws].mean(dim=1)
    return float(means.quantile(0.025)), float(means.quantile(0.975))


def _by_margin(margins: torch.Tensor, correct: torch.Tensor) -> list[dict[str, float | None]]:
    edges = [0.0, *MARGINS, float("inf")]
    rows: list[dict[str, float | None]] = []
    for low, high in zip(edges, edges[1:], strict=False):
        inside = (margins >= low) & (margins < high)
        if inside.any():
            accuracy = float(correct[inside].double().mean())
            rows.append({"from": low, "to": None if high == float("inf") else high, "accuracy": accuracy, "pairs": int(inside.sum())})
    return rows
