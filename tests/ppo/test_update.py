"""The update against a slow reference, for any split into microbatches; ratio 1 at the first minibatch; PPO-ptx; failures."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stages.errors import TrainingError
from stages.ppo.data import load_pretraining_rows
from stages.ppo.roles import load_roles
from stages.ppo.update.targets import targets
from stages.ppo.update.totals import means, value_metrics
from stages.training.checkpoints import trainable
from tests.ppo.conftest import make_updater


def test_explained_variance_of_an_iteration_ignores_minibatches_with_equal_returns() -> None:
    # two states with the returns 0 and 2 and a mean squared error of 0.5; two with the returns 1 and 1 and an error of 0.1
    sums = [
        {"states": 2, "value_loss": 0, "values": 0, "error": error, "returns": 2, "returns_squared": squared}
        for error, squared in ((1, 4), (0.2, 2))
    ]
    first, second = (value_metrics(one) for one in sums)
    assert second["value/explained_variance"] == pytest.approx(1 - 0.1 / 1e-8)
    made = means([first, second])
    assert made["value/explained_variance"] == pytest.approx(1 - (0.5 + 0.1) / (1 + 0))
    assert made["value/returns_variance"] == pytest.approx((1 + 0) / 2)


def gradients(roles: Any) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": parameter.grad.clone()
        for name, network in roles.networks().items()
        for key, parameter in trainable(network).items()
        if parameter.grad is not None
    }


def move_policy(roles: Any) -> None:
    """Change the policy as some optimizer steps would. Otherwise every ratio is 1 and no clip is active."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for network in roles.networks().values():
            for parameter in trainable(network).values():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


def slow_loss(roles: Any, rollout: Any, target: Any, config: Any) -> torch.Tensor:
    """PPO's loss by episode and token, in plain Python on full sequences: slow, but easy to verify."""
    policy_loss, value_loss, count, num_states = 0.0, 0.0, 0, 0

    def value_term(value: torch.Tensor, old: torch.Tensor, aim: torch.Tensor) -> torch.Tensor:
        near = old + (value - old).clamp(-config.clip.value, config.clip.value)
        return 0.5 * torch.max((value - aim) ** 2, (near - aim) ** 2)

    for row in range(len(rollout.prompts)):
        prompt, response = rollout.prompt_ids[row], rollout.response(row)
        ids = torch.tensor([prompt + response])
        logits = roles.policy.model(input_ids=ids).logits[0] / config.generation.temperature
        values = roles.value.score_tokens(ids, torch.ones_like(ids))[0]
        for step, token in enumerate(response):
            position = len(prompt) - 1 + step
            logprob = logits[position].log_softmax(-1)[token]
            ratio = torch.exp(logprob - rollout.rollout_logprobs[row, step])
            advantage = target.advantages[row, step]
            unclipped, clipped = ratio * advantage, ratio.clamp(1 - config.clip.ratio, 1 + config.clip.ratio) * advantage
            policy_loss = policy_loss - torch.min(unclipped, clipped)
            value_loss = value_loss + value_term(values[position], rollout.values[row, step], target.returns[row, step])
            count += 1
        num_states += len(response)
        if rollout.bootstrap_mask[row]:  # the state after the last token
            value_loss = value_loss + value_term(values[-1], rollout.bootstrap_values[row], target.bootstrap_returns[row])
            num_states += 1
    return policy_loss / count + config.value_coef * value_loss / num_states


