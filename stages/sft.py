"""Supervised fine-tuning on demonstrations: prompt-completion pairs and conversations, through TRL's SFTTrainer.

The rows are tokenized here, by the template that the model keeps, so that training, sampling and scoring see one and the same text.
"""

from __future__ import annotations

import bisect
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from stages.config import DataField, DataInput, DataSource, ModelField, ModelInput, OptimizerSettings, Strict, TrainingStepConfig
from stages.corpora.curation import Curation
from stages.corpora.fitting import PromptFit
from stages.corpora.training_rows import TrainOn
from stages.errors import DataError
from stages.training.selection import Selection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from stages.corpora.demonstrations import Demonstration, Demonstrations
    from stages.models.likelihood import Likelihood
    from stages.step import StepContext, StepResult
    from stages.training.selection import Selector

IGNORED = -100  # label of a token that does not count in the loss
HELDOUT_EVERY = 20  # of the pretraining mix's blocks
MOST_HELDOUT_BLOCKS = 64


class SFTOptimizer(OptimizerSettings):
    """As ``OptimizerSettings``, with a short warmup."""

    learning_rate: float = Field(2e-5, gt=0, description="Peak learning rate.")
    warmup_fraction: float = Field(0.03, ge=0, lt=1, description="Share of the optimizer steps used for linear warmup.")


class SFTPretrainingMix(Strict):
    """Pretraining texts among the demonstrations: the model that PPO starts from should not forget (Ouyang et al. 2022, C.3)."""

    data: DataField = Field(description="Texts of the pretraining distribution; every twentieth block of them is held out.")
    share: float = Field(0.1, gt=0, lt=1, description="Share of the training rows that are blocks of these texts; the paper's is 0.1.")
    block_size: int = Field(128, ge=2, description="Tokens per block; all of them count in the loss.")


class SFTStepConfig(TrainingStepConfig):
    """Fine-tune ``model`` on the demonstrations in ``data``."""

    stage: Literal["sft"] = "sft"
    preset: str | None = Field(None, description="Published settings beneath the step's own, e.g. instructgpt2022 (recipe/presets.py).")
    model: ModelField = Field(description="Language model to fine-tune.")
    data: DataInput
    template: str | None = Field(
        None, description="chat: the tokenizer's own; a plain template's name; or a format string with {prompt}. null: keep what it has."
    )
    completion_only_loss: bool = Field(True, description="Only the assistant's tokens count in the loss; false: the prompt's, too.")
    train_on: TrainOn = Field(
        "all_assistant_turns",
        description="Which replies train: all of a conversation (of a row with a prompt column, those of its completion), or the last one.",
    )
    pretraining_mix: SFTPretrainingMix | None = Field(None, description="Mix pretraining texts in; null: demonstrations alone.")
    residual_dropout: float | None = Field(
        None, ge=0, lt=1, description="Dropout on what attention and MLP add, and nowhere else; null: as the model's config has it."
    )
    selection: Selection | None = Field(None, description="Publish the model along the run that a reward likes best; null: the last.")
    prompt_fit: PromptFit | None = Field(None, description="Shorten prompts that are too long; null: leave long demonstrations out.")
    curation: Curation = Field(Curation(), description="Which rows are used.")
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
        return {"model": self.model, **(self.selection.model_inputs() if self.selection is not None else {})}

    def data_inputs(self) -> dict[str, list[DataSource]]:
        inputs = {"data.train": self.data.train}
        if self.data.validation is not None:
            inputs["data.validation"] = self.data.validation
        if self.pretraining_mix is not None:
            inputs["pretraining_mix.data"] = self.pretraining_mix.data
        return inputs if self.selection is None else {**inputs, **self.selection.data_inputs()}

    def check_data(self) -> None:
        """Raise DataError for data this stage cannot use; no model is loaded."""
        from stages.corpora.curation import Curator
        from stages.corpora.demonstrations import load_demonstrations
        from stages.corpora.files import read_rows, text_of
        from stages.corpora.prompts import load_prompt_rows

        load_demonstrations(self.data, Curator(self.curation))
        for row in read_rows(self.pretraining_mix.data) if self.pretraining_mix is not None else ():
            text_of(row, "text")
        if self.selection is not None and self.selection.data is not None:
            from stages.rewards.signature import columns_asked_for

            columns = columns_asked_for(self.selection.reward, run=False)
            load_prompt_rows(self.selection.data, split="validation", columns=columns)

    def conversations(self) -> list[tuple[Any, list[Any], str]]:
        """Rows of (prompt, its completions, the row's place) that the models of this step read; see ``chain/texts.py``."""
        from stages.corpora.demonstrations import load_demonstrations

        loaded = load_demonstrations(self.data)
        return [(row["prompt"], [row["completion"]], row.location) for side in (loaded.train, loaded.validation) for row in side]


