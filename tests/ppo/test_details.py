"""Details of the papers about PPO, as in the rows of stages/conformance.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from stages.models.heads import RewardModel
from stages.ppo.data import load_prompts
from stages.ppo.loop import run
from stages.ppo.records.metrics import iteration_metrics
from stages.ppo.roles import load_roles
from stages.ppo.update.targets import targets
from tests.ppo.conftest import make_updater


@pytest.fixture
def gpt2_context(tmp_path: Path, tiny_tokenizer: Any, resolve_folder: Any, step_context: Any) -> Any:
    """A policy whose config has dropout 0.1 on residuals, attention and embeddings."""
    import transformers

    torch.manual_seed(1)
    config = transformers.GPT2Config(vocab_size=len(tiny_tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=64)
    config.eos_token_id, config.bos_token_id, config.pad_token_id = tiny_tokenizer.eos_token_id, None, tiny_tokenizer.pad_token_id
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tiny_tokenizer.save_pretrained(tmp_path / "gpt2")
    return step_context("test/gpt2", models={"policy": resolve_folder(tmp_path / "gpt2")})


@pytest.fixture
def reward_folder(tmp_path: Path, tiny_llama_folder: Path) -> Path:
    """A reward model of the policy's family."""
    RewardModel.from_language_model(str(tiny_llama_folder), dtype=torch.float32, seed=4).save(tmp_path / "rm")
    return tmp_path / "rm"


@pytest.mark.detail("G2")
def test_weights_are_fp32_while_the_forward_pass_is_half(ppo_config, ppo_context, make_rollout) -> None:
    config = ppo_config(precision="bf16", training={"learning_rate": 1e-8, "adam_style": "tensorflow"})
    roles = load_roles(config, ppo_context)
    updater = make_updater(roles, config)
    for optimizer in updater.optimizers.values():
        assert {parameter.dtype for group in optimizer.param_groups for parameter in group["params"]} == {torch.float32}
    with roles.policy.precision():
        ids = torch.tensor([[5, 6, 7]])
        assert roles.policy.model(input_ids=ids).logits.dtype == torch.bfloat16
    # a thousand steps of 1e-8 add up; in bf16 (or fp16) each of them would be rounded to 0
    weight = torch.full((1,), 0.01, requires_grad=True)
    halves = weight.detach().bfloat16()
    optimizer = torch.optim.SGD([weight], lr=1e-8)
    for _ in range(1000):
        weight.grad = torch.ones(1)
        optimizer.step()
        halves -= 1e-8
    # fp32 numbers here are 9.3e-10 apart, so a step of 1e-8 is rounded by at most 5 %
    assert weight.item() == pytest.approx(0.01 - 1e-5, abs=6e-7) and halves.item() == torch.tensor(0.01).bfloat16().item()


@pytest.mark.detail("G6")
def test_a_prompt_of_1001_tokens_is_left_out_and_not_cut(ppo_config, ppo_context, tmp_path, monkeypatch) -> None:
    path = tmp_path / "prompts.jsonl"
    texts = {length: "x" * length for length in (999, 1000, 1001)}  # x is one token here, and "xx" two
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts.values()))
    config = ppo_config(data=str(path), max_prompt_tokens=1000)
    roles = load_roles(config, ppo_context)
    roles.policy.model.config.max_position_embeddings = 2000  # the limit of the step applies here
    kept = load_prompts(config, ppo_context, roles.policy.model, roles.tokenizer)
    assert [(len(ids), prompt) for prompt, ids, _ in kept] == [(999, texts[999]), (1000, texts[1000])]


@pytest.mark.detail("G12")
def test_dropout_is_off_everywhere(ppo_config, gpt2_context, make_rollout) -> None:
    config = ppo_config(generation={"max_new_tokens": 10, "stop": list("abcdefghijklmnopqrstuvwxyz")})
    roles = load_roles(config, gpt2_context)
    assert roles.policy.model.config.resid_pdrop == 0.1  # the config is unchanged for later users of the model
    ids = torch.tensor([[5, 6, 7, 8]])
    for network in (roles.policy.model, roles.value, roles.reference.model):
        network.train()
    for call in (
        lambda: roles.policy.model(input_ids=ids).logits,
        lambda: roles.reference.model(input_ids=ids).logits,
        lambda: roles.value(ids, torch.ones_like(ids)),
    ):
        assert torch.equal(call(), call())  # to the bit
    rollout = make_rollout(roles, config)
    result = make_updater(roles, config).update(rollout, kl_coef=0.1, seed=0)
    assert result.metrics["policy/ratio_first_deviation"] < 1e-5


