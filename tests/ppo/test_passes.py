"""Passes of the update: packed, with kept casts, repeated when memory runs out, and without waiting for the device."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from stages.errors import MemoryExhausted, TrainingError
from stages.models.layers import compiled as compiled_layers
from stages.ppo.data import load_pretraining_rows
from stages.ppo.roles import load_roles
from stages.ppo.rollout.measuring import measure, measuring_budget
from stages.ppo.update import gradients as module
from stages.ppo.update.minibatch import Minibatch
from stages.ppo.update.targets import targets
from stages.ppo.update.updater import Updater
from stages.training.checkpoints import trainable
from tests.ppo.conftest import make_updater

KINDS: dict[str, dict[str, Any]] = {
    "a value network": {},
    "a shared head": {"value": "shared"},
    "LoRA": {"lora": {"r": 4}},
    "LoRA, a shared head": {"lora": {"r": 4}, "value": "shared"},
}


def taken_gradients(roles: Any) -> dict[str, torch.Tensor]:
    gradients = {}
    for name, network in roles.networks().items():
        for key, parameter in trainable(network).items():
            if parameter.grad is not None:
                gradients[f"{name}.{key}"] = parameter.grad.clone()
        network.zero_grad()
    return gradients


class Operations(TorchDispatchMode):
    """Counts operations by name; ``casts``: of ``weights`` to half precision."""

    def __init__(self, weights: Any = ()) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}
        self.casts, self.weights = 0, {weight.data_ptr() for weight in weights}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.counts[name] = self.counts.get(name, 0) + 1
        if name == "_to_copy" and (kwargs or {}).get("dtype") == torch.bfloat16:
            self.casts += args[0].data_ptr() in self.weights
        return func(*args, **(kwargs or {}))


def test_copies_of_weights_are_memory_that_passes_cannot_take(ppo_config, ppo_context) -> None:
    """They are freed between optimizer steps, so they do not show in the memory that is free before the size of passes is chosen."""
    roles = load_roles(ppo_config(precision="bf16"), ppo_context)
    # A layer: queries and output 32 x 32, keys and values 32 x 16, three products of 32 x 64. The head of values: 32 weights and a bias.
    layers, output = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64), len(roles.tokenizer) * 32
    assert make_updater(roles, ppo_config(precision="bf16"))._casts() == 2 * (layers + output + layers + 32 + 1)
    assert make_updater(load_roles(ppo_config(precision="fp32"), ppo_context), ppo_config())._casts() == 0


# Packing


@pytest.mark.parametrize("kind", ["a value network", "LoRA, a shared head"])
def test_packed_updates_have_the_gradients_of_padded_ones(ppo_config, ppo_context, make_rollout, kind: str) -> None:
    config = ppo_config(score_placement="after", training={"learning_rate": 1e-3, "gradient_checkpointing": True}, **KINDS[kind])
    roles = load_roles(config, ppo_context)
    rollout = make_rollout(roles, config)
    assert rollout.bootstrap_mask.any() and len(set(rollout.lengths.tolist())) > 1
    target = targets(rollout, config, kl_coef=0.1)
    updater = make_updater(roles, config)
    expected_totals = updater.accumulate(rollout, target)
    expected_totals.read()
    expected = taken_gradients(roles)
    roles.packs = True
    assert roles.kernel("policy", "value", "reference") == "padded"
    totals = updater.accumulate(rollout, target)
    totals.read()
    assert totals.sums == pytest.approx(expected_totals.sums, rel=1e-4, abs=1e-5)
    packed = taken_gradients(roles)
    assert packed.keys() == expected.keys()
    for name, gradient in packed.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_packed_measuring_equals_padded_measuring(ppo_config, ppo_context, make_rollout) -> None:
    config = ppo_config(score_placement="after", value="shared")
    roles = load_roles(config, ppo_context)
    torch.nn.init.normal_(roles.policy.value_head.weight)
    rollout = make_rollout(roles, config)
    responses = [rollout.response(row) for row in range(12)]
    measured = []
    for packs in (False, True):
        roles.packs = packs
        budget = measuring_budget(config, roles.policy.device)
        measured.append(measure(roles, rollout.prompt_ids, responses, rollout.bootstrap_mask, budget, recompute=True))
    assert measured[0].keys() == measured[1].keys() == {"reference", "values", "bootstrap", "sampled"}
    for name, numbers in measured[0].items():
        torch.testing.assert_close(measured[1][name], numbers, rtol=1e-4, atol=1e-5)


# Compiled layers


@pytest.mark.parametrize("kind", ["a value network", "LoRA"])
def test_updates_through_compiled_layers_have_the_same_gradients(ppo_config, ppo_context, make_rollout, monkeypatch, kind: str) -> None:
    """With LoRA, three roles are adapters on one backbone. Each measures in its own passes; the update has passes of two roles together."""
    monkeypatch.setattr(compiled_layers, "BACKEND", "aot_eager")  # it traces the passes, but generates no code: fast
    training = {"learning_rate": 1e-3, "gradient_checkpointing": kind == "a value network", "torch_compile": True}
    fields = {"lora": {"r": 4, "target_modules": ["q_proj"]}} if kind == "LoRA" else {}
    config = ppo_config(training=training, microbatch_size=6, **fields)
    roles = load_roles(config, ppo_context)
    roles.joins = True
    rollout = make_rollout(roles, config)
    compiler, target, updater = roles.compiler, targets(rollout, config, kl_coef=0.1), make_updater(roles, config)
    assert compiler is not None

    def computed() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, float]]:
        budget = measuring_budget(config, roles.policy.device)
        responses = [rollout.response(row) for row in range(12)]
        measured = measure(roles, rollout.prompt_ids, responses, rollout.bootstrap_mask, budget, recompute=False)
        totals = updater.accumulate(rollout, target)
        totals.read()
        return taken_gradients(roles), measured, totals.sums

    with monkeypatch.context() as patch:
        patch.setattr(compiled_layers, "_is_used", False)
        expected = computed()
    graphs = compiler.facts()["graphs"]
    results = computed()
    made = compiler.facts()["graphs"]
    assert graphs < made <= 6
    computed()  # no other graph, although the roles and their adapters take turns
    assert compiler.facts() == {**compiler.facts(), "compiled": True, "graphs": made, "reason": ""}
    assert results[2] == pytest.approx(expected[2], rel=1e-5, abs=1e-5)
    for one, other in zip(results[:2], expected[:2], strict=True):
        assert one.keys() == other.keys()
        for name, tensor in one.items():
            assert float((tensor - other[name]).norm()) <= 1e-5 * float(other[name].norm()), name


# Policy and value network together


def calls_of(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Returns the list that gets the number of tokens of each later pass through ``model``."""
    sizes: list[int] = []
    forward = model.forward

    def counted(*inputs: Any, **named: Any) -> Any:
        sizes.append(named["input_ids"].numel())
        return forward(*inputs, **named)

    monkeypatch.setattr(model, "forward", counted)
    return sizes


