"""Publish the models of a PPO run: the policy, and optionally its best iteration and the value network."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import torch

from stages.json_types import JsonObject
from stages.models.sharding import unsharded_state_dict
from stages.training.checkpoints import trainable

if TYPE_CHECKING:
    from stages.ppo.config import PPOStepConfig
    from stages.ppo.records.checkpoint import RunKeeper
    from stages.ppo.roles import Roles
    from stages.registry.record import ModelRecord
    from stages.step import StepContext


def publish_policy(config: PPOStepConfig, context: StepContext, roles: Roles, metrics: JsonObject, name: str | None = None) -> ModelRecord:
    """Publish the current policy under the step's name or ``name``."""
    weights = unsharded_state_dict(roles.policy.model)
    return context.publish(
        lambda folder: roles.save_policy(folder, weights),
        role="language_model",
        metrics=metrics,
        base=context.models["policy"] if config.lora is not None else None,
        name=name,
    )


def publish_best(config: PPOStepConfig, context: StepContext, roles: Roles, keeper: RunKeeper) -> None:
    """Publish the policy of the iteration with the highest mean reward (score minus KL penalty) as ``<name>-best``; then restore the
    last.
    """
    best = keeper.checkpoints.best()
    if best is None:
        context.runtime.console.print(f"{context.name}: there is no intact checkpoint of the best iteration, so it is not published")
        return
    last = {name: parameter.detach().clone() for name, parameter in trainable(roles.networks()["policy"]).items()}
    keeper.load_weights(best)
    if keeper.average is not None:
        keeper.average.copy_to(roles.networks()["policy"])
    iteration = json.loads((best.path / "state.json").read_text(encoding="utf-8"))["iteration"]
    publish_policy(config, context, roles, {"total_mean": best.score, "iteration": iteration}, f"{context.name}-best")
    with torch.no_grad():
        for name, parameter in trainable(roles.networks()["policy"]).items():
            parameter.copy_(last[name])


def publish_value(config: PPOStepConfig, context: StepContext, roles: Roles) -> None:
    """Publish the value network as ``<name>-value``."""
    value, start = roles.value, roles.value_start
    assert value is not None and start is not None
    weights = unsharded_state_dict(value)
    context.publish(
        lambda folder: value.save(folder, roles.tokenizer, state_dict=weights),
        role="value_model",
        metrics={},
        base=context.models[start] if config.lora is not None else None,
        name=f"{context.name}-value",
    )
