"""Supervised fine-tuning on demonstrations: prompt-completion pairs and conversations, through TRL's SFTTrainer.

The rows are tokenized here, by the template that the model keeps, so that training, sampling and scoring see one and the same text.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from stages.config import DataInput, DataSource, ModelField, ModelInput, OptimizerSettings, TrainingStepConfig
from stages.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from stages.models.likelihood import Likelihood
    from stages.runtime import StepContext, StepResult

IGNORED = -100  # label of a token that does not count in the loss


class SFTOptimizer(OptimizerSettings):
    """As ``OptimizerSettings``, with a short warmup."""

    learning_rate: float = Field(2e-5, gt=0, description="Peak learning rate.")
    warmup_fraction: float = Field(0.03, ge=0, lt=1, description="Share of the optimizer steps used for linear warmup.")


class SFTStepConfig(TrainingStepConfig):
    """Fine-tune ``model`` on the demonstrations in ``data``."""

    stage: Literal["sft"] = "sft"
    model: ModelField = Field(description="Language model to fine-tune.")
    data: DataInput
    template: str | None = Field(
        None, description="chat: the tokenizer's own; a plain template's name; or a format string with {prompt}. null: keep what it has."
    )
    completion_only_loss: bool = Field(True, description="Only the completion's tokens count in the loss; false: the prompt's, too.")
    packing: bool = Field(False, description="Several demonstrations in one row (they do not see each other); batch_size counts rows.")
    max_length: int | None = Field(
        None, ge=2, description="Longest demonstration and row, in tokens; longer ones are left out, and said. null: the model's positions."
    )
    training: SFTOptimizer = SFTOptimizer()

    @model_validator(mode="after")
    def _trainable(self) -> SFTStepConfig:
        if self.model.quantization != "none" and self.lora is None:
            raise ValueError(f"model.quantization={self.model.quantization!r} needs lora: quantized weights cannot be trained themselves")
        return self

    def model_inputs(self) -> dict[str, ModelInput]:
        return {"model": self.model}

    def data_inputs(self) -> dict[str, list[DataSource]]:
        inputs = {"data.train": self.data.train}
        return inputs if self.data.validation is None else {**inputs, "data.validation": self.data.validation}


@dataclass(frozen=True)
class EncodedRow:
    """A demonstration as tokens; the first ``prompt_length`` of ``ids`` are the prompt."""

    ids: list[int]
    prompt_length: int

    def counted(self, completion_only: bool) -> list[int]:
        """1 where a token counts in the loss, 0 elsewhere. The very first token is never predicted."""
        start = max(self.prompt_length, 1) if completion_only else 1
        return [0] * start + [1] * (len(self.ids) - start)


def run(config: SFTStepConfig, context: StepContext) -> StepResult:
    """Fine-tune; publish the language model with its held-out loss (nats per counted token) before and after."""
    from stages.corpora.demonstrations import load_demonstrations
    from stages.corpora.templates import set_template
    from stages.models.loading import load_language_model, load_tokenizer, save_model
    from stages.runtime import StepResult
    from stages.training import gathered_weights, publish_best, train, weights_dtype

    tokenizer = load_tokenizer(context.models["model"])
    if config.template is not None:
        set_template(tokenizer, config.template)
    model = load_language_model(
        context.models["model"], dtype=weights_dtype(config, context), lora=config.lora, tokenizer=tokenizer, dropout=True
    )
    max_length: int = config.max_length or getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1024
    demonstrations = load_demonstrations(config.data)
    rows = _encoded(demonstrations.train, tokenizer, max_length, context, "training")
    heldout = _encoded(demonstrations.validation, tokenizer, max_length, context, "held-out")

    trainer = _trainer(config, context, model, tokenizer, rows, max_length)
    before = _measure(trainer, config, context, tokenizer, heldout, "before")
    trained = train(
        trainer, context, f"{context.name}: sft", rule=config,
        measure=lambda: _likelihood(trainer, config, context, tokenizer, heldout).loss,
    )  # fmt: skip
    after = _measure(trainer, config, context, tokenizer, heldout, "after")

    num_tokens = sum(len(row.ids) for row in rows)
    metrics = {
        "heldout_loss_before": before,
        "heldout_loss_after": after,
        **trained,
        "demonstrations": len(rows),
        "heldout_demonstrations": len(heldout),
        "dropped_too_long": len(demonstrations.train) + len(demonstrations.validation) - len(rows) - len(heldout),
        "tokens_per_second": trained["steps_per_second"] * config.training.batch_size * num_tokens / len(trainer.train_dataset),
    }
    kind: dict[str, Any] = {
        "role": "language_model",
        "base": context.models["model"] if config.lora is not None else None,
        "extra": {"template": config.template} if config.template is not None else None,
    }
    publish_best(trainer, context, lambda folder, weights: save_model(model, tokenizer, folder, state_dict=weights), **kind)
    weights = gathered_weights(trainer)
    record = context.publish(lambda folder: save_model(model, tokenizer, folder, state_dict=weights), metrics=metrics, **kind)
    return StepResult(model=record, metrics=metrics)


def _encoded(
    demonstrations: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, max_length: int, context: StepContext, which: str
) -> list[EncodedRow]:
    """The demonstrations as tokens, without those that are longer than ``max_length`` (cutting one would teach an ending that is none)."""
    from stages.corpora.templates import encode_pair

    rows = [EncodedRow(*encode_pair(tokenizer, row["prompt"], row["completion"])) for row in demonstrations]
    kept = [row for row in rows if len(row.ids) <= max_length]
    if not kept:
        longest = min((len(row.ids) for row in rows), default=0)
        raise DataError(f"no {which} demonstration fits max_length={max_length}: the shortest of {len(rows)} has {longest} tokens")
    if len(kept) < len(rows):
        context.runtime.console.print(
            f"{context.name}: left out {len(rows) - len(kept)} of {len(rows)} {which} demonstrations longer than {max_length} tokens"
        )
    return kept


def _trainer(
    config: SFTStepConfig,
    context: StepContext,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[EncodedRow],
    max_length: int,
) -> Any:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from stages.models.loading import quiet_transformers
    from stages.training import exact, training_arguments

    class DemonstrationTrainer(exact(SFTTrainer)):  # type: ignore[misc]
        """Its entropy and accuracy are means over tokens; TRL's are over forward passes, and so depend on how a step is cut into them."""

        def compute_loss(self, model: Any, inputs: dict[str, Any], *arguments: Any, **named: Any) -> Any:
            counted = self.accelerator.gather((inputs["labels"][..., 1:] != IGNORED).sum().reshape(1)).sum()
            made = super().compute_loss(model, inputs, *arguments, **named)
            self._metrics["train"]["counted"].append(float(counted))
            return made

        def log(self, logs: dict[str, float], *arguments: Any, **named: Any) -> None:
            kept = self._metrics["train"]
            counts = kept.pop("counted", [])
            for name in ("entropy", "mean_token_accuracy"):
                if sum(counts) and len(kept[name]) == len(counts):
                    kept[name] = [sum(value * count for value, count in zip(kept[name], counts, strict=True)) / sum(counts)]
            super().log(logs, *arguments, **named)

    options: dict[str, Any] = {"max_length": None, "packing": False, "completion_only_loss": config.completion_only_loss}
    collator = None
    if config.packing:
        columns = pack_rows(rows, max_length, config.completion_only_loss)
        collator = PackedCollator(tokenizer.pad_token_id)
        options |= {"remove_unused_columns": False, "dataset_kwargs": {"skip_prepare_dataset": True}}
    else:
        columns = {"input_ids": [row.ids for row in rows]}
        if config.completion_only_loss:
            columns["completion_mask"] = [row.counted(True) for row in rows]
    with quiet_transformers(), _quiet_datasets():
        arguments = training_arguments(config.training, context, precision=config.precision, kind=SFTConfig, **options)
        trainer = DemonstrationTrainer(
            model=model, args=arguments, train_dataset=Dataset.from_dict(columns), processing_class=tokenizer, data_collator=collator
        )
    for parameter in model.parameters():
        # TRL makes a quantized model's adapter bf16, in which small updates are lost
        if parameter.requires_grad and parameter.dtype.itemsize < 4:
            parameter.data = parameter.data.float()
    return trainer


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    import datasets

    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _measure(
    trainer: Any, config: SFTStepConfig, context: StepContext, tokenizer: PreTrainedTokenizerBase, heldout: list[EncodedRow], when: str
) -> float:
    likelihood = _likelihood(trainer, config, context, tokenizer, heldout)
    context.log(0 if when == "before" else trainer.state.global_step, {"heldout/loss": likelihood.loss})
    context.runtime.console.print(f"{context.name}: held-out {when}: loss {likelihood.loss:.4f} over {likelihood.tokens} tokens")
    return likelihood.loss


