"""The models that a PPO run leaves in the registry: the policy, and on request its best iteration and the value network."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch

from stages.models.sharding import whole_state_dict
from stages.rewards.config import reward_model_inputs
from stages.training.checkpoints import trainable

if TYPE_CHECKING:
    from stages.ppo.checkpoint import RunKeeper
    from stages.ppo.config import PPOStepConfig
    from stages.ppo.roles import Roles
    from stages.registry.record import ModelRecord
    from stages.step import StepContext


def publish_policy(
    config: PPOStepConfig, context: StepContext, roles: Roles, metrics: dict[str, Any], name: str | None = None
) -> ModelRecord:
    """The policy as it is, under the step's name or ``name``."""
    weights = whole_state_dict(roles.policy.model)
    return context.publish(
        lambda folder: roles.save_policy(folder, weights),
        role="language_model",
        metrics=metrics,
        base=context.models["policy"] if config.lora is not None else None,
        name=name,
    )


def publish_best(config: PPOStepConfig, context: StepContext, roles: Roles, keeper: RunKeeper) -> None:
    """The policy of the iteration with the highest mean reward (score less KL penalty), as ``<name>-best``; the last one stays in place."""
    best = keeper.checkpoints.best()
    if best is None:
        context.runtime.console.print(f"{context.name}: no whole checkpoint of a best iteration is left; none is published")
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
    """The value network, as ``<name>-value``."""
    value = roles.value
    assert value is not None
    places = [place for place in ("value", *reward_model_inputs(config.reward, "reward")) if place in context.models]
    base = context.models[places[0]] if places else context.models["policy"]
    weights = whole_state_dict(value)
    context.publish(
        lambda folder: value.save(folder, roles.tokenizer, state_dict=weights),
        role="value_model",
        metrics={},
        base=base if config.lora is not None else None,
        name=f"{context.name}-value",
    )
