"""Supervised fine-tuning on demonstrations (prompt-completion pairs and conversations) with TRL's SFTTrainer.

Rows are tokenized here with the template that is saved with the model, so that training, sampling and scoring use the same text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerBase

from stages.corpora.curation import Curator
from stages.corpora.demonstrations import Demonstrations, load_demonstrations
from stages.corpora.encoding.fitting import fit_prompt
from stages.corpora.prompts import PromptRow, load_prompt_rows
from stages.corpora.rows import Row
from stages.corpora.templates import count_tokens, set_template
from stages.errors import DataError
from stages.json_types import JsonObject
from stages.metric_names import HELDOUT_LOG_LOSS, HELDOUT_LOSS_AFTER, HELDOUT_LOSS_BEFORE, NUM_DEMONSTRATIONS, curation_names
from stages.models.adapters.checks import refuse_output_adapter
from stages.models.layers.dropout import set_residual_dropout
from stages.models.loaded import LoadedModel
from stages.models.loading import load_language_model, load_tokenizer
from stages.models.passes.likelihood import Likelihood
from stages.rewards.signature import columns_asked_for
from stages.sft.config import SFTStepConfig
from stages.sft.rows import Encoded, EncodedRow, encode, fitted, pretraining_blocks
from stages.sft.trainer import DemonstrationTrainer, make_trainer
from stages.step import Publication, StepContext, StepResult
from stages.tokens.positions import row_length
from stages.tokens.turns import template_for, turn_form
from stages.training.arguments import weights_dtype
from stages.training.best import heldout_likelihood, publish_trained
from stages.training.lengths import short_enough
from stages.training.running import train
from stages.training.selection import Selector, selection_callback

if TYPE_CHECKING:
    from stages.model_types import TransformersModel


def run(config: SFTStepConfig, context: StepContext) -> StepResult:
    """Fine-tune and publish the language model with its held-out loss (nats per counted token) before and after."""
    tokenizer = _load_tokenizer(config, context)
    curator = Curator(config.curation, count_tokens(tokenizer))
    demonstrations = fitted(load_demonstrations(config.data, curator), config, tokenizer)
    encoded, encoded_heldout = (
        encode(side, tokenizer, config.train_on, completion_only=config.completion_only_loss)
        for side in (demonstrations.train, demonstrations.validation)
    )
    _say_untrained(encoded, "training", context)
    _say_untrained(encoded_heldout, "held-out", context)
    model = _load_model(config, context, tokenizer)
    max_length: int = row_length(config.max_length, model.config, tokenizer, unlimited=1024)
    _say_form(tokenizer, encoded, context)
    rows, heldout = (
        short_enough(side.rows, lambda row: len(row.ids), max_length, f"{which} demonstration", context)
        for side, which in ((encoded, "training"), (encoded_heldout, "held-out"))
    )
    mixed = pretraining_blocks(config, tokenizer, len(rows), context.seed)

    trainer = make_trainer(config, context, model, tokenizer, rows + mixed.train, max_length)
    num_rows, num_mixed, num_tokens = len(rows), len(mixed.train), sum(len(row.ids) for row in rows + mixed.train)
    num_dropped = len(encoded.rows) + len(encoded_heldout.rows) - num_rows - len(heldout)
    for kept in (demonstrations.train, encoded.rows, rows, mixed.train):
        kept.clear()  # the trainer has its own copy of the training rows
    likelihood = _likelihood_of(trainer, config, context, tokenizer)
    before = _measured(context, likelihood(heldout), step=0, when="before")
    forgotten = likelihood(mixed.heldout).loss if mixed.heldout else None
    selector = _selector(config, context, trainer, tokenizer, demonstrations, lambda: likelihood(heldout).loss)
    trained = train(trainer, context, f"{context.name}: sft", rule=config, measure=lambda: likelihood(heldout).loss)
    selected = _load_best(selector) if selector is not None else {}
    after = _measured(context, likelihood(heldout), step=trainer.state.global_step, when="after")
    remembered = likelihood(mixed.heldout).loss if mixed.heldout else None

    metrics: JsonObject = {
        HELDOUT_LOSS_BEFORE: before,
        HELDOUT_LOSS_AFTER: after,
        **trained,
        NUM_DEMONSTRATIONS: num_rows,
        "heldout_demonstrations": len(heldout),
        "dropped_too_long": num_dropped,
        **curation_names(curator.left_out),
        **selected,
        "tokens_per_second": trained["steps_per_second"] * config.training.batch_size * num_tokens / len(trainer.train_dataset),
    }
    if forgotten is not None and remembered is not None:
        metrics |= {"pretraining_rows": num_mixed, "pretraining_loss_before": forgotten, "pretraining_loss_after": remembered}
    kind: Publication = {
        "role": "language_model",
        "base": context.models["model"] if config.lora is not None else None,
        "extra": {"template": config.template} if config.template is not None else None,
    }
    shown = [row.ids for row in heldout]  # rows on which the saved model is compared with the model in memory
    record = publish_trained(trainer, context, model, tokenizer, rows=shown, metrics=metrics, **kind)
    return StepResult(model=record, metrics=metrics)


def _load_tokenizer(config: SFTStepConfig, context: StepContext) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with the template of the recipe if there is one."""
    tokenizer = load_tokenizer(context.models["model"])
    if config.template is not None:
        set_template(tokenizer, config.template)
    return tokenizer