@pytest.mark.parametrize("packs", [False, True], ids=["padded", "packed"])
def test_one_pass_of_policy_and_value_network_has_the_gradients_of_two(
    ppo_config, ppo_context, make_rollout, monkeypatch, packs: bool
) -> None:
    training = {"learning_rate": 1e-3, "gradient_checkpointing": packs}
    config = ppo_config(score_placement="after", lora={"r": 4, "alpha": 6}, training=training)
    roles = load_roles(config, ppo_context)
    roles.packs = packs
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in roles.policy.model.named_parameters():
            if "lora_B" in name:  # neither adapter is the identity, and the two are different
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        roles.value.score_head.weight.normal_(generator=generator)
    rollout = make_rollout(roles, config)
    target = targets(rollout, config, kl_coef=0.1)
    updater = make_updater(roles, config)
    sizes = calls_of(roles.policy.decoder, monkeypatch)
    results = []
    for joins in (False, True):
        roles.joins = joins
        roles.__dict__.pop("joint_adapters", None)
        sizes.clear()
        totals = updater.accumulate(rollout, target)
        totals.read()
        results.append((list(sizes), totals.sums, updater.matmuls.take(), taken_gradients(roles)))
    (separate, sums, flops, expected), (joint, joint_sums, joint_flops, gradients) = results
    assert len(joint) == len(separate) / 2 and sum(joint) == sum(separate)
    assert joint_sums == pytest.approx(sums, rel=1e-4, abs=1e-5) and joint_flops == flops
    assert gradients.keys() == expected.keys() and all(gradient.any() for gradient in gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("kind", ["a value network", "LoRA, a shared head"])
def test_roles_without_a_common_backbone_of_adapters_have_no_joint_passes(ppo_config, ppo_context, kind: str) -> None:
    roles = load_roles(ppo_config(**KINDS[kind]), ppo_context)
    roles.joins = True
    assert roles.joint_adapters is None


def test_passes_are_joint_only_if_this_reduces_their_number(ppo_config, ppo_context, make_rollout) -> None:
    config = ppo_config(microbatch_size="auto", lora={"r": 4})
    roles = load_roles(config, ppo_context)
    assert roles.joint_adapters is None  # on a CPU
    part = make_rollout(roles, config).rows(torch.arange(6))
    roles.__dict__["joint_adapters"] = (("default",), ("value",))  # as on a GPU
    updater = make_updater(roles, config)
    episodes = Minibatch(part, targets(part, config, kl_coef=0.1), pad_token_id=1, device=torch.device("cpu"))
    tokens = sum(episodes.lengths)
    updater.budget.device, updater.budget.rows = torch.device("cuda"), None
    chosen = {}
    for share in (2.0, 1.0, 0.5):
        updater.budget.tokens = share * tokens
        chosen[share] = updater._joins(episodes, packed=True)
    assert chosen[2.0]  # one pass instead of two
    assert not chosen[1.0]  # two passes either way
    assert updater.config.microbatch_size == "auto"
    updater.config = ppo_config(microbatch_size=6, lora={"r": 4})
    updater.budget.tokens = 2.0 * tokens
    assert not updater._joins(episodes, packed=True)  # a number in the recipe limits the memory


# Casts


def test_each_weight_is_cast_once_in_an_optimizer_step_and_the_gradient_is_autocasts(ppo_config, ppo_context, make_rollout) -> None:
    config = ppo_config(precision="bf16", microbatch_size=2)
    roles = load_roles(config, ppo_context)
    part = make_rollout(roles, config).rows(torch.arange(6))
    target, updater = targets(part, config, kl_coef=0.1), make_updater(roles, config)
    weights = [*roles.policy.model.parameters(), *roles.value.parameters()]
    with Operations(weights) as kept:
        updater.accumulate(part, target)
    gradients = taken_gradients(roles)
    roles.__dict__["are_sharded"] = True  # as with sharded weights: no casts are kept
    with Operations(weights) as uncached:
        updater.accumulate(part, target)
    # Two layers of seven products in each network, and the policy's output layer. The value head computes in fp32.
    assert kept.casts == 2 * 14 + 1
    assert uncached.casts >= 3 * kept.casts  # three passes
    for name, gradient in taken_gradients(roles).items():
        assert torch.equal(gradient, gradients[name]), name  # to the bit


# Memory


def run_out_above(model: Any, tokens: int, monkeypatch: pytest.MonkeyPatch, *, in_backward: bool = False) -> list[int]:
    """Let passes of ``model`` with more tokens than this run out of memory. Returns the list of failed passes."""
    failed: list[int] = []
    forward = model.forward

    def limited(*inputs: Any, **named: Any) -> Any:
        size = named["input_ids"].numel()
        output = forward(*inputs, **named)
        if size > tokens:
            if in_backward:
                output.last_hidden_state.register_hook(lambda _: raise_out_of_memory(failed, size, MemoryError()))
            else:
                raise_out_of_memory(failed, size)
        return output

    monkeypatch.setattr(model, "forward", limited)
    return failed


def raise_out_of_memory(failed: list[int], size: int, error: BaseException | None = None) -> None:
    failed.append(size)
    raise error or torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize(("network", "in_backward"), [("policy", False), ("value", True)])
def test_minibatch_that_runs_out_of_memory_is_repeated_in_smaller_passes(
    ppo_config, ppo_context, make_rollout, monkeypatch, caplog, tmp_path, network: str, in_backward: bool
) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("the acting was warm and the film was a joy\n" * 20)
    mix = {"data": str(corpus), "coef": 2.0, "examples_per_episode": 1, "block_size": 8}
    config = ppo_config(microbatch_size="auto", pretraining_mix=mix)
    roles = load_roles(config, ppo_context)
    rollout = make_rollout(roles, config)
    target = targets(rollout, config, kl_coef=0.1)

    def updater() -> Updater:
        return make_updater(roles, config, pretraining_rows=load_pretraining_rows(config, roles.tokenizer, ppo_context.seed))

    limited = updater()
    with monkeypatch.context() as patch:
        failed = run_out_above(roles.policy.decoder if network == "policy" else roles.value.backbone, 100, patch, in_backward=in_backward)
        totals = limited.accumulate(rollout, target)
    totals.read()
    gradients = taken_gradients(roles)
    assert len(failed) == 2 and limited.budget.retreats == 2
    assert sum("memory ran out in a pass" in record.message for record in caplog.records) == 1
    small = updater()
    small.budget.tokens = limited.budget.tokens
    expected = small.accumulate(rollout, target)
    expected.read()
    assert totals.sums == expected.sums  # every episode counts exactly once
    for name, gradient in taken_gradients(roles).items():
        assert torch.equal(gradients[name], gradient), name  # to the bit: the passes are the same
    one_pass = updater()
    one_pass.accumulate(rollout, target)
    for name, gradient in taken_gradients(roles).items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=2e-6)  # fp32 sums in another order
    result = limited.update(rollout, kl_coef=0.1, seed=0)
    assert result.retreats == 2 and 0 < result.pass_tokens <= 100
    assert limited.update(rollout, kl_coef=0.1, seed=1).retreats == 0  # later passes have the smaller size


