"""PPO converges to the known optimum of a bandit: the reference times exp(reward / kl_coef), normalised.

One prompt, one token, ten arms. The result is read from the published policy's probabilities, without sampling. Each of the six runs
takes some seconds, because PPO needs sixty iterations to converge.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

ARMS = [f"arm{number}" for number in range(10)]
KL_COEF = 0.5


@pytest.fixture(scope="module")
def bandit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of one layer with ten words of unequal probability."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<pad>", "</s>", "pull", *ARMS]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
        initializer_range=0.3,
    )
    folder = tmp_path_factory.mktemp("bandit")
    LlamaForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>").save_pretrained(folder)
    return folder


def probabilities(folder: Path | Any) -> torch.Tensor:
    from stages.models.loading import load_language_model

    model = load_language_model(folder, dtype=torch.float32, trainable=False)
    with torch.no_grad():
        return model(input_ids=torch.tensor([[2]])).logits[0, -1].double().softmax(-1)


def payoffs(reference: torch.Tensor) -> torch.Tensor:
    """The reward of each token of the vocabulary."""
    from letters_reward import arms

    words = ["", "", "pull", *ARMS]
    return torch.tensor(arms(["pull"] * len(words), words), dtype=torch.float64)


def expected_reward(policy: torch.Tensor, reward: torch.Tensor) -> float:
    return float((policy * reward).sum())


def kl(policy: torch.Tensor, reference: torch.Tensor) -> float:
    return float((policy * (policy / reference).log()).sum())


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("lora", [None, {"r": 8, "alpha": 32.0}], ids=["full", "lora"])
def test_ppo_converges_to_the_optimal_policy(ppo_config, step_context, resolve_folder, bandit, tmp_path, seed, lora) -> None:
    from stages.ppo.loop import run
    from stages.registry.references import ResolvedModel

    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "pull"}) + "\n")
    config = ppo_config(
        data=str(path),
        reward=[{"function": "letters_reward:arms"}],
        value="policy",
        lora=lora,
        kl_coef=KL_COEF,
        total_episodes=60 * 256,
        rollout_batch_size=256,
        minibatch_size=256,
        microbatch_size=256,
        ppo_epochs=2,
        generation={"max_new_tokens": 1, "batch_size": 256},
        training={"learning_rate": 1.5e-2 if lora is None else 2e-2, "max_grad_norm": None, "adam_beta2": 0.99},
        num_samples=0,
        checkpoint_seconds=1e9,
    )
    context = step_context(f"test/{'full' if lora is None else 'lora'}{seed}", seed, {"policy": resolve_folder(bandit)})
    context.log = lambda *_: None
    made = run(config, context).model
    reference = probabilities(str(bandit))
    reward = payoffs(reference)
    best = reference * (reward / KL_COEF).exp()
    best /= best.sum()
    trained = probabilities(ResolvedModel.of_record(made, context.models["policy"].input))
    objective = {
        name: expected_reward(policy, reward) - KL_COEF * kl(policy, reference)
        for name, policy in (("start", reference), ("best", best), ("found", trained))
    }
    # the optimum's value is kl_coef * log E_reference[exp(reward / kl_coef)]
    assert objective["best"] == pytest.approx(KL_COEF * math.log(float((reference * (reward / KL_COEF).exp()).sum())))
    # The objective is flat near its maximum: a policy that differs by a few percent in KL has almost the same objective.
    assert objective["found"] == pytest.approx(objective["best"], abs=0.02 * (objective["best"] - objective["start"]))
    assert expected_reward(trained, reward) == pytest.approx(expected_reward(best, reward), rel=0.02)
    assert kl(trained, reference) == pytest.approx(kl(best, reference), rel=0.08)