@pytest.mark.detail("G12", "P3")
@pytest.mark.parametrize("pad", ["<|pad|>", "<|endoftext|>"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 2e-2)])
def test_the_first_minibatch_has_ratio_one_and_no_kl(
    ppo_config, ppo_context, gpt2_context, make_rollout, pad, family, precision, tolerance
) -> None:
    # A row's log-probabilities depend a little on the other rows of the batch: bf16 has eight bits of mantissa. In fp32 it is 1e-6.
    config = ppo_config(precision=precision, ppo_epochs=1)
    roles = load_roles(config, ppo_context if family == "llama" else gpt2_context)
    roles.tokenizer.pad_token = pad
    rollout = make_rollout(roles, config)
    assert len(set(rollout.lengths.tolist())) > 1 and len({len(ids) for ids in rollout.prompt_ids}) > 1, "ragged on both sides"
    assert rollout.kl.abs().max() < tolerance
    result = make_updater(roles, config).update(rollout, kl_coef=0.1, seed=0)
    assert result.metrics["policy/ratio_first_deviation"] < tolerance
    assert result.metrics["policy/log_ratio_first_rms"] < tolerance


@pytest.mark.detail("P3")
def test_rewards_add_up_to_the_score_and_their_kl_is_the_rollouts(ppo_config, ppo_context, make_rollout) -> None:
    config = ppo_config(ppo_epochs=4, training={"learning_rate": 1e-2}, whiten_advantages=False)
    roles = load_roles(config, ppo_context)
    with torch.no_grad():
        roles.policy.model.get_output_embeddings().weight.add_(
            0.3 * torch.randn(roles.policy.model.get_output_embeddings().weight.shape, generator=torch.Generator().manual_seed(5))
        )
    rollout = make_rollout(roles, config)
    assert rollout.kl.abs().max() > 0.1
    target = targets(rollout, config, kl_coef=0.3)
    torch.testing.assert_close(target.rewards.sum(dim=1) + 0.3 * rollout.kl.sum(dim=1), rollout.scores, rtol=1e-5, atol=1e-5)
    # four epochs change the policy; the penalty is still that of the rollout, because targets depend only on the rollout
    make_updater(roles, config).update(rollout, kl_coef=0.3, seed=0)
    again = targets(rollout, config, kl_coef=0.3)
    assert torch.equal(again.rewards, target.rewards) and torch.equal(again.returns, target.returns)


@pytest.mark.detail("P7", "P8")
def test_returns_come_before_the_whitening(ppo_config, ppo_context, make_rollout) -> None:
    roles = load_roles(ppo_config(), ppo_context)
    rollout = make_rollout(roles, ppo_config())
    plain, whitened = (targets(rollout, ppo_config(whiten_advantages=on), kl_coef=0.1) for on in (False, True))
    assert torch.equal(plain.returns, whitened.returns)
    mask = rollout.response_mask
    torch.testing.assert_close(plain.returns[mask], (plain.advantages + rollout.values)[mask])
    counted = whitened.advantages[mask].double()
    assert abs(counted.mean()) < 1e-6 and counted.var(correction=0).item() == pytest.approx(1, abs=1e-4)
    assert (whitened.advantages[~mask] == 0).all()


