"""Our functions return the papers' numbers, and a wrong function fails its case."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.ppo.config import PPOOptimizer
from stages.ppo.update.optimizers import WeightAverage, make_optimizer
from stages.rl.gae import gae
from stages.rl.kl import AdaptiveKLController
from stages.rl.logprobs import entropy, token_logprobs
from stages.rl.losses import policy_terms, value_terms
from stages.rl.masking import masked_mean, scale_to_unit_variance, whiten
from stages.rl.ranking import best_of_losses, ranking_loss
from stages.rl.shaping import penalize_missing_eos, shape_rewards

_spec = importlib.util.spec_from_file_location("conformance_cases", Path(__file__).with_name("cases.py"))
assert _spec is not None and _spec.loader is not None
cases = importlib.util.module_from_spec(_spec)
__import__("sys").modules["conformance_cases"] = cases  # dataclasses look up their module by name
_spec.loader.exec_module(cases)


def _adam(gradient: float, epsilon: float, style: str = "tensorflow") -> float:
    weight = torch.tensor([0.0], requires_grad=True)
    optimizer = make_optimizer([weight], PPOOptimizer(learning_rate=1.0, adam_style=style, adam_epsilon=epsilon))
    weight.grad = torch.tensor([gradient])
    optimizer.step()
    return -weight.item()


def _adaptive(kl_coef: float, kl: float, episodes: int) -> float:
    controller = AdaptiveKLController(kl_coef, target=6.0, horizon=10_000)
    controller.update(kl, episodes)
    return controller.value


def _ranking(prompts: Any) -> float:
    scores = torch.tensor([score for prompt in prompts for score in prompt])
    ranks = torch.tensor([rank for prompt in prompts for rank in range(len(prompt))])
    index = torch.tensor([row for row, prompt in enumerate(prompts) for _ in prompt])
    return ranking_loss(scores, ranks, index).item()


def _average(average: float, weight: float, decay: float, times: int) -> float:
    model = torch.nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(average)
    kept = WeightAverage(model, decay)
    model.weight.data.fill_(weight)
    for _ in range(times):
        kept.update(model)
    return kept.weights["weight"].item()


def _head(width: int) -> float:
    """The standard deviation of many heads of one width, drawn as in RewardModel.from_language_model."""
    from transformers import LlamaConfig, LlamaModel

    from stages.models.heads import RewardModel

    backbone = LlamaModel(LlamaConfig(vocab_size=8, hidden_size=width, intermediate_size=8, num_hidden_layers=0, num_attention_heads=1))
    made = RewardModel(backbone)
    made.draw_head(seed=0)
    drawn = [made.score_head.weight.detach().clone()]
    for seed in range(1, 40):
        made.draw_head(seed=seed)
        drawn.append(made.score_head.weight.detach().clone())
    return torch.cat(drawn).std().item()


def _response_mask(ids: torch.Tensor, end: int) -> torch.Tensor:
    """Generation stops a row at its first end token; here with a model that says the given tokens one after another."""
    from types import SimpleNamespace

    from transformers import LlamaConfig, LlamaForCausalLM

    from stages.config import GenerationSettings
    from stages.sampling.generation import generate

    class Says(LlamaForCausalLM):
        said: list[int] = []

        def forward(self, **_: Any) -> Any:  # type: ignore[override]
            return SimpleNamespace(logits=torch.nn.functional.one_hot(torch.tensor([[self.said.pop(0)]]), 8).float() * 50)

    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    masks = []
    for row in ids.tolist():
        model = Says(config)
        model.said = list(row)
        settings = GenerationSettings(max_new_tokens=len(row), temperature=0.0)
        mask = generate(model, [[1]], settings, seeds=[0], stop_ids=[end], pad_token_id=7).response_mask
        masks.append(torch.nn.functional.pad(mask, (0, len(row) - mask.shape[1]))[0])
    return torch.stack(masks)


OURS = cases.Implementation(
    name="stages",
    whiten=whiten,
    scale=scale_to_unit_variance,
    gae=lambda rewards, values, mask, gamma, lam: gae(rewards, values, mask, gamma=gamma, gae_lambda=lam),
    policy_loss=lambda ratio, advantages, mask: masked_mean(
        policy_terms(ratio.log(), torch.zeros_like(ratio), advantages, clip_range=0.2), mask
    ),
    value_loss=lambda values, old, returns, mask: masked_mean(value_terms(values, old, returns, clip_range=0.2), mask),
    adaptive_kl=_adaptive,
    adam=_adam,
    penalize=lambda scores, stopped: penalize_missing_eos(scores, stopped, how="replace", penalty=1.0),
    ranking_loss=_ranking,
    best_of=lambda scores, best: best_of_losses(torch.tensor(scores), torch.arange(len(scores)) != best, torch.zeros(len(scores))).item(),
    response_mask=_response_mask,
    logprobs=lambda logits, tokens, temperature: token_logprobs(logits, tokens, temperature=temperature),
    mean_entropy=lambda logits, mask: masked_mean(entropy(logits), mask).item(),
    average=_average,
    reward_head_std=_head,
    rewards=lambda scores, log_ratio, mask, kl_coef: shape_rewards(scores, log_ratio, mask, kl_coef=kl_coef),
)


@pytest.mark.detail("G5", "P3", "P5", "P6", "P8", "P9", "P11", "P12", "P18", "P21", "P23", "P25", "P34", "R1", "R2", "R5", "R10")
@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: f"{case.detail}-{case.needs}")
def test_function_returns_the_published_number(case: Any) -> None:
    actual = case.run(getattr(OURS, case.needs))
    assert cases.difference(actual, case.expected) <= case.tolerance, f"{case.what}: {actual}, expected {case.expected}"


def test_torchs_adam_differs_from_tensorflows() -> None:
    assert _adam(1e-5, 1e-5, style="torch") == pytest.approx(0.5, rel=1e-3)  # 1e-5 / (1e-5 + 1e-5)


def test_every_function_of_an_implementation_has_a_case() -> None:
    fields = set(cases.Implementation.__dataclass_fields__) - {"name"}
    assert {case.needs for case in cases.CASES} == fields
    assert cases.difference([1.0, 2.0], [1.0]) == math.inf and cases.difference([[1.0], [2.5]], [[1.0], [2.0]]) == 0.5
