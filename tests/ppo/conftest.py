"""Roles, rollouts and a step context around the tiny Llama, made without a chain."""

from __future__ import annotations

import json
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.ppo.config import PPOStepConfig
from stages.ppo.update.optimizers import make_optimizer
from stages.ppo.update.updater import Updater
from stages.training.checkpoints import trainable

# A random model samples its 300 tokens with similar probabilities: with 62 stop tokens, responses differ in length.
LETTERS = list(string.ascii_letters + string.digits)
PROMPTS = [
    "write a happy line",
    "the film",
    "a fine film with a bright and honest story about the music",
    "plot",
    "joy and warm",
    "the ending was",
]


@pytest.fixture(autouse=True)
def _reward_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    """A file of twelve prompts."""
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{word} {n}"}) + "\n" for n in range(4) for word in ("film", "a plot", "the music")))
    return str(path)


@pytest.fixture
def ppo_config() -> Callable[..., PPOStepConfig]:
    """ppo_config(**fields) -> a small PPO step in fp32."""

    def make(**fields: Any) -> PPOStepConfig:
        settings = {
            "name": "aligned",
            "policy": "policy",
            "precision": "fp32",
            "value": "policy",
            "reward": [{"function": "letters_reward:letters"}],
            "data": "unused",
            "generation": {"max_new_tokens": 10, "stop": LETTERS},
            "total_episodes": 24,
            "rollout_batch_size": 12,
            "minibatch_size": 6,
            "microbatch_size": 4,
            "ppo_epochs": 2,
            "training": {"learning_rate": 1e-3},
            "checkpoint_seconds": 0.0,
        }
        return PPOStepConfig.model_validate({**settings, **fields})

    return make


@pytest.fixture
def ppo_context(tiny_llama_folder: Path, step_context: Any, resolve_folder: Any) -> Any:
    """A step context whose policy is the tiny Llama."""
    return step_context(models={"policy": resolve_folder(tiny_llama_folder)})


@pytest.fixture
def make_rollout() -> Any:
    """make_rollout(roles, config) -> one collected rollout of twelve episodes."""
    from stages.corpora.templates import encode_prompt
    from stages.ppo.rollout.collecting import collect
    from stages.ppo.rollout.episodes import Episodes
    from stages.rewards.function import FunctionSource
    from stages.rewards.source import CombinedReward

    def make(roles: Any, config: PPOStepConfig, seed: int = 0) -> Any:
        prompts = (PROMPTS * 2)[: config.rollout_batch_size]
        ids = [encode_prompt(roles.tokenizer, prompt) for prompt in prompts]
        reward = CombinedReward([(FunctionSource("letters", "letters_reward:letters"), 1.0)])
        torch.manual_seed(seed)
        episodes = Episodes(prompts, ids, [seed * 100 + row for row in range(len(ids))])
        return collect(roles, reward, CombinedReward([]), episodes, config)

    return make


def make_updater(roles: Any, config: Any, **options: Any) -> Updater:
    """An updater with new optimizers of the config."""
    optimizers = {name: make_optimizer(list(trainable(network).values()), config.training) for name, network in roles.networks().items()}
    return Updater(roles, optimizers, config, **options)