def test_measuring_in_smaller_passes_loses_no_episode(ppo_config, ppo_context, make_rollout, monkeypatch) -> None:
    config = ppo_config(microbatch_size=12)
    roles = load_roles(config, ppo_context)
    expected = make_rollout(roles, config)
    failed = run_out_above(roles.value.backbone, 100, monkeypatch)
    rollout = make_rollout(roles, config)
    assert failed and rollout.retreats == len(failed) and expected.retreats == 0
    torch.testing.assert_close(rollout.values, expected.values)
    torch.testing.assert_close(rollout.reference_logprobs, expected.reference_logprobs)


def test_one_episode_that_does_not_fit_ends_the_run(ppo_config, ppo_context, make_rollout, monkeypatch) -> None:
    config = ppo_config()
    roles = load_roles(config, ppo_context)
    rollout = make_rollout(roles, config)
    failed = run_out_above(roles.policy.decoder, 0, monkeypatch)
    longest = max(len(prompt) + int(length) for prompt, length in zip(rollout.prompt_ids, rollout.lengths, strict=True))
    said = f"PPO update: memory ran out in a pass over one sequence of {longest} tokens, which cannot be divided. Lower max_prompt_tokens"
    with pytest.raises(MemoryExhausted, match=said):
        make_updater(roles, config).accumulate(rollout, targets(rollout, config, kl_coef=0.1))
    assert failed[-2:] == [longest, longest]  # repeated once, after memory was freed