@pytest.mark.detail("P10")
def test_whitening_by_minibatch_needs_eight_episodes(ppo_config, ppo_context, make_rollout) -> None:
    with pytest.raises(ValidationError, match="minibatch_size >= 8"):
        ppo_config(whitening_scope="minibatch", rollout_batch_size=14, minibatch_size=7)
    config = ppo_config(whitening_scope="minibatch", rollout_batch_size=12, minibatch_size=12, ppo_epochs=1, microbatch_size=12)
    roles = load_roles(config, ppo_context)
    rollout = make_rollout(roles, config)
    seen: list[Any] = []
    updater = make_updater(roles, config)
    original = updater.minibatch
    updater.minibatch = lambda part, target, **options: (seen.append((part, target)), original(part, target, **options))[1]  # type: ignore[method-assign]
    updater.update(rollout, kl_coef=0.1, seed=0)
    part, target = seen[0]
    assert abs(float(target.advantages[part.response_mask].mean())) < 1e-5


@pytest.mark.detail("P13")
def test_value_network_is_separate_and_starts_from_the_reward_model(
    ppo_config, step_context, resolve_folder, tiny_llama_folder, reward_folder, make_rollout
) -> None:
    models = {"policy": resolve_folder(tiny_llama_folder), "reward[0].model": resolve_folder(reward_folder)}
    config = ppo_config(value=None, reward=[{"model": "preference"}])
    roles = load_roles(config, step_context(models=models))
    rollout = make_rollout(roles, config)
    reward = RewardModel.from_pretrained(str(reward_folder), dtype=torch.float32)
    for row in range(4):
        ids = torch.tensor([rollout.prompt_ids[row] + rollout.response(row)])
        with torch.no_grad():
            value = roles.value(ids, torch.ones_like(ids))[0, -1]
        torch.testing.assert_close(value, reward.score(ids, torch.ones_like(ids)).detach()[0])
    # the value loss has no gradient in the policy, and the policy's loss has none in the value network
    updater = make_updater(roles, config)
    target = targets(rollout, config, kl_coef=0.1)
    zero = type(target)(target.rewards, torch.zeros_like(target.advantages), target.returns + 1, target.bootstrap_returns)
    updater.accumulate(rollout, zero)
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in roles.policy.model.parameters())
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in roles.value.parameters())


@pytest.mark.detail("P14")
def test_a_shared_head_begins_with_values_of_zero(ppo_config, ppo_context, make_rollout) -> None:
    config = ppo_config(value="shared")
    roles = load_roles(config, ppo_context)
    rollout = make_rollout(roles, config)
    assert roles.value is None and not rollout.values.any()
    make_updater(roles, config).update(rollout, kl_coef=0.1, seed=0)
    assert make_rollout(roles, config).values.any()  # and learns


@pytest.mark.detail("P19")
def test_a_coefficient_of_zero_is_plain_ppo_to_the_bit(
    ppo_config, step_context, resolve_folder, tiny_llama_folder, tmp_path, prompts
) -> None:
    from safetensors.torch import load_file

    corpus = tmp_path / "corpus.txt"
    corpus.write_text("the acting was warm and the film was a joy\n" * 20)
    models, data = {"policy": resolve_folder(tiny_llama_folder)}, prompts
    mix = {"data": str(corpus), "coef": 0.0, "examples_per_episode": 1, "block_size": 8}
    made = []
    for name, fields in (("plain", {}), ("off", {"pretraining_mix": mix}), ("on", {"pretraining_mix": {**mix, "coef": 1.0}})):
        config = ppo_config(data=data, total_episodes=12, ppo_epochs=1, **fields)
        result = run(config, step_context(f"test/{name}", 3, models))
        made.append(load_file(next(result.model.path.glob("*.safetensors"))))
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])
    assert not all(torch.equal(made[0][name], made[2][name]) for name in made[0])


