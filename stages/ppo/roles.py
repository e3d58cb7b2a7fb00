"""The networks of PPO and what is asked of them: log-probabilities of responses, and values before each response token.

B sequences, R response tokens, T = prompt and response, N counted tokens of a batch, V vocabulary, d hidden size. Rows are right padded
here: a forward pass over whole sequences needs no common end of the prompts, and rows of like length waste least.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stages.config import ModelInput
from stages.errors import ModelError
from stages.models.heads import ValueModel
from stages.models.loading import load_language_model, load_tokenizer
from stages.models.responses import Policy, SequenceBatch, sequence_values
from stages.ppo.config import PPOStepConfig
from stages.rewards.config import leaves
from stages.runtime import StepContext


@dataclass
class Roles:
    """Everything a PPO step asks. ``value`` is None with a shared head; ``reference`` is None where it is the policy less its adapter."""

    tokenizer: Any
    policy: Policy
    reference: Policy | None
    value: ValueModel | None

    def reference_logprobs(self, batch: SequenceBatch) -> Tensor:
        """Log-probabilities under the frozen reference [N]."""
        if self.reference is not None:
            return self.reference.logprobs(batch)
        with self.policy.model.disable_adapter():
            return self.policy.logprobs(batch)

    def values(self, batch: SequenceBatch) -> Tensor:
        """Values before each response token [N]."""
        if self.value is None:
            return self.policy.values(batch)
        return sequence_values(self.value, batch, self.policy.precision())

    def networks(self) -> dict[str, nn.Module]:
        """The modules that train, by name."""
        made: dict[str, nn.Module] = {"policy": self.policy.model}
        if self.value is not None:
            made["value"] = self.value
        elif self.policy.value_head is not None:
            made["value"] = self.policy.value_head
        return made


def load_roles(config: PPOStepConfig, context: StepContext) -> Roles:
    """Policy, reference and value network as the config names them. Raises ModelError where one cannot play its part."""
    device, dtype = context.runtime.device, context.runtime.dtype(config.precision)
    # Trained weights are fp32 (1e-8 steps survive), computed with in dtype; frozen ones are kept in dtype.
    weights = torch.float32 if config.lora is None else dtype
    autocast = dtype if dtype != torch.float32 else None
    source = context.models["policy"]
    tokenizer = load_tokenizer(source)
    model = load_language_model(source, dtype=weights, lora=config.lora, tokenizer=tokenizer).to(device)
    head = None
    if config.value == "shared":
        head = nn.Linear(model.config.get_text_config().hidden_size, 1, device=device)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
    if config.training.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if config.lora is not None:
            model.enable_input_require_grads()
    temperature = config.generation.temperature
    policy = Policy(model, temperature=temperature, autocast=autocast, shared_value_head=head)
    reference = None
    if config.reference is not None or config.lora is None:
        chosen = context.models["reference"] if config.reference is not None else source
        frozen = load_language_model(chosen, dtype=dtype, trainable=False, tokenizer=tokenizer).to(device)
        if config.reference is not None and len(load_tokenizer(chosen)) != len(tokenizer):
            raise ModelError(f"reference {chosen.ref!r} has another vocabulary than the policy {source.ref!r}; they must share one")
        reference = Policy(frozen, temperature=temperature, autocast=None)
    value = None if head is not None else _load_value(config, context, tokenizer, weights)
    if value is not None:
        value = value.to(device)
        if config.training.gradient_checkpointing:
            value.gradient_checkpointing_enable({"use_reentrant": False})
    return Roles(tokenizer, policy, reference, value)


def _load_value(config: PPOStepConfig, context: StepContext, tokenizer: Any, dtype: torch.dtype) -> ValueModel:
    vocabulary = tokenizer.get_vocab()
    if isinstance(config.value, ModelInput):
        source = context.models["value"]
        if load_tokenizer(source).get_vocab() != vocabulary:
            raise ModelError(
                f"value {source.ref!r} has another vocabulary than the policy; it reads the policy's tokens. Use value: policy, or a "
                "reward model trained from the policy's family"
            )
        return ValueModel.from_pretrained(source, dtype=dtype, lora=config.lora, trainable=True)
    if config.value is None:
        for place, reward in leaves(config.reward, "reward").items():
            found = context.models.get(f"{place}.model")
            if found is None or reward.label is not None:
                continue
            if load_tokenizer(found).get_vocab() == vocabulary:
                return ValueModel.from_pretrained(found, dtype=dtype, lora=config.lora, trainable=True)
        context.runtime.console.print(f"{context.name}: no reward model has the policy's vocabulary; a copy of it is the value network")
    return ValueModel.from_policy(context.models["policy"], dtype=dtype, lora=config.lora, trainable=True)
