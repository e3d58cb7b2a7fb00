"""Tristage: a language model from raw to aligned in three chained stages (SFT, reward model, PPO), based on transformers.

    import stages

    results = stages.run("quickstart", {"aligned.kl.coef": 0.1})
    model = stages.PPO(policy=(model, tokenizer), reward=my_function, data=prompts, total_episodes=512).train()

Importing this package is fast: names are imported on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stages.api.results import Model, Results
    from stages.api.running import run
    from stages.api.steps import DPO, PPO, SFT, Evaluation, Pretraining, RewardModel, SentimentClassifier
    from stages.errors import StagesError
    from stages.registry.ledger import Registry

__version__ = "0.1.0"

_MODULES = {
    "run": "api.running",
    "Model": "api.results",
    "Results": "api.results",
    **dict.fromkeys(("DPO", "PPO", "SFT", "Evaluation", "Pretraining", "RewardModel", "SentimentClassifier"), "api.steps"),
    "Registry": "registry.ledger",
    "StagesError": "errors",
}
__all__ = [
    "DPO",
    "PPO",
    "SFT",
    "Evaluation",
    "Model",
    "Pretraining",
    "Registry",
    "Results",
    "RewardModel",
    "SentimentClassifier",
    "StagesError",
    "run",
]


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module 'stages' has no attribute {name!r}; it has {', '.join(__all__)}")

    return getattr(import_module(f"stages.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
