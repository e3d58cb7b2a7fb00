"""The part of TRL's SFT and DPO that computes the log-probabilities of labels from the last hidden states.

TRL multiplies hidden states and output layer itself, to save memory. It knows caps and scales of logits by the names of some config fields.
Other families compute something else (RecurrentGemma and xLSTM: a cap with another name; ModernBERT's decoder: a layer before the output
layer), and TRL would train another likelihood. A test pass compares both; if they differ, the labels are scored by the model's own logits.

B sequences, T tokens, V vocabulary, N labels that count.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput

from stages.models.adapters.saved import base_of
from stages.models.parts import evaluation_mode
from stages.sampling.support import PASS_FAILURES, no_cache, plain_model, weight_of
from stages.training.reproducible import IGNORED

if TYPE_CHECKING:
    from transformers.modeling_outputs import CausalLMOutputWithPast
    from transformers.utils import ModelOutput
    from trl import DPOTrainer, SFTTrainer

logger = logging.getLogger(__name__)

LOGIT_SPREAD = 100.0  # standard deviation of the test's logits, beyond the caps in use
TOLERANCE = 0.02  # root mean square difference of the log-probabilities, relative to their size; half precision differs by less


def fit_label_head(trainer: SFTTrainer | DPOTrainer, precision: torch.dtype) -> None:
    """Correct what TRL's ``trainer`` assumes about its models: their logits, and whether they have a load-balancing loss.

    ``precision``: the dtype of the passes.
    """
    # Some configs have the settings of this loss, but their models do not compute it (Llama 4, Doge, or no layer with experts).
    if trainer.aux_loss_enabled and not _has_router_loss(plain_model(trainer.model)):
        trainer.aux_loss_enabled = False
        plain_model(trainer.model).config.get_text_config().output_router_logits = False
    for model in (trainer.model, getattr(trainer, "ref_model", None)):
        if model is not None and not _agrees(plain_model(model), precision):
            _score_by_own_logits(plain_model(model))


def _score_by_own_logits(plain: PreTrainedModel) -> None:
    """Let ``plain``, to which TRL has added its head, score labels by its own logits."""
    kind = type(plain)
    logger.warning("%s: training computes the logits of all tokens of a pass, because TRL computes other logits", kind.__name__)
    with_trl = plain.forward

    @functools.wraps(kind.forward)
    def forward(self: PreTrainedModel, *inputs: object, fused_lm_head: bool = False, **named: object) -> object:
        if not fused_lm_head:
            return with_trl(*inputs, **named)
        labels = named.pop("labels")
        assert isinstance(labels, Tensor)
        return scored(with_trl(*inputs, **{**named, **no_cache(self)}), labels)

    plain.forward = MethodType(forward, plain)


@torch.no_grad()
def _has_router_loss(plain: PreTrainedModel) -> bool:
    try:
        with evaluation_mode(plain):
            made = plain(input_ids=_ids(plain), output_router_logits=True, **no_cache(plain))
    except PASS_FAILURES:  # no layer has a router
        return False
    return isinstance(getattr(made, "aux_loss", None), Tensor)


def scored(outputs: CausalLMOutputWithPast, labels: Tensor) -> FusedCausalLMOutput:
    """TRL's results for ``labels`` [B, T] from a model's outputs. Values per token are 0 where a label does not count."""
    targets = labels[:, 1:]
    counted = targets != IGNORED
    assert outputs.logits is not None
    logits = outputs.logits[:, :-1][counted].float()
    tokens, logprobs = targets[counted], logits.log_softmax(dim=-1)
    chosen = logprobs.gather(1, tokens[:, None])[:, 0]
    with torch.no_grad():
        entropy = -(logprobs.exp() * logprobs).sum(dim=1)
        means, best = logits.mean(dim=1), logits.argmax(dim=1) == tokens
        squares = (2 * logprobs).logsumexp(dim=1)

    def spread(values: Tensor) -> Tensor:
        return values.new_zeros(counted.shape).masked_scatter(counted, values)

    return FusedCausalLMOutput(
        loss=-chosen.sum() / counted.sum().clamp(min=1),
        log_probs=spread(chosen),
        entropy=spread(entropy),
        log_sum_sq_probs=spread(squares),
        mean_logits=spread(means),
        is_top1=spread(best),
        label_mask=counted,
        aux_loss=getattr(outputs, "aux_loss", None),
    )


@torch.no_grad()
def _agrees(plain: PreTrainedModel, precision: torch.dtype) -> bool:
    """Whether TRL's head gives the log-probabilities of the model's own logits, for random hidden states that make large logits."""
    ids = _ids(plain)
    device = ids.device
    autocast = torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), evaluation_mode(plain), autocast, _drawn_hidden(plain):
        logits = plain(input_ids=ids, **no_cache(plain)).logits[:, :-1].float()
        expected = -functional.cross_entropy(logits[0], ids[0, 1:], reduction="none")
        try:
            actual = plain(input_ids=ids, labels=ids, fused_lm_head=True).log_probs[0]
        except PASS_FAILURES:
            return False
    torch.clear_autocast_cache()  # a cast made without gradient must not be reused by a pass with gradient
    difference, size = ((one.float().pow(2).mean().sqrt()) for one in (actual - expected, expected))
    return bool(difference <= TOLERANCE * size)


def _ids(plain: PreTrainedModel) -> Tensor:
    size = weight_of(base_of(plain.get_input_embeddings())).shape[0]
    return (torch.arange(3, 19, device=next(plain.parameters()).device) % size)[None]


@contextmanager
def _drawn_hidden(plain: PreTrainedModel) -> Iterator[None]:
    """Replace the last hidden states of the transformer inside ``plain`` by random ones, large enough to show a cap of the logits."""
    generator = torch.Generator().manual_seed(0)
    rows = weight_of(base_of(plain.get_output_embeddings())).float()
    spread = LOGIT_SPREAD / float(rows.norm(dim=1).mean().clamp(min=1e-3))
    drawn: list[Tensor] = []

    def replace(module: torch.nn.Module, inputs: object, outputs: ModelOutput) -> ModelOutput | None:
        own = getattr(outputs, "last_hidden_state", None)
        if own is None:
            return None
        if not drawn:
            drawn.append((torch.randn(own.shape, generator=generator) * spread).to(own))
        outputs.last_hidden_state = drawn[0]
        return outputs

    inner = [module for module in plain.modules() if isinstance(module, PreTrainedModel) and module is not plain]
    handles = [module.register_forward_hook(replace) for module in inner]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