@pytest.mark.detail("P20")
def test_pretraining_mix_halves_the_loss_increase(ppo_config, step_context, resolve_folder, tiny_llama_folder, tmp_path, prompts) -> None:
    """A small alignment tax: a reward makes a model forget a text that it knows. With PPO-ptx, it forgets less than half as much."""
    from stages.models.loading import load_language_model, load_tokenizer
    from stages.models.passes.likelihood import measure_likelihood
    from stages.models.saving import save_model

    sentence = "the acting was warm and the film was a joy\n"
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(sentence * 40)
    tokenizer = load_tokenizer(str(tiny_llama_folder))
    model = load_language_model(str(tiny_llama_folder), dtype=torch.float32)
    ids = tokenizer(sentence * 2)["input_ids"]
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(40):
        model(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    save_model(model, tokenizer, tmp_path / "base")

    def loss(folder: Path) -> float:
        trained = load_language_model(str(folder), dtype=torch.float32, trainable=False)
        rows = [(ids, [1] * len(ids))]
        return measure_likelihood(trained, rows, pad_token_id=1, batch_size=1, device=torch.device("cpu"), dtype=torch.float32).loss

    before = loss(tmp_path / "base")
    models, data = {"policy": resolve_folder(tmp_path / "base")}, prompts
    settings = {
        "data": data,
        "reward": [{"function": "letters_reward:vowels"}],
        "total_episodes": 6 * 24,
        "rollout_batch_size": 24,
        "minibatch_size": 24,
        "microbatch_size": 24,
        "kl_coef": 0.0,
        "generation": {"max_new_tokens": 8},
        "value": "shared",
        "training": {"learning_rate": 4e-3, "schedule": "constant"},
    }
    mix = {"data": str(corpus), "coef": 27.8, "examples_per_episode": 1, "block_size": 16}
    rise = {
        name: loss(run(ppo_config(**settings, pretraining_mix=given), step_context(f"test/{name}", 3, models)).model.path) - before
        for name, given in (("plain", None), ("ptx", mix))
    }
    assert rise["plain"] > 0.5 and rise["ptx"] < 0.5 * rise["plain"]


@pytest.mark.detail("P21", "P22")
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_recomputed_logprobs_are_the_samplers(ppo_config, ppo_context, make_rollout, temperature) -> None:
    config = ppo_config(generation={"max_new_tokens": 10, "temperature": temperature}, rollout_logprobs="recomputed")
    assert (config.generation.top_k, config.generation.top_p) == (0, 1.0)  # pure sampling
    roles = load_roles(config, ppo_context)
    assert make_rollout(roles, config).sampling_gap < 1e-4
    other = load_roles(ppo_config(generation={"max_new_tokens": 10, "temperature": temperature * 0.9}), ppo_context)
    rollout = make_rollout(roles, config)
    for row in range(3):
        batch = _batch(roles, rollout, row)
        with torch.no_grad():
            assert (other.policy.logprobs(batch) - roles.policy.logprobs(batch)).abs().max() > 1e-3  # a wrong temperature is detected
            torch.testing.assert_close(roles.reference_logprobs(batch), roles.policy.logprobs(batch))  # the same for the reference


def _batch(roles: Any, rollout: Any, row: int) -> Any:
    from stages.models.passes.responses import sequence_batch

    return sequence_batch([rollout.prompt_ids[row]], [rollout.response(row)], roles.tokenizer.pad_token_id, "cpu")


@pytest.mark.detail("P23", "P28")
def test_tokens_after_the_end_are_not_counted(ppo_config, ppo_context, make_rollout) -> None:
    """Sampling stops at the end token. The papers continue and mask the later tokens; values and log-probabilities before are the same."""
    config = ppo_config()
    roles = load_roles(config, ppo_context)
    rollout = make_rollout(roles, config)
    torch.nn.init.normal_(roles.value.score_head.weight, generator=torch.Generator().manual_seed(0))
    row = int(rollout.stopped.long().argmax())
    prompt, response = rollout.prompt_ids[row], rollout.response(row)
    on_and_on = torch.tensor([prompt + response + [33, 44, 55]])
    short = torch.tensor([prompt + response])
    with torch.no_grad():
        long_values = roles.value(on_and_on, torch.ones_like(on_and_on))[0, : short.shape[1]]
        torch.testing.assert_close(long_values, roles.value(short, torch.ones_like(short))[0])
    # garbage after the end changes no reward, advantage, whitening or metric
    spoiled = {name: getattr(rollout, name).clone() for name in ("rollout_logprobs", "reference_logprobs", "values")}
    for tensor in spoiled.values():
        tensor[~rollout.response_mask] = 1e6
    dirty = type(rollout)(**{**vars(rollout), **spoiled})
    clean_goal, dirty_goal = targets(rollout, config, kl_coef=0.1), targets(dirty, config, kl_coef=0.1)
    for name in ("rewards", "advantages", "returns"):
        torch.testing.assert_close(getattr(dirty_goal, name), getattr(clean_goal, name))
    assert torch.equal(dirty.kl, rollout.kl)


@pytest.mark.detail("P24", "P25")
def test_truncation_at_a_token_after_a_position(ppo_config, ppo_context, make_rollout) -> None:
    """As in LMHP: 'a' ends a completion from position 4 on, but not earlier. The end token does not. The reward reads the cut text."""
    letters = ["a", "e", "i"]
    generation = {"max_new_tokens": 12, "stop": letters, "stop_after": 4, "ignore_eos": True}
    config = ppo_config(generation=generation, missing_eos="replace", missing_eos_penalty=1.0)
    roles = load_roles(config, ppo_context)
    with torch.no_grad():  # make the stop tokens, and the end token, likely
        weight = roles.policy.model.get_output_embeddings().weight
        ids = [roles.tokenizer.convert_tokens_to_ids(letter) for letter in (*letters, "<|endoftext|>")]
        weight[ids] = weight.mean(dim=0, keepdim=True)
        roles.policy.model.lm_head.weight[ids] *= 3.0
    rollouts = [make_rollout(roles, config, seed) for seed in range(6)]
    stops = set(ids[:3])
    early = short = 0
    for rollout in rollouts:
        for row in range(len(rollout.prompts)):
            response = rollout.response(row)
            positions = [position for position, token in enumerate(response) if token in stops and position >= 4]
            early += any(token in (*stops, ids[3]) for token in response[:4])
            if rollout.stopped[row]:
                assert positions == [len(response) - 1] and rollout.completions[row][-1] in letters
                assert float(rollout.scores[row]) == float(rollout.raw_scores[row])
                short += 1
            else:
                assert positions == [] and len(response) == 12 and float(rollout.scores[row]) == -1.0
            text = roles.tokenizer.decode(response, skip_special_tokens=True).strip()
            assert rollout.completions[row] == text  # the reward read the truncated text
    assert early and short


@pytest.mark.detail("P29")
def test_early_stopping_and_clipping_of_gradients_are_off_in_the_presets() -> None:
    from stages.recipe.presets import PRESETS

    for name, preset in PRESETS.items():
        if "ppo" in preset.stages:
            settings = preset.stages["ppo"]
            assert settings["kl.update_limit"].value is None and settings["training.max_grad_norm"].value is None, name
            for path, off in (("clip.dual", None), ("value_warmup_iterations", 0), ("gae.value_gae_lambda", None)):
                assert path not in settings or settings[path].value == off, f"{name}: {path}"


@pytest.mark.detail("P34")
def test_the_metrics_of_the_papers_are_there_without_padding(ppo_config, ppo_context, make_rollout) -> None:
    config = ppo_config(ppo_epochs=1, minibatch_size=12, microbatch_size=5)
    roles = load_roles(config, ppo_context)
    rollout = make_rollout(roles, config)
    target = targets(rollout, config, kl_coef=0.1)
    rollout.seconds["update"] = 1.0
    metrics = iteration_metrics(rollout, make_updater(roles, config).update(rollout, kl_coef=0.1, seed=0), config, kl_coef=0.1)
    mask = rollout.response_mask
    model = load_roles(config, ppo_context).policy.model  # as it was before the update
    with torch.no_grad():
        rows = [(len(rollout.prompt_ids[row]), torch.tensor([rollout.prompt_ids[row] + rollout.response(row)])) for row in range(12)]
        logits = torch.cat([model(input_ids=ids).logits[0, length - 1 : -1] for length, ids in rows])
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    returns, values = target.returns[mask], rollout.values[mask]
    expected = {
        "policy/kl": float(rollout.kl.sum(dim=1).mean()),
        "policy/entropy": float(entropy.mean()),
        "policy/approx_kl": 0.0,
        "policy/clip_fraction": 0.0,
        "value/clip_fraction": 0.0,
        "policy/ratio_mean": 1.0,
        "policy/ratio_variance": 0.0,
        "value/returns_mean": float(returns.mean()),
        "value/returns_variance": float(returns.var(correction=0)),
        "value/explained_variance": 1 - float(((values - returns) ** 2).mean() / returns.var(correction=0)),
        "responses/stopped_share": float(rollout.stopped.float().mean()),
        "responses/length_mean": float(mask.sum(dim=1).float().mean()),
    }
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=1e-3, abs=1e-4), name


