"""The networks of PPO and what is asked of them: log-probabilities of responses, and values before each response token.

B sequences, R response tokens, T = prompt and response, N counted tokens of a batch, V vocabulary, d hidden size. Rows are right padded
here: a forward pass over whole sequences needs no common end of the prompts, and rows of like length waste least.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stages.config import ModelInput
from stages.errors import ModelError
from stages.generation import right_pad
from stages.models.heads import ValueModel
from stages.models.loading import load_language_model, load_tokenizer
from stages.numerics.logprobs import entropy, token_logprobs
from stages.ppo.config import PPOStepConfig
from stages.runtime import StepContext


@dataclass(frozen=True)
class SequenceBatch:
    """Sequences (prompt, then response) as right-padded ids and mask [B, T].

    ``rows``, ``columns`` [N] name the positions that predict the response tokens, row by row; ``tokens`` [N] are those tokens.
    """

    input_ids: Tensor
    attention_mask: Tensor
    rows: Tensor
    columns: Tensor
    tokens: Tensor


def sequence_batch(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], pad_token_id: int, device: Any) -> SequenceBatch:
    """Join prompts and responses (token ids) row by row."""
    ids = right_pad([torch.tensor([*prompt, *response]) for prompt, response in zip(prompts, responses, strict=True)], pad_token_id)
    lengths = torch.tensor([len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)])
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    rows = torch.tensor([row for row, response in enumerate(responses) for _ in response])
    columns = torch.tensor(
        [len(prompt) - 1 + step for prompt, response in zip(prompts, responses, strict=True) for step in range(len(response))]
    )
    tokens = torch.tensor([token for response in responses for token in response])
    return SequenceBatch(ids.to(device), mask.to(device), rows.to(device), columns.to(device), tokens.to(device))


class Policy:
    """A causal language model, its temperature, and the way from its hidden states to logits at chosen positions only."""

    def __init__(self, model: Any, *, temperature: float, autocast: torch.dtype | None, shared_value_head: nn.Linear | None = None) -> None:
        self.model, self.temperature, self.autocast = model, temperature, autocast
        self.value_head = shared_value_head
        self.device = next(model.parameters()).device
        plain = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.decoder = getattr(plain, plain.base_model_prefix)
        self.output = plain.get_output_embeddings()
        # Some families rescale or cap their logits behind the output matrix; then the model has to make them itself.
        self.is_direct = self._direct_equals_model()

    def precision(self) -> AbstractContextManager[Any]:
        """Mixed precision of forward passes where the weights are wider than what the hardware computes in."""
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, self.autocast)

    def hidden(self, batch: SequenceBatch) -> Tensor:
        """Hidden states at the positions that predict response tokens [N, d]."""
        with self.precision():
            states = self.decoder(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).last_hidden_state
        return states[batch.rows, batch.columns]

    def logits(self, batch: SequenceBatch, hidden: Tensor | None = None) -> Tensor:
        """Logits [N, V] of the response tokens, and of nothing else."""
        with self.precision():
            if self.is_direct:
                return self.output(self.hidden(batch) if hidden is None else hidden)
            made = self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        return made[batch.rows, batch.columns]

    def logprobs(self, batch: SequenceBatch) -> Tensor:
        """Log-probabilities of the response tokens [N] fp32, at the sampling temperature."""
        return token_logprobs(self.logits(batch), batch.tokens, temperature=self.temperature)

    def logprobs_entropy_values(self, batch: SequenceBatch, *, want_entropy_gradient: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """Log-probabilities, entropies and, with a shared value head, values: each [N] fp32."""
        hidden = self.hidden(batch) if self.is_direct or self.value_head is not None else None
        logits = self.logits(batch, hidden)
        logprobs = token_logprobs(logits, batch.tokens, temperature=self.temperature)
        entropies = entropy(logits if want_entropy_gradient else logits.detach(), temperature=self.temperature)
        values = self.value_head(hidden.float()).squeeze(-1) if self.value_head is not None and hidden is not None else None
        return logprobs, entropies, values

    def values(self, batch: SequenceBatch) -> Tensor:
        """Values of the shared head [N]."""
        assert self.value_head is not None
        return self.value_head(self.hidden(batch).float()).squeeze(-1)

    @torch.no_grad()
    def _direct_equals_model(self) -> bool:
        if self.output is None:
            return False
        training = self.model.training
        self.model.eval()
        ids = torch.arange(2, 6, device=self.device)[None] % self.model.config.get_text_config().vocab_size
        with self.precision():
            direct = self.output(self.decoder(input_ids=ids, use_cache=False).last_hidden_state).float()
            whole = self.model(input_ids=ids, use_cache=False).logits.float()
        self.model.train(training)
        return torch.allclose(direct, whole, rtol=1e-3, atol=1e-3)


def sequence_values(model: ValueModel, batch: SequenceBatch, precision: AbstractContextManager[Any]) -> Tensor:
    """Values before each response token [N] fp32: the value network read at the position that predicts the token."""
    with precision:
        return model.score_tokens(batch.input_ids, batch.attention_mask)[batch.rows, batch.columns]


@dataclass
class Roles:
    """Everything a PPO step asks. ``value`` is None with a shared head; ``reference`` is None where the policy's adapter is switched off."""

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
        for index, reward in enumerate(config.reward):
            found = context.models.get(f"reward[{index}].model")
            if found is None or reward.label is not None:
                continue
            if load_tokenizer(found).get_vocab() == vocabulary:
                return ValueModel.from_pretrained(found, dtype=dtype, lora=config.lora, trainable=True)
        context.runtime.console.print(f"{context.name}: no reward model has the policy's vocabulary; the value network starts from the policy")
    return ValueModel.from_policy(context.models["policy"], dtype=dtype, lora=config.lora, trainable=True)