@pytest.mark.detail("P27")
@pytest.mark.parametrize(("temperature", "placement"), [(1.0, "last_token"), (0.7, "last_token"), (1.0, "after")])
def test_gradients_equal_the_slow_reference_for_any_microbatch(ppo_config, ppo_context, make_rollout, temperature, placement) -> None:
    generation = {"max_new_tokens": 10, "temperature": temperature, "stop": list("abcdefghijklmnopqrstuvwxyz")}
    config = ppo_config(generation=generation, score_placement=placement)
    roles = load_roles(config, ppo_context)
    rollout = make_rollout(roles, config)
    assert len(set(rollout.lengths.tolist())) > 1, "the test wants ragged responses"
    assert rollout.bootstrap_mask.tolist() == [placement == "after" and length < 10 for length in rollout.lengths.tolist()]
    target = targets(rollout, config, kl_coef=0.1)
    move_policy(roles)
    slow_loss(roles, rollout, target, config).backward()
    expected = gradients(roles)
    for microbatch in (1, 5, 12):
        for network in roles.networks().values():
            network.zero_grad()
        updater = make_updater(roles, config.model_copy(update={"microbatch_size": microbatch}))
        updater.accumulate(rollout, target)
        actual = gradients(roles)
        assert actual.keys() == expected.keys()
        for name, gradient in actual.items():
            # fp32 sums in another order
            torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_first_minibatch_has_ratio_one_and_no_kl(ppo_config, ppo_context, make_rollout) -> None:
    for settings in (
        {},
        {"generation": {"max_new_tokens": 10, "temperature": 0.7}},
        {"value": "shared"},
        {"rollout_logprobs": "recomputed"},
    ):
        config = ppo_config(**settings)
        roles = load_roles(config, ppo_context)
        roles.policy.model.train()  # dropout of the config must stay off
        rollout = make_rollout(roles, config)
        assert rollout.kl.abs().max() < 1e-5
        result = make_updater(roles, config).update(rollout, kl_coef=0.1, seed=0)
        assert result.metrics["policy/ratio_first_deviation"] < 1e-5
        assert rollout.sampling_gap < 1e-5


def test_padding_with_the_end_token_changes_nothing(ppo_config, ppo_context, make_rollout) -> None:
    config = ppo_config()
    results = []
    for pad in ("<|pad|>", "<|endoftext|>"):
        roles = load_roles(config, ppo_context)
        roles.tokenizer.pad_token = pad
        rollout = make_rollout(roles, config)
        make_updater(roles, config).accumulate(rollout, targets(rollout, config, kl_coef=0.1))
        results.append((rollout.completions, rollout.lengths.tolist(), gradients(roles)))
    assert results[0][:2] == results[1][:2]
    for name, gradient in results[0][2].items():
        torch.testing.assert_close(gradient, results[1][2][name])


def test_value_warmup_does_not_change_the_policy(ppo_config, ppo_context, make_rollout) -> None:
    for value in ("policy", "shared"):
        config = ppo_config(value=value)
        roles = load_roles(config, ppo_context)
        before = {name: parameter.clone() for name, parameter in roles.policy.model.named_parameters()}
        rollout = make_rollout(roles, config)
        make_updater(roles, config).update(rollout, kl_coef=0.1, seed=0, train_policy=False)
        assert all(torch.equal(parameter, before[name]) for name, parameter in roles.policy.model.named_parameters())


