"""The networks of PPO: policy, reference and value network, and what they compute for a batch of responses.

Full fine-tuning keeps four models. With LoRA, roles whose adapters have the same base share its weights
(models/adapters/shared_backbone.py). The reference is the policy without its new adapter. The value network is the reward model (or the
policy) with a second new adapter.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from stages.errors import LaunchError, ModelError
from stages.kernels.casts import kept_casts
from stages.models.adapters.activation import NEW_ADAPTER, active_adapters
from stages.models.adapters.folding import why_not_together
from stages.models.adapters.shared_backbone import RoleParameters, SharedBackbone
from stages.models.heads import RewardModel, ScalarHead, ValueModel
from stages.models.layers.compiled import LayerCompiler
from stages.models.loading import config_of, load_language_model, load_tokenizer
from stages.models.parts import hidden_width, moved_to, transformer_of
from stages.models.passes.packing import KERNELS, packing_kernel
from stages.models.passes.responses import Policy, SequenceBatch, sequence_values
from stages.models.reward_question import is_generative
from stages.models.saving import save_model
from stages.models.sharding import shard, sharded_blocks
from stages.ppo.config import PPOStepConfig
from stages.ppo.data import longest_sequence, prompt_room
from stages.ppo.offload import Offload
from stages.registry.references import ResolvedModel
from stages.sampling.sampler import LocalSampler, Sampler
from stages.step import StepContext
from stages.tokens.positions import model_length

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from stages.model_types import TransformersModel

logger = logging.getLogger(__name__)


@dataclass
class Roles:
    """The networks of a PPO step. ``value`` is None with a value head on the policy's hidden states, and without a value network.

    ``has_value``: whether values are computed at all (``advantages: gae``). ``trained``: the trained modules by name: full models, or only
    the weights of a role on a shared backbone. ``value_start``: the model input that ``value`` started from. ``sampler``: samples
    completions of the policy; the local sampler unless it is replaced.
    """

    tokenizer: PreTrainedTokenizerBase
    policy: Policy
    reference: Policy
    value: ValueModel | None
    trained: dict[str, nn.Module]
    backbone: SharedBackbone | None = None
    value_start: str | None = None
    has_value: bool = True
    offload: Offload = field(default_factory=lambda: Offload([], torch.device("cpu"), enabled=False))
    packs: bool | None = None  # whether passes are packed if the models support it; None: only on a GPU
    joins: bool | None = None  # whether policy and value network share passes if they can; None: only on a GPU, where that saves passes
    compiler: LayerCompiler | None = None  # None: layers are not compiled
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
    def are_sharded(self) -> bool:
        """Whether the weights are sharded, so that every process must take part in every forward pass."""
        return any(sharded_blocks(model) for model in self.models())

    def decoders(self, *names: str) -> list[TransformersModel]:
        """The transformers of the named roles (``policy``, ``reference``, ``value``), without repetition. Missing roles are skipped."""
        decoders: dict[str, TransformersModel] = {"policy": self.policy.decoder, "reference": self.reference.decoder}
        if self.value is not None:
            decoders["value"] = self.value.backbone
        return list({id(decoders[name]): decoders[name] for name in names if name in decoders}.values())

    def kernel(self, *names: str) -> str | None:
        """The kernel for packed passes through the named roles; None if one of them cannot be packed, so that passes are padded.

        Sharded weights are not packed. The roles must be on the device, and ``casts_kept`` must not be active, because models are tested on
        their first use.
        """
        wanted = self.policy.device.type == "cuda" if self.packs is None else self.packs
        if not wanted or self.are_sharded:
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

    @cached_property
    def joint_adapters(self) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
        """The adapters of policy and value network for passes of both through one backbone; None if there are no such passes.

        The reason is logged if they share a backbone.
        """
        wanted = self.policy.device.type == "cuda" if self.joins is None else self.joins
        if not wanted or self.value is None or self.backbone is None or not self.shares(self.value) or self.are_sharded:
            return None
        self.value.activate()
        of_value = active_adapters(self.policy.model)
        self.policy.activate()
        of_policy = active_adapters(self.policy.model)
        reason = why_not_together(self.policy.decoder, of_policy, of_value)
        if not self.policy.is_direct:
            reason = "the model computes its logits itself"
        logger.info("policy and value network %s", f"have separate passes: {reason}" if reason else "can share passes")
        return None if reason else (of_policy, of_value)

    def casts_kept(self) -> AbstractContextManager[None]:
        """Context manager for passes between which no weight changes: casts and stacks of weights are made only once."""
        # Sharded weights are gathered block by block; keeping their casts would keep the full model in memory.
        return nullcontext() if self.are_sharded else kept_casts(self.policy.device.type)

    def networks(self) -> dict[str, nn.Module]:
        """The trained modules: policy, and value network or head."""
        return self.trained

    def shares(self, module: nn.Module) -> bool:
        """Whether a scalar model uses the policy's backbone."""
        return getattr(module, "backbone", None) is self.policy.decoder

    def waiting(self) -> list[nn.Module]:
        """Models with their own weights that are idle most of the time, so that they can be offloaded."""
        models: list[nn.Module] = [] if self.reference.model is self.policy.model else [self.reference.model]
        if self.value is not None and not self.shares(self.value):
            models.append(self.value)
        return models

    def load_reward_model(self, model: ResolvedModel, *, dtype: torch.dtype) -> RewardModel:
        """Load a reward model, on the shared backbone if it belongs to it."""
        if self.backbone is not None and self.backbone.is_base_of(model):
            return self.backbone.reward_model(model)
        return RewardModel.from_pretrained(model, dtype=dtype).to(self.policy.device).requires_grad_(False)

    def save_policy(self, folder: Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """Save the policy: full weights, or its adapter. ``state_dict``: its weights if they are sharded."""
        self.policy.activate()
        save_model(self.policy.model, self.tokenizer, folder, state_dict=state_dict)

    def models(self) -> list[nn.Module]:
        """All models of the roles."""
        return [model for model in (self.policy.model, self.reference.model, self.value) if model is not None]


def load_roles(config: PPOStepConfig, context: StepContext) -> Roles:
    """Load policy, reference and value network of the config. Raises ModelError if a model does not fit its role."""
    if context.runtime.uses_deepspeed:
        raise LaunchError("ppo does not support DeepSpeed; shard its models with recipes/accelerate/fsdp2.yaml")
    if context.runtime.shards and (config.offload or config.training.optimizer != "adamw"):
        named = "offload" if config.offload else f"training.optimizer: {config.training.optimizer}"
        raise LaunchError(f"{named} does not support FSDP's sharded weights; remove it, or start without FSDP")
    roles = _adapted_roles(config, context) if config.lora is not None else _full_roles(config, context)
    if config.training.gradient_checkpointing:
        roles.policy.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if config.lora is not None:
            roles.policy.model.enable_input_require_grads()
        if roles.value is not None and (roles.backbone is None or roles.value.backbone is not roles.policy.decoder):
            roles.value.gradient_checkpointing_enable({"use_reentrant": False})
    if context.runtime.shards:
        for model in roles.models():
            shard(model, add_up=True)
    if config.training.torch_compile:
        roles.compiler = LayerCompiler()
        roles.compiler.add(*roles.models())
    return roles


def _full_roles(config: PPOStepConfig, context: StepContext) -> Roles:
    """Full fine-tuning: each role has its own model. Trained weights are fp32 (to keep small updates), frozen ones the compute dtype."""
    device, dtype = context.runtime.device, context.runtime.dtype(config.precision)
    source = context.models["policy"]
    tokenizer = load_tokenizer(source)
    model = moved_to(load_language_model(source, dtype=torch.float32, tokenizer=tokenizer), device)
    head = _shared_value_head(config, model)
    policy = Policy(model, temperature=config.generation.temperature, autocast=_autocast(dtype), shared_value_head=head)
    value = None
    start = _value_start(config, context, tokenizer)
    if start is not None:
        value = _value_loader(start)(context.models[start], dtype=torch.float32, trainable=True).to(device)
    networks: dict[str, nn.Module] = {"policy": model}
    if config.has_value:
        networks["value"] = _first(value, head)
    reference = _reference(config, context, tokenizer)
    return Roles(tokenizer, policy, reference, value, networks, value_start=start, has_value=config.has_value)


def _adapted_roles(config: PPOStepConfig, context: StepContext) -> Roles:
    """LoRA: one backbone for all roles with the same base, and adapters for each role."""
    assert config.lora is not None
    device, dtype = context.runtime.device, context.runtime.dtype(config.precision)
    source = context.models["policy"]
    temperature = config.generation.temperature
    backbone = SharedBackbone(source, dtype=dtype, device=device, lora=config.lora)
    below = backbone.frozen(source)
    acting = [*below, backbone.new_adapter(NEW_ADAPTER, below)]
    # The value network's adapter is added before the objects below are created, because adding an adapter can wrap the model again.
    start = _value_start(config, context, backbone.tokenizer)
    value, extra = _adapted_value(config, context, backbone, start)
    model = backbone.model
    head = _shared_value_head(config, model)
    policy = Policy(model, temperature=temperature, autocast=_autocast(dtype), shared_value_head=head, activate=backbone.activation(acting))
    if config.reference is None:
        reference = Policy(model, temperature=temperature, autocast=_autocast(dtype), activate=backbone.activation(below))
    elif backbone.is_base_of(context.models["reference"]):
        names = backbone.frozen(context.models["reference"])
        reference = Policy(model, temperature=temperature, autocast=_autocast(dtype), activate=backbone.activation(names))
    else:
        reference = _reference(config, context, backbone.tokenizer)
    networks: dict[str, nn.Module] = {"policy": RoleParameters(backbone.named_parameters(NEW_ADAPTER))}
    if value is not None:
        head_weights = [(f"score_head.{name}", parameter) for name, parameter in value.score_head.named_parameters()]
        networks["value"] = RoleParameters([*extra, *head_weights]) if extra else value
    elif head is not None:
        networks["value"] = head
    return Roles(backbone.tokenizer, policy, reference, value, networks, backbone, value_start=start, has_value=config.has_value)


def _adapted_value(
    config: PPOStepConfig, context: StepContext, backbone: SharedBackbone, start: str | None
) -> tuple[ValueModel | None, list[tuple[str, nn.Parameter]]]:
    """(value network that starts from the model input ``start``, its weights on the shared backbone; none if it has its own backbone)."""
    if start is None:
        return None, []
    chosen = context.models[start]
    if backbone.is_base_of(chosen):
        value = backbone.value_model(chosen, with_head=start != "policy")
        return value, backbone.named_parameters("value")
    dtype = context.runtime.dtype(config.precision)
    return _value_loader(start)(chosen, dtype=dtype, lora=config.lora, trainable=True).to(context.runtime.device), []


def _value_loader(start: str) -> Callable[..., ValueModel]:
    """How to load the value network from the model input ``start``: with its head, or with a new head on the policy."""
    return ValueModel.from_policy if start == "policy" else ValueModel.from_pretrained


def _autocast(dtype: torch.dtype) -> torch.dtype | None:
    return dtype if dtype != torch.float32 else None


def _first(*modules: nn.Module | None) -> nn.Module:
    return next(module for module in modules if module is not None)


def _shared_value_head(config: PPOStepConfig, model: TransformersModel) -> ScalarHead | None:
    return ScalarHead(hidden_width(transformer_of(model)), next(model.parameters()).device) if config.value == "shared" else None


def _reference(config: PPOStepConfig, context: StepContext, tokenizer: PreTrainedTokenizerBase) -> Policy:
    """A separate frozen model: the reference of the recipe, or the initial policy."""
    source = context.models["policy"]
    chosen = context.models["reference"] if config.reference is not None else source
    if config.reference is not None and len(load_tokenizer(chosen)) != len(tokenizer):
        raise ModelError(f"reference {chosen.ref!r} has a different vocabulary than the policy {source.ref!r}; they must have the same")
    if config.reference is not None and (short := _too_short(config, context, chosen, tokenizer)):
        raise ModelError(f"reference {chosen.ref!r} {short}. Use the initial policy as reference, or lower max_prompt_tokens")
    dtype = context.runtime.dtype(config.precision)
    frozen = moved_to(load_language_model(chosen, dtype=dtype, trainable=False, tokenizer=tokenizer), context.runtime.device)
    return Policy(frozen, temperature=config.generation.temperature, autocast=None)


def _value_start(config: PPOStepConfig, context: StepContext, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The model input that the value network starts from; None without a separate value network.

    A reward model is skipped with a note if it has a different vocabulary, or cannot read prompt and completion. Raises ModelError if the
    recipe names such a model as ``value``.
    """
    vocabulary, console = tokenizer.get_vocab(), context.runtime.console

    def fits(name: str) -> bool:
        model = context.models[name]
        if is_generative(model):
            return False
        is_other = load_tokenizer(model).get_vocab() != vocabulary
        unfit = "has a different vocabulary than the policy" if is_other else _too_short(config, context, model, tokenizer)
        if unfit:
            console.print(f"{context.name}: the reward model {model.ref} {unfit}; it is not used as initial value network")
        return not unfit

    start = config.value_input(fits)
    if start == "value":
        source = context.models["value"]
        if load_tokenizer(source).get_vocab() != vocabulary:
            raise ModelError(
                f"value {source.ref!r} has a different vocabulary than the policy, whose tokens it must read. Use value: policy, or a "
                "reward model trained from the policy's family"
            )
        if short := _too_short(config, context, source, tokenizer):
            raise ModelError(f"value {source.ref!r} {short}. Use value: policy, or lower max_prompt_tokens")
    if start == "policy" and config.value is None:
        console.print(f"{context.name}: no reward model can read the policy's texts; the value network is initialized from the policy")
    return start


def _too_short(config: PPOStepConfig, context: StepContext, model: ResolvedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """A clause that says why ``model`` cannot read the longest prompt with its completion; empty if it can.

    The prompts are read only if the policy's own length limit does not decide.
    """
    reads, policy = model_length(config_of(model)), config_of(context.models["policy"])
    if reads is None or reads >= prompt_room(config, policy, tokenizer) + config.generation.max_new_tokens:
        return ""
    needed = longest_sequence(config, policy, tokenizer)
    return "" if reads >= needed else f"reads at most {reads} tokens, but a prompt with its completion has up to {needed}"
