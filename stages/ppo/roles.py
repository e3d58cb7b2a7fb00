"""The networks of PPO and what is asked of them: log-probabilities of responses, and values before each response token.

Full fine-tuning keeps four models. With LoRA the roles whose adapters stand on one base share its weights (models/shared.py): the reference
is the policy less its fresh adapter, the value network the reward model (or the policy) with a fresh adapter of its own.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stages.config import ModelInput
from stages.errors import LaunchError, ModelError
from stages.kernels.casts import kept_casts
from stages.models.adapters import FRESH
from stages.models.heads import RewardModel, ValueModel
from stages.models.loading import config_of, load_language_model, load_tokenizer, save_model
from stages.models.packing import KERNELS, packing_kernel
from stages.models.parts import hidden_width, transformer_of
from stages.models.responses import Policy, SequenceBatch, sequence_values
from stages.models.reward_question import is_generative
from stages.models.sharding import shard, sharded_blocks
from stages.models.shared import RoleParameters, SharedBackbone
from stages.ppo.config import PPOStepConfig
from stages.ppo.data import longest_sequence, prompt_room
from stages.ppo.offload import Offload
from stages.registry.references import ResolvedModel
from stages.rewards.config import leaves
from stages.sampling.sampler import LocalSampler, Sampler
from stages.step import StepContext
from stages.tokens.positions import model_length


@dataclass
class Roles:
    """Everything a PPO step asks. ``value`` is None with a head on the policy's own hidden states, and without a value network.

    ``has_value``: whether there are values at all (``advantages: gae``).

    ``trained`` are the modules that train, by name: whole models, or the weights of a role alone where a backbone is shared.
    ``sampler`` completes prompts by the policy; the local one where no other is put in its place.
    """

    tokenizer: Any
    policy: Policy
    reference: Policy
    value: ValueModel | None
    trained: dict[str, nn.Module]
    backbone: SharedBackbone | None = None
    has_value: bool = True
    offload: Offload = field(default_factory=lambda: Offload([], torch.device("cpu"), enabled=False))
    packs: bool | None = None  # whether passes are packed where the models can be; None: on a GPU
    sampler: Sampler = field(init=False)

    def __post_init__(self) -> None:
        self.sampler = LocalSampler(self.policy.model, self.tokenizer)

    def reference_logprobs(self, batch: SequenceBatch) -> Tensor:
        """Log-probabilities under the frozen reference [N]."""
        return self.reference.logprobs(batch)

    def values(self, batch: SequenceBatch) -> Tensor:
        """Values before each response token [N]; zeros without a value network."""
        if not self.has_value:
            return torch.zeros(len(batch.tokens))
        if self.value is None:
            return self.policy.values(batch)
        return sequence_values(self.value, batch, self.policy.precision())

    @cached_property
    def are_cut(self) -> bool:
        """Whether the weights are cut over processes, so that every pass needs all of them."""
        return any(sharded_blocks(model) for model in self.models())

    def decoders(self, *names: str) -> list[Any]:
        """The transformers of the roles ``policy``, ``reference`` and ``value`` that are named and there, each once."""
        found = {"policy": self.policy.decoder, "reference": self.reference.decoder}
        if self.value is not None:
            found["value"] = self.value.backbone
        return list({id(found[name]): found[name] for name in names if name in found}.values())

    def kernel(self, *names: str) -> str | None:
        """The kernel for packed passes through the named roles; None where passes are padded, because one of them cannot be packed.

        Weights that are cut over processes are not packed. The roles must be awake, and no ``casts_kept`` may be open: models that were not
        asked before are tried out.
        """
        wanted = self.policy.device.type == "cuda" if self.packs is None else self.packs
        if not wanted or self.are_cut:
            return None
        kernels = []
        for name in names:
            if name == "value" and self.value is not None:
                self.value.activate()
                kernels.append(packing_kernel(self.value.backbone, self.policy.precision))
            elif name != "value":
                kernels.append((self.policy if name == "policy" else self.reference).kernel())
        known = [kernel for kernel in kernels if kernel is not None]
        return max(known, key=KERNELS.index) if len(known) == len(kernels) else None

    def casts_kept(self) -> AbstractContextManager[None]:
        """Around passes between which no weight changes: each weight is cast to half precision once."""
        # Cut weights come and go block by block; keeping their casts would put the whole model together.
        return nullcontext() if self.policy.autocast is None or self.are_cut else kept_casts(self.policy.device.type)

    def networks(self) -> dict[str, nn.Module]:
        """The modules that train: policy, and value."""
        return self.trained

    def shares(self, module: nn.Module) -> bool:
        """Whether a scalar model stands on the policy's backbone."""
        return getattr(module, "backbone", None) is self.policy.decoder

    def waiting(self) -> list[nn.Module]:
        """Whole models of their own that compute only now and then."""
        found = [] if self.reference.model is self.policy.model else [self.reference.model]
        if self.value is not None and not self.shares(self.value):
            found.append(self.value)
        return found

    def load_reward_model(self, model: ResolvedModel, *, dtype: torch.dtype) -> RewardModel:
        """A reward model, on the shared backbone where it stands on it."""
        if self.backbone is not None and self.backbone.holds(model):
            return self.backbone.reward_model(model)
        return RewardModel.from_pretrained(model, dtype=dtype).to(self.policy.device).requires_grad_(False)

    def save_policy(self, folder: Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write the policy: whole weights, or its adapter. ``state_dict``: its weights where they are cut over processes."""
        self.policy.activate()
        save_model(self.policy.model, self.tokenizer, folder, state_dict=state_dict)

    def models(self) -> list[nn.Module]:
        """Every model that the roles stand on."""
        return [model for model in (self.policy.model, self.reference.model, self.value) if model is not None]


def load_roles(config: PPOStepConfig, context: StepContext) -> Roles:
    """Policy, reference and value network as the config names them. Raises ModelError where one cannot play its part."""
    if context.runtime.uses_deepspeed:
        raise LaunchError("ppo does not run under DeepSpeed; cut its models over the processes with recipes/accelerate/fsdp2.yaml")
    if context.runtime.shards and (config.offload or config.training.optimizer != "adamw"):
        named = "offload" if config.offload else f"training.optimizer: {config.training.optimizer}"
        raise LaunchError(f"{named} needs whole models, and FSDP cuts them over the processes; leave one of the two")
    roles = _adapted_roles(config, context) if config.lora is not None else _whole_roles(config, context)
    if config.training.gradient_checkpointing:
        roles.policy.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if config.lora is not None:
            roles.policy.model.enable_input_require_grads()
        if roles.value is not None and (roles.backbone is None or roles.value.backbone is not roles.policy.decoder):
            roles.value.gradient_checkpointing_enable({"use_reentrant": False})
    if context.runtime.shards:
        for model in roles.models():
            shard(model, add_up=True)
    return roles


def _whole_roles(config: PPOStepConfig, context: StepContext) -> Roles:
    """Full fine-tuning: a model for each role. Trained weights are fp32 (1e-8 steps survive), frozen ones of the compute dtype."""
    device, dtype = context.runtime.device, context.runtime.dtype(config.precision)
    source = context.models["policy"]
    tokenizer = load_tokenizer(source)
    model = load_language_model(source, dtype=torch.float32, tokenizer=tokenizer).to(device)
    head = _shared_value_head(config, model)
    policy = Policy(model, temperature=config.generation.temperature, autocast=_autocast(dtype), shared_value_head=head)
    value = None
    if head is None and config.has_value:
        chosen, with_head = _value_source(config, context, tokenizer)
        load = ValueModel.from_pretrained if with_head else ValueModel.from_policy
        value = load(chosen, dtype=torch.float32, trainable=True).to(device)
    networks: dict[str, nn.Module] = {"policy": model}
    if config.has_value:
        networks["value"] = _first(value, head)
    return Roles(tokenizer, policy, _reference(config, context, tokenizer), value, networks, has_value=config.has_value)


def _adapted_roles(config: PPOStepConfig, context: StepContext) -> Roles:
    """LoRA: one backbone for all roles that stand on it, adapters for each."""
    assert config.lora is not None
    device, dtype = context.runtime.device, context.runtime.dtype(config.precision)
    source = context.models["policy"]
    temperature = config.generation.temperature
    backbone = SharedBackbone(source, dtype=dtype, device=device, lora=config.lora)
    below = backbone.frozen(source)
    acting = [*below, backbone.fresh(FRESH, below)]
    # The value network's adapter comes before the objects below are made: adding one may wrap the model once more.
    value, extra = _adapted_value(config, context, backbone)
    model = backbone.model
    head = _shared_value_head(config, model)
    policy = Policy(model, temperature=temperature, autocast=_autocast(dtype), shared_value_head=head, activate=backbone.activation(acting))
    if config.reference is None:
        reference = Policy(model, temperature=temperature, autocast=_autocast(dtype), activate=backbone.activation(below))
    elif backbone.holds(context.models["reference"]):
        names = backbone.frozen(context.models["reference"])
        reference = Policy(model, temperature=temperature, autocast=_autocast(dtype), activate=backbone.activation(names))
    else:
        reference = _reference(config, context, backbone.tokenizer)
    networks: dict[str, nn.Module] = {"policy": RoleParameters(backbone.named_parameters(FRESH))}
    if value is not None:
        head_weights = [(f"score_head.{name}", parameter) for name, parameter in value.score_head.named_parameters()]
        networks["value"] = RoleParameters([*extra, *head_weights]) if extra else value
    elif head is not None:
        networks["value"] = head
    return Roles(backbone.tokenizer, policy, reference, value, networks, backbone, has_value=config.has_value)


def _adapted_value(
    config: PPOStepConfig, context: StepContext, backbone: SharedBackbone
) -> tuple[ValueModel | None, list[tuple[str, nn.Parameter]]]:
    """(value network, its weights on the shared backbone; none of those where it has a backbone of its own)."""
    if config.value == "shared" or not config.has_value:
        return None, []
    chosen, with_head = _value_source(config, context, backbone.tokenizer)
    if backbone.holds(chosen):
        value = backbone.value_model(chosen, with_head=with_head)
        return value, backbone.named_parameters("value")
    load = ValueModel.from_pretrained if with_head else ValueModel.from_policy
    dtype = context.runtime.dtype(config.precision)
    return load(chosen, dtype=dtype, lora=config.lora, trainable=True).to(context.runtime.device), []


def _autocast(dtype: torch.dtype) -> torch.dtype | None:
    return dtype if dtype != torch.float32 else None


def _first(*modules: nn.Module | None) -> nn.Module:
    return next(module for module in modules if module is not None)


def _shared_value_head(config: PPOStepConfig, model: Any) -> nn.Linear | None:
    if config.value != "shared":
        return None
    head = nn.Linear(hidden_width(transformer_of(model)), 1, device=next(model.parameters()).device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def _reference(config: PPOStepConfig, context: StepContext, tokenizer: Any) -> Policy:
    """A frozen model of its own: the one that the recipe names, or the policy as it starts."""
    source = context.models["policy"]
    chosen = context.models["reference"] if config.reference is not None else source
    if config.reference is not None and len(load_tokenizer(chosen)) != len(tokenizer):
        raise ModelError(f"reference {chosen.ref!r} has another vocabulary than the policy {source.ref!r}; they must share one")
    if config.reference is not None and (short := _too_short(config, context, chosen, tokenizer)):
        raise ModelError(f"reference {chosen.ref!r} {short}. Name the model that the policy started from, or lower max_prompt_tokens")
    dtype = context.runtime.dtype(config.precision)
    frozen = load_language_model(chosen, dtype=dtype, trainable=False, tokenizer=tokenizer).to(context.runtime.device)
    return Policy(frozen, temperature=config.generation.temperature, autocast=None)


def _value_source(config: PPOStepConfig, context: StepContext, tokenizer: Any) -> tuple[ResolvedModel, bool]:
    """The model that the value network starts as, and whether with its head: InstructGPT's is the reward model (section 3.5).

    A reward model with another vocabulary, or one that cannot read prompt and completion, is passed over and named. Raises ModelError where
    the recipe itself names such a model as ``value``.
    """
    vocabulary = tokenizer.get_vocab()
    if isinstance(config.value, ModelInput):
        source = context.models["value"]
        if load_tokenizer(source).get_vocab() != vocabulary:
            raise ModelError(
                f"value {source.ref!r} has another vocabulary than the policy; it reads the policy's tokens. Use value: policy, or a "
                "reward model trained from the policy's family"
            )
        if short := _too_short(config, context, source, tokenizer):
            raise ModelError(f"value {source.ref!r} {short}. Use value: policy, or lower max_prompt_tokens")
        return source, True
    if config.value is None:
        console = context.runtime.console
        for place, reward in leaves(config.reward, "reward").items():
            found = context.models.get(f"{place}.model")
            if found is None or reward.label is not None or reward.answers is not None or is_generative(found):
                continue
            if load_tokenizer(found).get_vocab() != vocabulary:
                continue
            short = _too_short(config, context, found, tokenizer)
            if not short:
                return found, True
            console.print(f"{context.name}: the reward model {found.ref} {short}; the value network is not started from it")
        console.print(f"{context.name}: no reward model reads what the policy reads; a copy of the policy is the value network")
    return context.models["policy"], False


def _too_short(config: PPOStepConfig, context: StepContext, model: ResolvedModel, tokenizer: Any) -> str:
    """In a clause: that ``model`` cannot read the longest prompt with its completion; empty where it can.

    The prompts are read only where the policy's own limit does not settle it.
    """
    reads, policy = model_length(config_of(model)), config_of(context.models["policy"])
    if reads is None or reads >= prompt_room(config, policy, tokenizer) + config.generation.max_new_tokens:
        return ""
    needed = longest_sequence(config, policy, tokenizer)
    return "" if reads >= needed else f"reads {reads} tokens, and a prompt with its completion has up to {needed}"