def test_a_pass_of_both_networks_over_one_episode_that_does_not_fit_is_divided_between_them(
    ppo_config, ppo_context, make_rollout, monkeypatch, caplog
) -> None:
    config = ppo_config(microbatch_size="auto", lora={"r": 4})
    roles = load_roles(config, ppo_context)
    rollout = make_rollout(roles, config)
    target = targets(rollout, config, kl_coef=0.1)
    make_updater(roles, config).accumulate(rollout, target)
    expected = taken_gradients(roles)
    roles.joins = True
    roles.__dict__.pop("joint_adapters", None)
    longest = max(len(prompt) + int(length) for prompt, length in zip(rollout.prompt_ids, rollout.lengths, strict=True))
    updater = make_updater(roles, config)
    with monkeypatch.context() as patch:
        run_out_above(roles.policy.decoder, 2 * longest - 1, patch)
        updater.accumulate(rollout, target)
        assert sum("passes are separate from now on" in message for message in caplog.messages) == 1
        for name, gradient in taken_gradients(roles).items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=2e-6)
        retreats = updater.budget.retreats
        updater.accumulate(rollout, target)
    assert updater.budget.retreats == retreats  # later passes are separate from the start


def test_optimizer_step_without_memory_ends_the_run_with_one_message(ppo_config, ppo_context, make_rollout, monkeypatch) -> None:
    config = ppo_config()
    roles = load_roles(config, ppo_context)
    updater, rollout = make_updater(roles, config), make_rollout(roles, config)
    monkeypatch.setattr(updater.optimizers["policy"], "step", lambda: raise_out_of_memory([], 0))
    with pytest.raises(MemoryExhausted, match=r"in the optimizer step of the policy, whose moments take \d\.\d GiB more"):
        updater.minibatch(rollout, targets(rollout, config, kl_coef=0.1))


