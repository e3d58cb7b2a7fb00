"""The loss of fp16 passes is scaled: small gradients do not become 0, and an overflow repeats the passes with a smaller factor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from stages.ppo.roles import load_roles
from stages.ppo.update.loss_scale import FIRST, STEPS_TO_GROW, LossScale
from stages.ppo.update.targets import targets
from stages.ppo.update.updater import Updater
from stages.training.checkpoints import trainable


def test_only_fp16_is_scaled_and_the_gradients_are_those_without_a_factor() -> None:
    assert LossScale(None).factor == LossScale(torch.bfloat16).factor == 1.0
    scale, network = LossScale(torch.float16), torch.nn.Linear(2, 1, bias=False)
    scale.backward(network(torch.tensor([1.0, 3.0])).sum())
    assert network.weight.grad is not None and network.weight.grad.tolist() == [[FIRST, 3 * FIRST]]
    assert scale.unscale([network]) and network.weight.grad.tolist() == [[1.0, 3.0]]


def test_an_overflow_halves_the_factor_until_many_steps_had_none() -> None:
    scale, network = LossScale(torch.float16), torch.nn.Linear(1, 1, bias=False)
    network.weight.grad = torch.tensor([[torch.inf]])
    assert not scale.unscale([network]) and scale.factor == FIRST / 2
    network.weight.grad = torch.ones(1, 1)
    for _ in range(STEPS_TO_GROW - 1):
        assert scale.unscale([network])
    assert scale.factor == FIRST / 2
    assert scale.unscale([network]) and scale.factor == FIRST


def test_the_factor_grows_again_from_the_smallest_one() -> None:
    """16 overflows halve it to 1. There an overflow is left to the check of the gradients, and does not repeat the passes for ever."""
    scale, network = LossScale(torch.float16), torch.nn.Linear(1, 1, bias=False)
    network.weight.grad = torch.tensor([[torch.inf]])
    assert [scale.unscale([network]) for _ in range(17)] == [False] * 16 + [True] and scale.factor == 1.0
    network.weight.grad = torch.ones(1, 1)
    for _ in range(STEPS_TO_GROW):
        assert scale.unscale([network])
    assert scale.factor == 2.0 and scale.state == (2.0, 0)


def test_the_gradients_of_all_networks_are_checked_by_one_read() -> None:
    class Reads(TorchDispatchMode):
        number = 0

        def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
            self.number += function is torch.ops.aten._local_scalar_dense.default
            return function(*arguments, **(options or {}))

    scale, networks = LossScale(torch.float16), [torch.nn.Linear(1, 1, bias=False) for _ in range(2)]
    for network, gradient in zip(networks, (1.0, torch.inf), strict=True):
        network.weight.grad = torch.full((1, 1), gradient)
    with Reads() as reads:
        assert not scale.unscale(networks)
    assert reads.number == 1


def test_a_resumed_run_continues_with_the_factor_of_the_checkpoint() -> None:
    scale = LossScale(torch.float16)
    scale.resume([256.0, 7])
    assert scale.state == (256.0, 7)
    scale.resume(None)  # an older checkpoint has none
    assert scale.factor == 256.0
    assert LossScale(torch.bfloat16).state is None


def value_gradient(roles: Any, updater: Updater, rollout: Any, target: Any) -> torch.Tensor:
    for network in roles.networks().values():
        network.zero_grad(set_to_none=True)
    updater.accumulate(rollout, target)
    weights = trainable(roles.networks()["value"]).items()
    # without the head, which computes in fp32
    gradients = [one.grad.flatten() for name, one in weights if one.grad is not None and not name.startswith("score_head")]
    return torch.cat(gradients)


@pytest.mark.parametrize("first", [FIRST, 2.0**60])
def test_tiny_gradients_in_fp16_equal_those_in_fp32(ppo_config, ppo_context, make_rollout, first: float) -> None:
    """The value network's gradients are below the smallest number of fp16. A too large factor overflows, and the passes are repeated."""
    config = ppo_config(value_coef=1e-7)
    roles = load_roles(config, ppo_context)
    torch.nn.init.normal_(roles.value.score_head.weight, generator=torch.Generator().manual_seed(0))  # zeros would stop the gradient
    rollout = make_rollout(roles, config)
    target = targets(rollout, config, kl_coef=0.1)
    expected = value_gradient(roles, Updater(roles, {}, config), rollout, target)
    roles.policy.autocast = torch.float16
    unscaled = Updater(roles, {}, config)
    unscaled.loss_scale.factor = 1.0
    scaled = Updater(roles, {}, config)
    scaled.loss_scale.factor = first
    errors = {
        name: float((value_gradient(roles, updater, rollout, target) - expected).norm() / expected.norm())
        for name, updater in (("unscaled", unscaled), ("scaled", scaled))
    }
    assert errors["scaled"] < 0.02 and errors["unscaled"] > 0.3, errors
    assert (scaled.loss_scale.factor == first) == (first == FIRST)