@pytest.mark.detail("P37")
def test_a_policy_s_samples_become_labels_of_the_next_reward_model(
    ppo_config, step_context, resolve_folder, tiny_llama_folder, reward_folder, tmp_path, prompts
) -> None:
    """Reward model 1 -> policy 1 -> comparisons -> reward model 2: the lineage in the registry shows these steps."""
    from dataclasses import replace

    from stages.registry.references import ResolvedModel
    from stages.reward_model.config import RewardModelConfig
    from stages.reward_model.run import run as train_reward_model

    first = replace(resolve_folder(reward_folder), digest="sha256:reward-model-1", ref="reward-model-1")
    data = prompts
    context = step_context("test/policy", models={"policy": resolve_folder(tiny_llama_folder), "reward[0].model": first})
    policy = run(ppo_config(data=data, total_episodes=12, value=None, reward=[{"model": "reward-model-1"}]), context).model
    comparisons = tmp_path / "comparisons.jsonl"
    comparisons.write_text("".join(json.dumps({"prompt": f"p {n}", "chosen": "a joy", "rejected": "dull"}) + "\n" for n in range(8)))
    made = ResolvedModel.of_record(policy, context.models["policy"].input)
    context = step_context("test/second", models={"model": first, "collect.policies[0].model": made})
    collect = {
        "policies": [policy.ref],
        "data": data,
        "num_prompts": 4,
        "completions_per_prompt": 2,
        "judge": {"function": "letters_reward:vowels"},
        "generation": {"max_new_tokens": 6},
    }
    second = train_reward_model(
        RewardModelConfig.model_validate(
            {
                "name": "second",
                "model": "m",
                "precision": "fp32",
                "data": {"train": str(comparisons), "validation_fraction": 0.25},
                "collect": collect,
                "training": {"batch_size": 4, "microbatch_size": 4},
            }
        ),
        context,
    )
    tree = context.registry.lineage(second.model.ref)
    parents = {node["ref"]: node for node in tree["parents"]}
    assert policy.ref in parents
    assert "reward-model-1" in {node["ref"] for node in parents[policy.ref]["parents"]}