def test_sharded_weights_are_not_retried_because_other_processes_wait(ppo_config, ppo_context, make_rollout, monkeypatch) -> None:
    config = ppo_config()
    roles = load_roles(config, ppo_context)
    rollout = make_rollout(roles, config)
    run_out_above(roles.policy.decoder, 0, monkeypatch)
    roles.__dict__["are_sharded"] = True
    with pytest.raises(TrainingError, match="takes all processes"):
        make_updater(roles, config).accumulate(rollout, targets(rollout, config, kl_coef=0.1))


# Waiting

WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero")  # operations that make the CPU wait for a GPU


@pytest.mark.parametrize(("kind", "packs"), [*((kind, False) for kind in KINDS), ("a value network", True), ("LoRA", True)])
def test_optimizer_step_copies_numbers_from_the_device_once(
    ppo_config, ppo_context, make_rollout, monkeypatch, kind: str, packs: bool
) -> None:
    config = ppo_config(microbatch_size=2, score_placement="after", ema_decay=0.9, **KINDS[kind])
    roles = load_roles(config, ppo_context)
    roles.packs = packs
    part = make_rollout(roles, config).rows(torch.arange(6))
    target, updater = targets(part, config, kl_coef=0.1), make_updater(roles, config)
    updater.minibatch(part, target)  # makes what later steps reuse: optimizer states, the result of the packing test
    reads: list[str] = []
    for name in ("tolist", "item", "__float__", "__bool__", "__int__", "cpu", "numpy"):
        own = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor,
            name,
            lambda tensor, *rest, name=name, own=own: (tensor.requires_grad or reads.append(name), own(tensor, *rest))[1],
        )
    with Operations() as seen:
        updater.minibatch(part, target)
    assert {name: seen.counts[name] for name in WAITS if name in seen.counts} == {}
    # Three lists of the rollout, which is on the CPU (lengths, token ids, which states count), and the sums of the minibatch.
    assert reads.count("tolist") == 4 and set(reads) <= {"tolist"}


def test_the_policys_graph_is_freed_before_the_pass_of_the_value_network(ppo_config, ppo_context, make_rollout, monkeypatch) -> None:
    """Layers of bitsandbytes keep their inputs in the graph itself, which the backward pass does not free."""
    kept: list[weakref.ref[Any]] = []

    class Input:
        pass

    class Keeps(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, states: torch.Tensor) -> torch.Tensor:
            ctx.input = Input()
            kept.append(weakref.ref(ctx.input))
            return states.clone()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            return gradient

    def keep(module: Any, arguments: Any, output: Any) -> Any:
        output.last_hidden_state = Keeps.apply(output.last_hidden_state)
        return output

    usual, alive = module.sequence_values, []

    def values(*arguments: Any) -> torch.Tensor:
        alive.append(kept[-1]() is not None)
        return usual(*arguments)

    config = ppo_config()
    roles = load_roles(config, ppo_context)
    rollout = make_rollout(roles, config)
    roles.policy.decoder.register_forward_hook(keep)
    monkeypatch.setattr(module, "sequence_values", values)
    make_updater(roles, config).accumulate(rollout, targets(rollout, config, kl_coef=0.1))
    assert alive and not any(alive)
