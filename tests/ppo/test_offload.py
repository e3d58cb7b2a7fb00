"""Offloaded models are on the device while they compute, and results do not change. 8-bit and paged optimizers approximate AdamW."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from stages.errors import LaunchError
from stages.ppo.config import PPOOptimizer
from stages.ppo.loop import run
from stages.ppo.offload import Offload
from stages.ppo.roles import load_roles
from stages.ppo.update.optimizers import make_optimizer


class Traveller(torch.nn.Module):
    """Records the devices that it is moved to."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def to(self, device: Any) -> Traveller:  # type: ignore[override]
        self.seen.append(str(device))
        return self


def test_only_managed_modules_in_use_move_to_the_device() -> None:
    one, other, stranger = Traveller(), Traveller(), Traveller()
    offload = Offload([one, other], torch.device("meta"), enabled=True)
    assert one.seen == other.seen == ["cpu"]
    with pytest.raises(ZeroDivisionError), offload.awake(one, None, stranger):
        assert one.seen == ["cpu", "meta"] and other.seen == ["cpu"] and stranger.seen == []
        raise ZeroDivisionError
    assert one.seen == ["cpu", "meta", "cpu"]  # back in CPU memory also after an error
    off = Offload([Traveller()], torch.device("meta"), enabled=False)
    with off.awake(*off.modules):
        assert off.modules[0].seen == []


def weights(result: Any) -> dict[str, torch.Tensor]:
    return load_file(next(result.model.path.glob("*.safetensors")))


def test_offloading_changes_only_the_device(ppo_config, step_context, resolve_folder, tiny_llama_folder, monkeypatch, prompts) -> None:
    models = {"policy": resolve_folder(tiny_llama_folder)}
    awake: list[int] = []
    original = Offload.awake

    def counted(self: Offload, *modules: Any) -> Any:
        awake.append(len([module for module in modules if any(module is own for own in self.modules)]))
        return original(self, *modules)

    monkeypatch.setattr(Offload, "awake", counted)
    results = [
        weights(run(ppo_config(data=prompts, offload=offload), step_context(f"test/{offload}", 3, models))) for offload in (False, True)
    ]
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    assert max(awake) == 2  # reference and value network while the rollout is measured


@pytest.mark.parametrize("checkpointing", [True])
def test_gradient_checkpointing_gives_the_same_gradients(ppo_config, ppo_context, make_rollout, checkpointing) -> None:
    from stages.ppo.update.targets import targets
    from stages.ppo.update.updater import Updater

    gradients = []
    for on in (False, checkpointing):
        config = ppo_config(training={"learning_rate": 1e-3, "gradient_checkpointing": on})
        roles = load_roles(config, ppo_context)
        rollout = make_rollout(roles, config)
        Updater(roles, {}, config).accumulate(rollout, targets(rollout, config, kl_coef=0.1))
        gradients.append({f"{name}.{key}": p.grad for name, network in roles.networks().items() for key, p in network.named_parameters()})
        if on:
            assert roles.policy.decoder.is_gradient_checkpointing
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name])


@pytest.mark.parametrize(("optimizer", "tolerance"), [("paged_adamw", 1e-6), ("adamw_8bit", 0.05), ("paged_adamw_8bit", 0.05)])
def test_bitsandbytes_optimizers_follow_adamw(optimizer: str, tolerance: float) -> None:
    """A hundred steps on a noisy quadratic: 8-bit moments differ by a few per cent of the weights' change, paged ones not at all."""
    ends = []
    for kind in ("adamw", optimizer):
        weight = torch.nn.Parameter(torch.linspace(-1, 1, 8192))
        made = make_optimizer([weight], PPOOptimizer(learning_rate=1e-2, optimizer=kind, adam_epsilon=1e-8))
        generator = torch.Generator().manual_seed(0)
        for _ in range(100):
            weight.grad = weight.detach() - 0.5 + 0.1 * torch.randn(8192, generator=generator)
            made.step()
        ends.append(weight.detach())
        state = next(iter(made.state.values()))
        if "8bit" in kind:
            assert state["state1"].dtype == torch.uint8
    way = (ends[0] - torch.linspace(-1, 1, 8192)).abs().mean()
    assert (ends[0] - ends[1]).abs().mean() < tolerance * way


@pytest.mark.parametrize(
    ("options", "named"), [({"offload": True}, "offload"), ({"training": {"optimizer": "adamw_8bit"}}, "training.optimizer: adamw_8bit")]
)
def test_settings_that_need_unsharded_models_are_refused_with_fsdp(ppo_config, ppo_context, monkeypatch, options, named) -> None:
    monkeypatch.setattr(ppo_context.runtime, "shards", True)
    with pytest.raises(LaunchError, match=f"{named} does not support FSDP's sharded weights"):
        load_roles(ppo_config(**options), ppo_context)


def test_contradicting_settings_are_refused(ppo_config) -> None:
    with pytest.raises(ValidationError, match="adam_style=tensorflow requires optimizer: adamw"):
        ppo_config(training={"adam_style": "tensorflow", "optimizer": "adamw_8bit"})
