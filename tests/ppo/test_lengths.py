"""No network of PPO gets more tokens than it can read: prompts are left out, and a value network does not start from a shorter model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from stages.errors import ModelError
from stages.models.heads import RewardModel
from stages.ppo.data import load_prompts, longest_sequence
from stages.ppo.roles import load_roles

WORDS = "joy and warm and bright and honest and fine"


@pytest.fixture
def short_reward(tmp_path: Path, tiny_tokenizer: Any) -> Path:
    """A reward model with the policy's tokenizer that reads 16 tokens, while the policy reads 128."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=len(tiny_tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=16, pad_token_id=1)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tiny_tokenizer.save_pretrained(tmp_path / "gpt2")
    RewardModel.from_language_model(str(tmp_path / "gpt2"), dtype=torch.float32).save(tmp_path / "reward")
    return tmp_path / "reward"


def prompts_file(folder: Path, *texts: str) -> str:
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return str(folder / "prompts.jsonl")


@pytest.fixture
def step(ppo_config: Any, step_context: Any, resolve_folder: Any, tiny_llama_folder: Path, short_reward: Path, tmp_path: Path) -> Any:
    """step(text, **fields) -> (config, context) of a step with one prompt, the short reward model and 4 new tokens."""

    def make(text: str, **fields: Any) -> tuple[Any, Any]:
        config = ppo_config(
            data=prompts_file(tmp_path, text), generation={"max_new_tokens": 4}, reward=[{"model": "short"}], **{"value": None, **fields}
        )
        policy = resolve_folder(tiny_llama_folder)
        models = {"policy": policy, "reward[0].model": resolve_folder(short_reward), "value": resolve_folder(short_reward)}
        return config, step_context(models={**models, "reference": policy})

    return make


def said(context: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(context.runtime.console, "print", lambda text="", **_: lines.append(str(text)))
    return lines


def test_a_value_network_starts_from_a_reward_model_that_reads_prompt_and_completion(step: Any, tiny_tokenizer: Any) -> None:
    config, context = step("joy")
    roles = load_roles(config, context)
    assert roles.value is not None and roles.value.config.model_type == "gpt2"
    # by hand: the tokens of the prompt, and 4 new ones
    needed = len(tiny_tokenizer("joy")["input_ids"]) + 4
    assert longest_sequence(config, roles.policy.model.config, tiny_tokenizer) in (needed, needed + 1)  # a template may add a space
    assert needed + 1 <= 16


def test_value_network_does_not_start_from_a_model_that_reads_less_and_this_is_logged(step: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config, context = step(WORDS)
    lines = said(context, monkeypatch)
    roles = load_roles(config, context)
    assert roles.value is not None and roles.value.config.model_type == "llama"
    assert float(roles.value.score_head.weight.detach().abs().max()) == 0  # a copy of the policy with a head of zeros
    assert any("reads at most 16 tokens" in line and "it is not used as initial value network" in line for line in lines)


def test_reward_model_with_another_vocabulary_does_not_start_the_value_network_and_this_is_logged(
    step: Any, short_reward: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = transformers.AutoTokenizer.from_pretrained(short_reward)
    other.add_tokens(["another"])
    other.save_pretrained(short_reward)
    config, context = step("joy")
    lines = said(context, monkeypatch)
    roles = load_roles(config, context)
    assert roles.value is not None and roles.value.config.model_type == "llama"
    assert any("has a different vocabulary than the policy; it is not used as initial value network" in line for line in lines)


def test_named_value_model_that_reads_less_is_refused(step: Any) -> None:
    with pytest.raises(ModelError, match="reads at most 16 tokens, but a prompt with its completion has up to"):
        load_roles(*step(WORDS, value="short"))


def test_prompts_are_limited_to_what_policy_and_tokenizer_can_read(step: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config, context = step("joy", value="policy", max_prompt_tokens=500)
    roles = load_roles(config, context)
    roles.tokenizer.model_max_length = 9  # below the policy's 128 positions: 9 - 4 new tokens leave 5
    prompts_file(Path(config.data[0].path).parent, "joy", WORDS)
    lines = said(context, monkeypatch)
    kept = load_prompts(config, context, roles.policy.model, roles.tokenizer)
    assert [one.prompt for one in kept] == ["joy"]
    assert any("left out 1 of 2 prompts longer than 5 tokens" in line for line in lines)