@dataclass(frozen=True)
class EncodedRow:
    """A demonstration as tokens; the first ``prompt_length`` of ``ids`` are the prompt.

    ``trained``: 1 where a token belongs to a reply that trains; None: all after the prompt do.
    """

    ids: list[int]
    prompt_length: int
    trained: list[int] | None = None

    def counted(self, completion_only: bool) -> list[int]:
        """1 where a token counts in the loss, 0 elsewhere. The very first token is never predicted."""
        start = max(self.prompt_length, 1) if completion_only else 1
        if completion_only and self.trained is not None:
            return [0] * start + self.trained[start:]
        return [0] * start + [1] * (len(self.ids) - start)


def run(config: SFTStepConfig, context: StepContext) -> StepResult:
    """Fine-tune; publish the language model with its held-out loss (nats per counted token) before and after."""
    from stages.corpora.curation import Curator
    from stages.corpora.demonstrations import load_demonstrations
    from stages.corpora.templates import count_tokens, set_template
    from stages.models.adapters import refuse_output_adapter
    from stages.models.dropout import set_residual_dropout
    from stages.models.loading import load_language_model, load_tokenizer, save_model
    from stages.step import StepResult
    from stages.tokens.positions import row_length
    from stages.training.trainer import gathered_weights, publish_best, train, weights_dtype

    tokenizer = load_tokenizer(context.models["model"])
    if config.template is not None:
        set_template(tokenizer, config.template)
    curator = Curator(config.curation, count_tokens(tokenizer))
    demonstrations = _fitted(load_demonstrations(config.data, curator), config, tokenizer)
    encoded = encode(demonstrations.train, tokenizer, config.train_on)
    encoded_heldout = encode(demonstrations.validation, tokenizer, config.train_on)
    model = load_language_model(
        context.models["model"], dtype=weights_dtype(config, context), lora=config.lora, tokenizer=tokenizer, dropout=True
    )
    refuse_output_adapter(model, config.lora)
    if config.residual_dropout is not None:
        set_residual_dropout(model, config.residual_dropout)
    max_length: int = row_length(config.max_length, model.config, tokenizer, unlimited=1024)
    _say_form(tokenizer, len(encoded) - len(demonstrations.train), context)
    rows = _short_enough(encoded, max_length, context, "training")
    heldout = _short_enough(encoded_heldout, max_length, context, "held-out")
    mixed = _pretraining_blocks(config, tokenizer, len(rows), context.seed)

    trainer = _trainer(config, context, model, tokenizer, rows + mixed.train, max_length)
    before = _measure(trainer, config, context, tokenizer, heldout, "before")
    forgotten = _measure_pretraining(trainer, config, context, tokenizer, mixed.heldout)
    selector = _selector(config, context, trainer, tokenizer, demonstrations, heldout)
    trained = train(
        trainer,
        context,
        f"{context.name}: sft",
        rule=config,
        measure=lambda: _likelihood(trainer, config, context, tokenizer, heldout).loss,
    )
    selected = {}
    if selector is not None:
        best = selector.load_best()
        selected = {"selected_optimizer_step": best.optimizer_step, "selection": [asdict(one) for one in selector.tried]}
    after = _measure(trainer, config, context, tokenizer, heldout, "after")
    remembered = _measure_pretraining(trainer, config, context, tokenizer, mixed.heldout)

    num_tokens = sum(len(row.ids) for row in rows + mixed.train)
    metrics = {
        "heldout_loss_before": before,
        "heldout_loss_after": after,
        **trained,
        "demonstrations": len(rows),
        "heldout_demonstrations": len(heldout),
        "dropped_too_long": len(encoded) + len(encoded_heldout) - len(rows) - len(heldout),
        **{f"curation_{reason}": number for reason, number in sorted(curator.left_out.items())},
        **selected,
        "tokens_per_second": trained["steps_per_second"] * config.training.batch_size * num_tokens / len(trainer.train_dataset),
    }
    if forgotten is not None and remembered is not None:
        metrics |= {"pretraining_rows": len(mixed.train), "pretraining_loss_before": forgotten, "pretraining_loss_after": remembered}
    kind: dict[str, Any] = {
        "role": "language_model",
        "base": context.models["model"] if config.lora is not None else None,
        "extra": {"template": config.template} if config.template is not None else None,
    }
    shown = [row.ids for row in heldout]  # what was saved is compared with the model in memory on the first of them
    publish_best(trainer, context, lambda folder, weights: save_model(model, tokenizer, folder, state_dict=weights, rows=shown), **kind)
    weights = gathered_weights(trainer)
    record = context.publish(lambda folder: save_model(model, tokenizer, folder, state_dict=weights, rows=shown), metrics=metrics, **kind)
    return StepResult(model=record, metrics=metrics)