def _likelihood(
    trainer: Any, config: SFTStepConfig, context: StepContext, tokenizer: PreTrainedTokenizerBase, heldout: list[EncodedRow]
) -> Likelihood:
    from stages.models.likelihood import measure_likelihood

    return measure_likelihood(
        trainer.model.to(context.runtime.device),
        [(row.ids, row.counted(config.completion_only_loss)) for row in heldout],
        pad_token_id=tokenizer.pad_token_id,
        batch_size=trainer.args.per_device_eval_batch_size,
        device=context.runtime.device,
        dtype=context.runtime.dtype(config.precision),
    )


# Packing. TRL's own makes one row of a whole batch, whose attention mask grows with the square of it where there is no flash attention.


def pack_rows(rows: Sequence[EncodedRow], max_length: int, completion_only: bool) -> dict[str, list[list[int]]]:
    """Rows joined into few rows of at most ``max_length`` tokens (best fit, longest first).

    Columns input_ids, labels, and position_ids, which begin at 0 with each demonstration: by that attention tells them apart.
    """
    room: list[tuple[int, int]] = []  # (free tokens, row), sorted
    packed: list[list[EncodedRow]] = []
    for row in sorted(rows, key=lambda row: -len(row.ids)):
        found = bisect.bisect_left(room, (len(row.ids), -1))
        if found == len(room):
            packed.append([row])
            free, index = max_length, len(packed) - 1
        else:
            free, index = room.pop(found)
            packed[index].append(row)
        bisect.insort(room, (free - len(row.ids), index))
    return {
        "input_ids": [[token for row in group for token in row.ids] for group in packed],
        "labels": [[label for row in group for label in _labels(row, completion_only)] for group in packed],
        "position_ids": [[position for row in group for position in range(len(row.ids))] for group in packed],
    }


def _labels(row: EncodedRow, completion_only: bool) -> list[int]:
    return [token if counts else IGNORED for token, counts in zip(row.ids, row.counted(completion_only), strict=True)]


class PackedCollator:
    """Pads packed rows on the right; the padding is one more demonstration (its positions begin at 0) that no label counts."""

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, Any]:
        import torch

        width = max(len(row["input_ids"]) for row in rows)
        padded: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "position_ids": []}
        for row in rows:
            missing = width - len(row["input_ids"])
            padded["input_ids"].append(row["input_ids"] + [self.pad_token_id] * missing)
            padded["labels"].append(row["labels"] + [IGNORED] * missing)
            padded["position_ids"].append(row["position_ids"] + list(range(missing)))
        return {name: torch.tensor(values) for name, values in padded.items()}