def _load_model(config: SFTStepConfig, context: StepContext, tokenizer: PreTrainedTokenizerBase) -> TransformersModel:
    """The model to train, with its adapter and dropout."""
    source, dtype = context.models["model"], weights_dtype(config, context)
    model = load_language_model(source, dtype=dtype, lora=config.lora, tokenizer=tokenizer, dropout=True)
    refuse_output_adapter(model, config.lora)
    if config.residual_dropout is not None:
        set_residual_dropout(model, config.residual_dropout)
    return model


def _load_best(selector: Selector) -> JsonObject:
    """Load the weights of the selected checkpoint into the model. Returns the metrics of the selection."""
    best = selector.load_best()
    return {"selected_optimizer_step": best.optimizer_step, "selection": [asdict(one) for one in selector.tried]}


def _say_untrained(encoded: Encoded, which: str, context: StepContext) -> None:
    """Report demonstrations without a trained reply. Raises DataError if no others are left."""
    if not encoded.untrained:
        return
    if not encoded.rows:
        raise DataError(f"all replies of the {encoded.untrained} {which} demonstrations have weight 0; expected replies with weight 1")
    context.runtime.console.print(
        f"{context.name}: left out {encoded.untrained} {which} demonstrations, because all their replies have weight 0"
    )


def _say_form(tokenizer: PreTrainedTokenizerBase, encoded: Encoded, context: StepContext) -> None:
    """Report what a user may not expect of the rows: replies in separate rows or without an end token, and unknown characters."""
    console = context.runtime.console
    if encoded.separate:
        console.print(
            f"{context.name}: {encoded.separate} earlier replies are trained in separate rows: the chat template writes them differently "
            "when another turn follows"
        )
    if ending := _missing_end(tokenizer):
        console.print(f"{context.name}: {ending}")
    unknown = tokenizer.unk_token_id
    counts = unknown not in (None, tokenizer.eos_token_id, tokenizer.bos_token_id)  # else it also has another meaning
    if counts and (number := sum(row.ids.count(unknown) for row in encoded.rows)):
        console.print(
            f"{context.name}: {number} tokens of the training demonstrations are {tokenizer.unk_token}, because the vocabulary lacks their "
            "characters: the model can neither read nor write them"
        )


def _missing_end(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """What to say if no special token ends a reply in the training rows. None if one does."""
    form = turn_form(tokenizer) if tokenizer.chat_template else None
    if form.end_ids if form is not None else tokenizer.eos_token_id is not None:
        return None
    if form is None or (tokenizer.eos_token_id is None and "eos_token" in template_for(tokenizer, ())):
        return (
            "the tokenizer has no end token, so nothing ends a completion: the model does not learn to stop; set eos_token in its "
            "tokenizer_config.json"
        )
    return (
        f"the chat template ends a reply with {form.ending!r}, without a special token: the model does not learn to stop; add one to the "
        "template"
    )


def _selector(
    config: SFTStepConfig,
    context: StepContext,
    trainer: DemonstrationTrainer,
    tokenizer: PreTrainedTokenizerBase,
    demonstrations: Demonstrations,
    heldout_loss: Callable[[], float],
) -> Selector | None:
    selection = config.selection
    if selection is None:
        return None
    columns = columns_asked_for(selection.reward)
    if selection.data is not None:
        prompts = load_prompt_rows(selection.data, limit=selection.num_prompts, split="validation", columns=columns)
    else:
        rows = {repr(row["prompt"]): row for row in demonstrations.validation}.values()
        prompts = [PromptRow(row["prompt"], columns(Row(row))) for row in rows]
    if config.prompt_fit is not None:
        prompts = [PromptRow(fit_prompt(row.prompt, config.prompt_fit, tokenizer), row.columns) for row in prompts]

    dtype = context.runtime.dtype(config.precision)
    selector = Selector(selection, context, LoadedModel(trainer.model, tokenizer, context.models["model"], dtype), prompts, heldout_loss)
    trainer.add_callback(selection_callback(selector, trainer))
    return selector


def _likelihood_of(
    trainer: DemonstrationTrainer, config: SFTStepConfig, context: StepContext, tokenizer: PreTrainedTokenizerBase
) -> Callable[[list[EncodedRow]], Likelihood]:
    """The function that measures the model on rows."""

    def likelihood(rows: list[EncodedRow]) -> Likelihood:
        counted = [(row.ids, row.counted(config.completion_only_loss)) for row in rows]
        return heldout_likelihood(trainer, context, tokenizer, counted, config.precision)

    return likelihood


def _measured(context: StepContext, likelihood: Likelihood, *, step: int, when: str) -> float:
    """Log the held-out loss; returns it."""
    context.log(step, {HELDOUT_LOG_LOSS: likelihood.loss})
    context.runtime.console.print(f"{context.name}: held-out {when} training: loss {likelihood.loss:.4f} over {likelihood.tokens} tokens")
    return likelihood.loss