def encode(demonstrations: Sequence[Demonstration], tokenizer: PreTrainedTokenizerBase, train_on: TrainOn) -> list[EncodedRow]:
    """The demonstrations as tokens. Raises DataError, with the row's place, for one that the chat template refuses."""
    from stages.corpora.training_rows import training_rows

    rows = [row for demonstration in demonstrations for row in training_rows(tokenizer, demonstration, train_on=train_on)]
    return [EncodedRow(row.ids, row.prompt_length, row.trained) for row in rows]


def _say_form(tokenizer: PreTrainedTokenizerBase, apart: int, context: StepContext) -> None:
    """Say what the chat template does that a user would not expect: replies in rows of their own, and replies without an end."""
    from stages.tokens.turns import turn_form

    console = context.runtime.console
    if apart:
        console.print(
            f"{context.name}: {apart} earlier replies train in rows of their own: the chat template writes them differently once another "
            "turn follows"
        )
    if tokenizer.chat_template and not turn_form(tokenizer).writes_end:
        console.print(
            f"{context.name}: the chat template ends a reply with {turn_form(tokenizer).ending!r}, which holds no special token: the model "
            "learns no token to stop at; add one to the template"
        )


def _short_enough(rows: list[EncodedRow], max_length: int, context: StepContext, which: str) -> list[EncodedRow]:
    """The rows without those that are longer than ``max_length`` tokens (cutting one would teach an ending that is none)."""
    kept = [row for row in rows if len(row.ids) <= max_length]
    if not kept:
        longest = min((len(row.ids) for row in rows), default=0)
        raise DataError(f"no {which} demonstration fits max_length={max_length}: the shortest of {len(rows)} has {longest} tokens")
    if len(kept) < len(rows):
        context.runtime.console.print(
            f"{context.name}: left out {len(rows) - len(kept)} of {len(rows)} {which} demonstrations longer than {max_length} tokens"
        )
    return kept


@dataclass(frozen=True)
class Blocks:
    """Blocks of the pretraining mix: to train on, and held out."""

    train: list[EncodedRow]
    heldout: list[EncodedRow]