@pytest.mark.detail("P19")
def test_pretraining_gradient_is_added_with_its_coefficient(ppo_config, ppo_context, make_rollout, tmp_path) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("the acting was warm and the film was a joy\n" * 20)
    mix = {"data": str(corpus), "coef": 2.0, "examples_per_episode": 1, "block_size": 8}
    plain, mixed, off = ppo_config(), ppo_config(pretraining_mix=mix), ppo_config(pretraining_mix={**mix, "coef": 0.0})
    by_row = ppo_config(pretraining_mix={**mix, "coef": 2.0 / 7, "normalization": "row"})  # a row of 8 predicts 7 tokens
    by_case = {}
    for name, config in {"plain": plain, "mixed": mixed, "by_row": by_row, "off": off}.items():
        roles = load_roles(config, ppo_context)
        rollout = make_rollout(roles, config)
        updater = make_updater(roles, config, pretraining_rows=load_pretraining_rows(config, roles.tokenizer, ppo_context.seed))
        target = targets(rollout, config, kl_coef=0.1)
        totals = updater.accumulate(rollout, target)
        totals.read()
        loss = totals.sums.get("pretraining_loss", 0.0)
        by_case[name] = gradients(roles)
    assert all(torch.equal(by_case["plain"][name], by_case["off"][name]) for name in by_case["plain"])  # gamma = 0: to the bit
    for name, gradient in by_case["mixed"].items():
        torch.testing.assert_close(by_case["by_row"][name], gradient, rtol=1e-4, atol=1e-6)
    drawn = load_pretraining_rows(mixed, roles.tokenizer, ppo_context.seed)
    assert drawn is not None
    rows = drawn.draw(12)
    model = load_roles(mixed, ppo_context).policy.model
    expected = model(input_ids=rows, labels=rows).loss  # transformers' own mean loss per token
    assert loss == 0.0 and float(expected) > 0
    expected.backward()
    for name, parameter in trainable(model).items():
        added = by_case["mixed"][f"policy.{name}"] - by_case["plain"][f"policy.{name}"]
        torch.testing.assert_close(added, 2.0 * parameter.grad, rtol=1e-3, atol=1e-5)  # a difference of two fp32 sums


def test_a_loss_that_is_not_finite_stops_before_the_weights_change(ppo_config, ppo_context, make_rollout) -> None:
    config = ppo_config()
    roles = load_roles(config, ppo_context)
    rollout = make_rollout(roles, config)
    target = targets(rollout, config, kl_coef=0.1)
    target.advantages[0, 0] = float("nan")
    before = {name: parameter.clone() for name, parameter in roles.policy.model.named_parameters()}
    with pytest.raises(TrainingError, match="policy loss is nan.*lower training.learning_rate"):
        make_updater(roles, config).minibatch(rollout, target)
    assert all(torch.equal(parameter, before[name]) for name, parameter in roles.policy.model.named_parameters())


def test_early_stop_by_kl(ppo_config, ppo_context, make_rollout) -> None:
    for limit, steps in ((None, 8), (1e-9, 2)):  # two minibatches an epoch, four epochs
        config = ppo_config(ppo_epochs=4, target_update_kl=limit, training={"learning_rate": 1e-2})
        roles = load_roles(config, ppo_context)
        rollout = make_rollout(roles, config)
        assert make_updater(roles, config).update(rollout, kl_coef=0.1, seed=0).optimizer_steps == steps


@pytest.mark.parametrize("size", [2, 6])
def test_sums_of_a_minibatch_are_read_once_for_any_number_of_microbatches(
    ppo_config, ppo_context, make_rollout, monkeypatch, size: int
) -> None:
    config = ppo_config(minibatch_size=6, microbatch_size=size)
    roles = load_roles(config, ppo_context)
    part = make_rollout(roles, config).rows(torch.arange(6))
    target, updater = targets(part, config, kl_coef=0.1), make_updater(roles, config)
    reads: list[str] = []
    for name in ("__float__", "item"):
        plain = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda tensor, name=name, plain=plain: reads.append(name) or plain(tensor))
    updater.accumulate(part, target)
    assert len(reads) <= 2  # the counts of tokens and of states, which are on the CPU


def test_totals_are_sums_in_double_precision_and_the_largest_number() -> None:
    from stages.ppo.update.totals import Totals

    draw = torch.Generator().manual_seed(0)
    values = torch.randn(50, generator=draw) * 1e4
    totals, expected = Totals({"tokens": 0.0}), 0.0
    for value in values:
        totals.add(tokens=3, loss=value)
        totals.note(value.abs())
        expected += float(value)
    totals.note(torch.tensor(torch.nan))
    assert totals.read() == float(values.abs().max())
    assert totals.sums == {"tokens": 150.0, "loss": expected}  # to the bit
    assert Totals().read() == 0.0
