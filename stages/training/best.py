"""The best checkpoint of a training, by a held-out loss, and the weights of a Trainer for publishing."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from stages.config import Precision
from stages.models.passes.likelihood import Likelihood, measure_likelihood
from stages.models.saving import save_model
from stages.models.sharding import unsharded, unsharded_state_dict
from stages.training.state import load_weights, trained_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from stages.model_types import TransformersModel
    from stages.registry.record import ModelRecord
    from stages.step import StepContext
    from stages.training.step_trainer import StepTrainer


@contextmanager
def best_weights(trainer: StepTrainer) -> Iterator[dict[str, float] | None]:
    """Within this context the model has the weights of the best checkpoint. Yields its held-out loss and its optimizer step.

    Yields None, and changes nothing, if no best checkpoint is kept.
    """
    checkpoints = getattr(trainer, "checkpoints", None)  # None if the training was complete before this start
    best = checkpoints.best() if checkpoints is not None and checkpoints.keep_best else None
    if best is None:
        yield None
        return
    parameters = trained_parameters(trainer)
    last = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    load_weights(trainer, best.path)
    state = json.loads((best.path / "trainer_state.json").read_text(encoding="utf-8"))
    try:
        yield {"heldout_loss": -float(best.score or 0.0), "optimizer_step": float(state["global_step"])}
    finally:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(last[name])


def heldout_likelihood(
    trainer: StepTrainer,
    context: StepContext,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[tuple[Sequence[int], Sequence[int]]],
    precision: Precision,
) -> Likelihood:
    """Likelihood of held-out rows of (token ids, mask) under the model in training. Call on every process."""
    with unsharded(trainer.model):
        return measure_likelihood(
            trainer.model.to(context.runtime.device),
            rows,
            pad_token_id=tokenizer.pad_token_id,
            batch_size=trainer.args.per_device_eval_batch_size,
            device=context.runtime.device,
            dtype=context.runtime.dtype(precision),
        )


def publish_best(
    trainer: StepTrainer,
    context: StepContext,
    save: Callable[[Path, dict[str, torch.Tensor] | None], None],
    *,
    prepare: Callable[[], object] | None = None,
    **options: Any,
) -> None:
    """Publish the best checkpoint as ``<name>-best`` if one is kept. ``save(folder, gathered weights)`` writes its files.

    ``prepare`` is called before that, when the model has the weights of the checkpoint. ``options`` are those of ``context.publish``.
    """
    with best_weights(trainer) as metrics:
        if metrics is None:
            return
        if prepare is not None:
            prepare()
        weights = gathered_weights(trainer)
        context.publish(lambda folder: save(folder, weights), metrics=metrics, name=f"{context.name}-best", **options)


def publish_trained(
    trainer: StepTrainer,
    context: StepContext,
    model: TransformersModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    rows: Sequence[Sequence[int]],
    metrics: Mapping[str, object],
    **options: Any,
) -> ModelRecord:
    """Publish a trained transformers model and its tokenizer, and before it the best checkpoint as in ``publish_best``.

    The saved model is compared with the model in memory on ``rows`` of token ids. ``options`` are those of ``context.publish``.
    """

    def save(folder: Path, weights: dict[str, torch.Tensor] | None) -> None:
        save_model(model, tokenizer, folder, state_dict=weights, rows=rows)

    publish_best(trainer, context, save, **options)
    weights = gathered_weights(trainer)
    return context.publish(lambda folder: save(folder, weights), metrics=dict(metrics), **options)


def gathered_weights(trainer: StepTrainer) -> dict[str, torch.Tensor] | None:
    """All weights, if they are sharded over processes (FSDP, ZeRO); None if the model has them. Call it on every process."""
    if trainer.is_deepspeed_enabled:
        return trainer.accelerator.get_state_dict(trainer.model_wrapped)
    return unsharded_state_dict(trainer.model)
