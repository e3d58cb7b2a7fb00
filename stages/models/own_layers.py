"""The one place where layers of a loaded model are switched to this project's: products by oneDNN, and lean norms and MLPs.

A switch changes a module's class to a subclass of the one it had. What the module computes stays the same but for rounding. Parameters,
names and saved form stay exactly as they were.
"""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

import torch
from torch import nn
from transformers.models.deberta.modeling_deberta import DisentangledSelfAttention
from transformers.pytorch_utils import Conv1D

from stages.kernels.matmul import linear, use_fast_matmuls
from stages.models.lean import use_lean_layers

logger = logging.getLogger(__name__)


def use_own_layers(model: nn.Module) -> Counter[str]:
    """Switch the layers of ``model`` for which this project has a faster or leaner class.

    Returns how many modules of each class were switched, and logs it (level info).
    """
    switched = use_fast_matmuls(model, {Conv1D: FastConv1D}) + use_lean_layers(model) + _leave_autocast(model)
    if switched:
        named = ", ".join(f"{count} {name}" for name, count in sorted(switched.items()))
        logger.info("%s: layers switched to this project's own: %s", type(model).__name__, named)
    return switched


class FastConv1D(Conv1D):
    """GPT-2's kind of linear layer (weight [K, N]), computed with ``linear``."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight.T, self.bias)


class PlainDebertaAttention(DisentangledSelfAttention):
    """The attention of DeBERTa (v1), outside of autocast: inside, it fills bf16 scores with the smallest fp32 number, which fails."""

    def forward(self, *inputs: Any, **named: Any) -> Any:
        weight: Any = self.in_proj.weight  # of the base where an adapter is on it

        def cast(value: Any) -> Any:
            return value.to(weight.dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

        with torch.autocast(weight.device.type, enabled=False):
            return super().forward(*map(cast, inputs), **{name: cast(value) for name, value in named.items()})


def _leave_autocast(model: nn.Module) -> Counter[str]:
    switched: Counter[str] = Counter()
    for module in model.modules():
        if type(module) is DisentangledSelfAttention:
            module.__class__ = PlainDebertaAttention
            for bias in (module.q_bias, module.v_bias):  # transformers keeps them fp32 beside bf16 products
                bias.data = bias.data.to(module.in_proj.weight.dtype)
            switched["DisentangledSelfAttention"] += 1
    return switched
