"""The only place that replaces layers of a loaded model: oneDNN matrix products, lean norms and MLPs, and folded adapters.

A module's class is changed to a subclass. Its outputs stay the same up to rounding. Parameters, names and the saved form do not change.
"""

from __future__ import annotations

import logging
from collections import Counter
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers.models.deberta.modeling_deberta import DisentangledSelfAttention
from transformers.pytorch_utils import Conv1D

from stages.kernels.matmul import linear, use_fast_matmuls
from stages.models.adapters.folding import fold_adapters
from stages.models.layers.lean import use_lean_layers
from stages.process.console import announce
from stages.process.environment import wants_own_layers
from stages.sampling.support import weight_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


def use_own_layers(model: nn.Module) -> Counter[str]:
    """Replace the layers of ``model`` for which this project has a faster or leaner class, unless STAGES_OWN_LAYERS=0 is set.

    DeBERTa's attention is always replaced, because it fails under autocast. Returns the number of replaced modules per class, and logs it
    (level info). Raises LaunchError for another value of STAGES_OWN_LAYERS than 0 and 1.
    """
    switched: Counter[str] = Counter()
    if wants_own_layers():
        switched = use_fast_matmuls(model, {Conv1D: FastConv1D}) + use_lean_layers(model)
    switched += leave_autocast(model)
    _say("replaced layers", model, switched)
    return switched


def use_folded_adapters(model: nn.Module) -> Counter[str]:
    """Let the adapters of ``model`` compute in few products, unless STAGES_OWN_LAYERS=0 is set.
    Call it after adapters were added, or layers removed.

    Returns the number of newly replaced modules per class, and logs it (level info).
    """
    switched = fold_adapters(model) if wants_own_layers() else Counter()
    _say("adapters folded", model, switched)
    return switched


def _say(what: str, model: nn.Module, switched: Counter[str]) -> None:
    """Log a replacement. The console gets the first one of a run for each kind and model class."""
    if not switched:
        return
    named = ", ".join(f"{count} {name}" for name, count in sorted(switched.items()))
    line = f"{type(model).__name__}: {what}: {named}"
    logger.info(line)
    announce(
        (what, type(model).__name__), f"{line} (faster or leaner, with equal outputs; STAGES_OWN_LAYERS=0 keeps those of transformers)"
    )


class FastConv1D(Conv1D):
    """GPT-2's linear layer (weight [K, N]), computed with ``linear``."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight.T, self.bias)


class PlainDebertaAttention(DisentangledSelfAttention):
    """DeBERTa v1's attention without autocast. Under autocast it fills bf16 scores with the smallest fp32 number, which fails."""

    def forward(self, *inputs: Any, **named: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        bias = self.q_bias  # in the dtype of the products; the weights may be quantized

        def converted(value: Any) -> Any:
            return value.to(bias.dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

        with torch.autocast(bias.device.type, enabled=False):
            return super().forward(*map(converted, inputs), **{name: converted(value) for name, value in named.items()})


def leave_autocast(model: nn.Module) -> Counter[str]:
    """Let DeBERTa v1 compute with bf16 weights and under autocast. Returns the number of replaced modules."""
    switched: Counter[str] = Counter()
    for module in model.modules():
        if type(module) is DisentangledSelfAttention:
            module.__class__ = PlainDebertaAttention
            weight = module.in_proj.weight
            # Quantized weights compute in the dtype of the others.
            dtype = weight.dtype if weight.is_floating_point() else weight_of(cast("PreTrainedModel", model).get_input_embeddings()).dtype
            for bias in (module.q_bias, module.v_bias):  # transformers keeps them in fp32, but the products are bf16
                bias.data = bias.data.to(dtype)
            switched["DisentangledSelfAttention"] += 1
    return switched
