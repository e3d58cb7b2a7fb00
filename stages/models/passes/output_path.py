"""Check whether a language model's logits equal its output matrix times its last hidden states, without further operations.

Some families cap their logits (Gemma 2), scale them (Cohere, Granite) or scale the hidden states before the output matrix (MiniCPM). With
the current weights such an operation may be invisible: a cap of 30 has no effect on logits near 0. The check therefore does not depend on
the weights. It replaces first the hidden states and then the logits by large random numbers, and compares what arrives at the next step.

T tokens, d hidden size, V rows of the output matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stages.models.parts import evaluation_mode
from stages.sampling.support import plain_model

if TYPE_CHECKING:
    from transformers.utils import ModelOutput

    from stages.model_types import TransformersModel

HIDDEN_SPREAD = 30.0  # standard deviation of the random hidden states
LOGIT_SPREAD = 300.0  # the test logits cover [-300, 300] evenly, beyond every cap in use


@torch.no_grad()
def multiplies_directly(
    model: TransformersModel, decoder: nn.Module, output: nn.Module, precision: Callable[[], AbstractContextManager[object]]
) -> bool:
    """Whether ``model(ids).logits`` is ``output(decoder(ids).last_hidden_state)`` for any weights, in training and evaluation mode.

    ``model``: a causal language model, possibly inside a PeftModel; ``decoder`` and ``output`` are parts of it. ``precision()`` is the
    autocast context of later passes. Random number generators and the model's mode are restored.
    """
    device = next(model.parameters()).device
    ids = torch.arange(2, 6, device=device)[None] % model.config.get_text_config().vocab_size
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), precision(), evaluation_mode(model):
        direct = decoder(input_ids=ids, use_cache=False).last_hidden_state
        probes = [_probe(model, output, ids)]
        model.train()
        probes.append(_probe(model, output, ids))
    hidden = probes[0].own_hidden
    return hidden is not None and torch.equal(direct, hidden) and all(probe.passed for probe in probes)


class _Probe:
    """Tensors recorded in one forward pass with replaced values. ``own_hidden`` [1, T, d]: the hidden states that the model computed."""

    def __init__(self) -> None:
        self.own_hidden: Tensor | None = None
        self.drawn_hidden: Tensor | None = None
        self.drawn_logits: Tensor | None = None
        self.multiplied: Tensor | None = None  # input of the output matrix
        self.logits: Tensor | None = None  # output of the model

    @property
    def passed(self) -> bool:
        """Whether the replaced hidden states reached the output matrix, and the replaced logits the caller, unchanged."""
        pairs = ((self.drawn_hidden, self.multiplied), (self.drawn_logits, self.logits))
        return all(_unchanged(sent, arrived) for sent, arrived in pairs)


def _unchanged(sent: Tensor | None, arrived: Tensor | None) -> bool:
    """Whether the same values arrived, up to a cast to another dtype."""
    if sent is None or arrived is None or sent.shape != arrived.shape:
        return False
    return torch.equal(sent.to(arrived.dtype), arrived)


def _probe(model: TransformersModel, output: nn.Module, ids: Tensor) -> _Probe:
    probe = _Probe()
    with _replaced(model, output, probe):
        probe.logits = model(input_ids=ids, use_cache=False).logits
    return probe


@contextmanager
def _replaced(model: TransformersModel, output: nn.Module, probe: _Probe) -> Iterator[None]:
    """Replace the last hidden states of every transformer inside ``model``, and the output of ``output``, by random numbers."""
    generator = torch.Generator().manual_seed(0)

    def replace_hidden(module: nn.Module, inputs: object, outputs: ModelOutput) -> ModelOutput | None:
        own = getattr(outputs, "last_hidden_state", None)
        if own is None:
            return None
        if probe.drawn_hidden is None:  # the innermost transformer; outer ones get the same values
            probe.drawn_hidden = (torch.randn(own.shape, generator=generator) * HIDDEN_SPREAD).to(own)
            probe.own_hidden = own
        outputs.last_hidden_state = probe.drawn_hidden
        return outputs

    def replace_logits(module: nn.Module, inputs: tuple[Tensor, ...], outputs: Tensor) -> Tensor:
        probe.multiplied = inputs[0]
        even = torch.linspace(-LOGIT_SPREAD, LOGIT_SPREAD, outputs.numel())[torch.randperm(outputs.numel(), generator=generator)]
        probe.drawn_logits = even.view(outputs.shape).to(outputs)
        return probe.drawn_logits

    plain = plain_model(model)
    transformers = [module for module in plain.modules() if isinstance(module, PreTrainedModel) and module is not plain]
    handles = [module.register_forward_hook(replace_hidden) for module in transformers]
    handles.append(output.register_forward_hook(replace_logits))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