def _pretraining_blocks(config: SFTStepConfig, tokenizer: PreTrainedTokenizerBase, num_demonstrations: int, seed: int) -> Blocks:
    """So many blocks that they are ``share`` of all training rows, drawn once by the seed; fewer where the texts hold no more."""
    mix = config.pretraining_mix
    if mix is None:
        return Blocks([], [])
    from stages.corpora.files import read_rows, text_of
    from stages.corpora.packing import encode_documents, pack_blocks

    tokens = encode_documents(tokenizer, [text_of(row, "text") for row in read_rows(mix.data)])
    blocks = [EncodedRow(ids, 0) for ids in pack_blocks(tokens, mix.block_size).tolist()]
    heldout = blocks[HELDOUT_EVERY - 1 :: HELDOUT_EVERY][:MOST_HELDOUT_BLOCKS] or blocks[-1:]
    del blocks[HELDOUT_EVERY - 1 :: HELDOUT_EVERY]
    wanted = round(num_demonstrations * mix.share / (1 - mix.share))
    if wanted > len(blocks):
        raise DataError(
            f"pretraining_mix: a share of {mix.share:g} beside {num_demonstrations} demonstrations takes {wanted} blocks of "
            f"{mix.block_size} tokens, and the texts make {len(blocks)}; add text, or lower share or block_size"
        )
    return Blocks(random.Random(f"pretraining mix {seed}").sample(blocks, wanted), heldout)


def _fitted(demonstrations: Demonstrations, config: SFTStepConfig, tokenizer: PreTrainedTokenizerBase) -> Demonstrations:
    """The demonstrations with prompts that fit."""
    from stages.corpora.demonstrations import Demonstrations
    from stages.corpora.fitting import fit_prompt

    fit = config.prompt_fit
    if fit is None:
        return demonstrations
    sides = [
        [row.with_prompt(fit_prompt(row["prompt"], fit, tokenizer, row.location)) for row in side]
        for side in (demonstrations.train, demonstrations.validation)
    ]
    return Demonstrations(*sides)


def _selector(
    config: SFTStepConfig,
    context: StepContext,
    trainer: Any,
    tokenizer: PreTrainedTokenizerBase,
    demonstrations: Demonstrations,
    heldout: list[EncodedRow],
) -> Selector | None:
    selection = config.selection
    if selection is None:
        return None
    from stages.corpora.files import Row
    from stages.corpora.fitting import fit_prompt
    from stages.corpora.prompts import PromptRow, load_prompt_rows
    from stages.rewards.signature import columns_asked_for
    from stages.training.selection import Selector, selection_callback

    columns = columns_asked_for(selection.reward)
    if selection.data is not None:
        prompts = load_prompt_rows(selection.data, limit=selection.num_prompts, split="validation", columns=columns)
    else:
        rows = {repr(row["prompt"]): row for row in demonstrations.validation}.values()
        prompts = [PromptRow(row["prompt"], columns(Row(row))) for row in rows]
    if config.prompt_fit is not None:
        prompts = [PromptRow(fit_prompt(row.prompt, config.prompt_fit, tokenizer), row.columns) for row in prompts]

    def measure_loss() -> float:
        return _likelihood(trainer, config, context, tokenizer, heldout).loss

    dtype = context.runtime.dtype(config.precision)
    selector = Selector(selection, context, trainer.model, tokenizer, prompts, measure_loss, dtype=dtype)
    trainer.add_callback(selection_callback(selector, trainer))
    return selector


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
    from stages.training.trainer import exact, training_arguments

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


def _measure_pretraining(
    trainer: Any, config: SFTStepConfig, context: StepContext, tokenizer: PreTrainedTokenizerBase, heldout: list[EncodedRow]
) -> float | None:
    """Loss on held-out blocks of the pretraining mix; None without one."""
    return _likelihood(trainer, config, context, tokenizer, heldout).loss if heldout else None


def _likelihood(
    trainer: Any, config: SFTStepConfig, context: StepContext, tokenizer: PreTrainedTokenizerBase, heldout: list[EncodedRow]
) -> Likelihood:
    from stages.training.trainer import heldout_likelihood

    rows = [(row.ids, row.counted(config.completion_only_loss)) for row in heldout]
    return heldout_likelihood(trainer, context, tokenizer, rows, config.precision)


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