@pytest.mark.detail("P38")
def test_the_reference_may_be_another_model(ppo_config, step_context, resolve_folder, tiny_llama_folder, tmp_path, make_rollout) -> None:
    from stages.models.loading import load_language_model, load_tokenizer
    from stages.models.saving import save_model

    other = load_language_model(str(tiny_llama_folder), dtype=torch.float32, trainable=False)
    with torch.no_grad():
        other.lm_head.weight.mul_(3.0)
    save_model(other, load_tokenizer(str(tiny_llama_folder)), tmp_path / "gpt3")
    models = {"policy": resolve_folder(tiny_llama_folder), "reference": resolve_folder(tmp_path / "gpt3")}
    config = ppo_config(reference="gpt3")
    roles = load_roles(config, step_context(models=models))
    rollout = make_rollout(roles, config)
    row = 0
    prompt, response = rollout.prompt_ids[row], rollout.response(row)
    with torch.no_grad():
        logits = other(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    expected = logits.log_softmax(-1)[range(len(response)), response]
    torch.testing.assert_close(rollout.reference_logprobs[row, : len(response)], expected, rtol=1e-4, atol=1e-5)
    assert rollout.kl[row].abs().max() > 1e-2


@pytest.mark.detail("R20")
def test_the_value_network_falls_back_on_the_policy(ppo_config, ppo_context) -> None:
    roles = load_roles(ppo_config(value=None), ppo_context)  # a function is its reward
    assert roles.value is not None and not roles.value.score_head.weight.any()
