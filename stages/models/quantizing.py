"""Load weights in nf4 or int8: bitsandbytes quantizes the values of the checkpoint, in layers that can be trained with an adapter."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from stages.config import ModelInput
from stages.errors import ModelError
from stages.models.families import no_linear_layers

if TYPE_CHECKING:
    from stages.registry.references import ResolvedModel

logger = logging.getLogger(__name__)
QUANTIZED_LAYERS = ("Linear4bit", "Linear8bitLt")
STANDS_FOR = "stands_for"
"""Attribute of a layer that stands for a quantized one in a memory plan: (its quantization, the type of its device)."""
REPACKS = "support_avx512bf16_for_cpu"  # attribute of bitsandbytes' 4-bit layers


def quantization_config(model: ModelInput, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """The bitsandbytes settings of a model input (None: not quantized). Matrix products use ``dtype``."""
    if model.quantization == "none":
        return None

    if model.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=model.double_quantization,
    )


def quantization_of(layer: nn.Module) -> tuple[str, str]:
    """(quantization, type of the device) of a layer. Also for one that stands for a quantized layer in a memory plan."""
    if (planned := getattr(layer, STANDS_FOR, None)) is not None:
        quantization, device = planned
        return quantization, device
    weight = getattr(layer, "weight", None)
    kind = {"Linear4bit": "nf4", "Linear8bitLt": "int8"}.get(type(layer).__name__, "none")
    return kind, weight.device.type if isinstance(weight, torch.Tensor) else ""


@contextmanager
def weights_quantized_as_stored() -> Iterator[None]:
    """Context manager in which transformers reads weights in fp32 before bitsandbytes quantizes them.

    transformers alone rounds them to the compute dtype first. Then a checkpoint in fp32 or fp16 would have other quantized weights in bf16,
    where an adapter is trained, than in fp32, where it is merged.
    """
    own = PreTrainedModel._get_dtype_plan

    def plan(self: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.dtype]:
        names = [re.escape(name) for name, module in self.named_modules() if type(module).__name__ in QUANTIZED_LAYERS]
        unrounded = {rf"^(?:{'|'.join(names)})\.weight$": torch.float32} if names else {}
        return {**unrounded, **own(self, dtype)}

    PreTrainedModel._get_dtype_plan = plan  # type: ignore[method-assign]
    try:
        yield
    finally:
        PreTrainedModel._get_dtype_plan = own  # type: ignore[method-assign]


def refuse_unquantized(loaded: nn.Module, model: ResolvedModel) -> None:
    """Raise ModelError if bitsandbytes quantized no layer. Warn if it left most weights unquantized.

    It quantizes only plain linear layers. Falcon has its own layer class, and experts are often one tensor.
    """
    layers = [module for module in loaded.modules() if type(module).__name__ in QUANTIZED_LAYERS]
    taken = sum(layer.in_features * layer.out_features for layer in layers if isinstance(layer, nn.Linear))
    if taken == 0:
        raise ModelError(no_linear_layers(type(loaded).__name__, model.input.quantization, model.ref))
    left = sum(parameter.numel() for parameter in loaded.parameters() if parameter.is_floating_point() and parameter.ndim > 2)
    if left > taken:
        logger.warning(
            "quantization: %s covers %.0f %% of the large weights of %s; its experts are not linear layers and stay unquantized",
            model.input.quantization,
            100 * taken / (taken + left),
            model.ref,
        )


def keep_4bit_layout(model: nn.Module, dtype: torch.dtype) -> None:
    """Let 4-bit weights be read in ``dtype``, and disable their repacking on a CPU.

    bitsandbytes repacks them at the first evaluation. This fails for widths that are not a multiple of 32, and training cannot read the
    result.
    """
    for module in model.modules():
        if hasattr(module, REPACKS):
            setattr(module, REPACKS, False)
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            state.dtype = dtype
