"""Direct preference optimisation (Rafailov et al. 2023) on the reward model's comparisons, with TRL's DPOTrainer.

It is the common alternative to PPO, and so the baseline in an evaluation. A ranked list gives one pair per two different ranks.
"""

from __future__ import annotations

from contextlib import nullcontext

from stages.corpora.comparisons import load_comparisons
from stages.corpora.curation import Curator
from stages.corpora.templates import count_tokens
from stages.dpo.config import DPOStepConfig
from stages.dpo.measuring import completion_logprobs, measure
from stages.dpo.pairs import encode, usable
from stages.dpo.trainer import load_reference, make_trainer
from stages.json_types import JsonObject
from stages.metric_names import HELDOUT_LOG_ACCURACY, HELDOUT_LOG_MARGIN, NUM_COMPARISONS, NUM_PAIRS, curation_names, heldout_names
from stages.models.adapters.activation import without_new_adapter
from stages.models.adapters.checks import refuse_output_adapter
from stages.models.loading import load_language_model, load_tokenizer
from stages.step import Publication, StepContext, StepResult
from stages.tokens.positions import row_length
from stages.training.arguments import weights_dtype
from stages.training.best import publish_trained
from stages.training.running import train


def run(config: DPOStepConfig, context: StepContext) -> StepResult:
    """Train and publish the policy, with its held-out accuracy as an implicit reward model and its distance to the reference."""
    source = context.models["model"]
    tokenizer = load_tokenizer(source)
    curator = Curator(config.curation, count_tokens(tokenizer))
    comparisons = load_comparisons(config.data, preferred=config.preferred, curator=curator)
    encoded, encoded_heldout = (encode(config, side, tokenizer, context.seed) for side in (comparisons.train, comparisons.validation))
    model = load_language_model(source, dtype=weights_dtype(config, context), lora=config.lora, tokenizer=tokenizer)
    refuse_output_adapter(model, config.lora)
    max_length: int = row_length(config.max_length, model.config, tokenizer, unlimited=1024)
    pairs, left_out = usable(encoded, max_length, context, "training")
    heldout, heldout_left_out = usable(encoded_heldout, max_length, context, "held-out")
    reference = load_reference(config, context, tokenizer)

    with without_new_adapter(model) if reference is None else nullcontext():
        by_reference = completion_logprobs(config, context, reference if reference is not None else model, heldout, tokenizer)
    trainer = make_trainer(config, context, model, reference, tokenizer, pairs)

    def measured() -> dict[str, float]:
        return measure(completion_logprobs(config, context, model, heldout, tokenizer), by_reference, beta=config.beta)

    trained = train(trainer, context, f"{context.name}: dpo", rule=config, measure=lambda: measured()["loss"])
    after = measured()
    context.log(trainer.state.global_step, {HELDOUT_LOG_ACCURACY: after["accuracy"], HELDOUT_LOG_MARGIN: after["margin"]})
    context.runtime.console.print(
        f"{context.name}: held-out accuracy {after['accuracy']:.3f} (95 % {after['ci_low']:.3f} to {after['ci_high']:.3f}, "
        f"{len(heldout)} pairs), margin {after['margin']:.3f}"
    )
    metrics: JsonObject = {
        **heldout_names(after),
        **trained,
        NUM_COMPARISONS: len(comparisons.train),
        NUM_PAIRS: len(pairs),
        "heldout_pairs": len(heldout),
        **left_out,
        **heldout_names(heldout_left_out),
        **curation_names(curator.left_out),
    }
    published: Publication = {"role": "language_model", "base": source if config.lora is not None else None}
    shown = [[*pair.prompt_ids, *pair.chosen_ids] for pair in heldout]  # rows on which the saved model is checked
    record = publish_trained(trainer, context, model, tokenizer, rows=shown, metrics=metrics, **published)
    return StepResult(model=record, metrics=metrics)
