"""Put a stack of adapters on its loaded base: merged into full weights, or unmerged on quantized ones. Every merge is verified."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from stages.errors import ModelError, is_out_of_memory
from stages.models.adapters.activation import adapted
from stages.models.adapters.attaching import add_adapter
from stages.models.adapters.merging import merge
from stages.models.classifiers.inputs import ended
from stages.models.embeddings import grow_embedding
from stages.models.parts import evaluation_mode, module_name
from stages.models.quiet import quiet_transformers
from stages.models.verification import ROUNDED
from stages.sampling.support import no_cache, plain_model, weight_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from stages.model_types import TransformersModel
    from stages.models.adapters.saved import SavedAdapter

PROBE_TOKENS = 8


def merged_stack(base: PreTrainedModel, adapters: Sequence[SavedAdapter], sizes: Sequence[int]) -> PreTrainedModel:
    """Merge the adapters into ``base`` (fp32, a transformers model), lowest first.

    ``sizes``: numbers of tokens of the adapters' tokenizers; the embedding gets at least as many rows before the adapter is added. Raises
    ModelError if an adapter does not fit, or if the merged model computes different outputs.
    """
    for index, (adapter, size) in enumerate(zip(adapters, sizes, strict=True)):
        fit_embedding(base, adapter, size)
        model = add_adapter(base, adapter, f"below-{index}")
        if model is base:  # no weight of the adapter applies to this kind of model
            continue
        base = plain_model(_merged(model, adapter.ref))
    return base


def unmerged_stack(base: PreTrainedModel, adapters: Sequence[SavedAdapter], sizes: Sequence[int]) -> TransformersModel:
    """Put the adapters on the quantized ``base`` without merging them into quantized layers. Arguments as in ``merged_stack``.

    Changes of unquantized layers (embedding, output layer, heads) are merged.
    """
    model: TransformersModel = base
    for index, (adapter, size) in enumerate(zip(adapters, sizes, strict=True)):
        fit_embedding(plain_model(model), adapter, size)
        laid = add_adapter(model, adapter, f"below-{index}")
        if laid is model and not hasattr(model, "peft_config"):
            continue
        model = _merged(laid, adapter.ref, where=is_unquantized)
    return model


def _merged(model: TransformersModel, ref: str, *, where: Callable[[nn.Module], bool] | None = None) -> TransformersModel:
    """``merge`` with a check of the outputs. Raises ModelError if peft cannot merge the adapter ``ref``, or if it changes the outputs."""
    before = _probe(model)
    try:
        merged = merge(adapted(model), where=where)
    except (ValueError, TypeError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise ModelError(
            f"peft cannot merge the adapter {ref!r} into the weights of its base: {error} Load it with quantization (nf4 or int8), which "
            "keeps adapters unmerged, or train it again without that setting"
        ) from error
    _check_merge(before, _probe(merged), merged, ref)
    return merged


def is_unquantized(layer: nn.Module) -> bool:
    """Whether a layer's weights are unquantized."""
    weight = getattr(layer, "weight", None)
    return isinstance(weight, Tensor) and weight.is_floating_point() and not hasattr(weight, "quant_state")


def fit_embedding(model: PreTrainedModel, adapter: SavedAdapter, size: int) -> None:
    """Resize the embedding to its size when the adapter was trained: as its weights show, else at least ``size``."""
    embedding = model.get_input_embeddings()
    size_now = weight_of(embedding).shape[0]
    rows = adapter.embedding_rows(module_name(model, embedding))
    if rows is None:
        grow_embedding(model, size)
    elif rows > size_now:
        grow_embedding(model, rows)
    elif rows < size_now:
        model.resize_token_embeddings(rows, mean_resizing=False)


def dequantized(model: PreTrainedModel) -> PreTrainedModel:
    """Convert a quantized model to fp32 weights with the values that it computed with. GPT-2's Conv1D layers are restored."""
    transposed = [name for name, module in model.named_modules() if getattr(module, "source_cls", None) is Conv1D]
    with quiet_transformers():
        model = model.dequantize().float()
    for name in transposed:
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)  # as transformers dequantizes it
        made = Conv1D(layer.out_features, layer.in_features)
        made.weight = nn.Parameter(layer.weight.detach().T.contiguous(), requires_grad=False)
        if layer.bias is not None:
            made.bias = nn.Parameter(layer.bias.detach(), requires_grad=False)
        model.set_submodule(name, made)
    return model


@torch.no_grad()
def _probe(model: TransformersModel) -> Tensor:
    """A model's outputs for a few tokens from its vocabulary: logits, or hidden states if it has no head."""
    plain = plain_model(model)
    weight = weight_of(plain.get_input_embeddings())
    spread = torch.linspace(1, weight.shape[0] - 1, PROBE_TOKENS).long().tolist()
    ids = torch.tensor([ended(spread, plain.config)], device=weight.device)
    with evaluation_mode(plain):
        outputs = plain(input_ids=ids, attention_mask=torch.ones_like(ids), **no_cache(plain))
    logits = getattr(outputs, "logits", None)
    return (outputs.last_hidden_state if logits is None else logits).float()


def _check_merge(before: Tensor, after: Tensor, model: TransformersModel, ref: str) -> None:
    """Raise ModelError if merging the adapter ``ref`` has changed the outputs of ``model`` by more than rounding."""
    difference = float((after - before).pow(2).mean().sqrt())
    scale = float(before.pow(2).mean().sqrt())
    tolerance = ROUNDED[weight_of(plain_model(model).get_input_embeddings()).dtype]
    if not difference <= tolerance * max(scale, 1e-6):
        raise ModelError(
            f"merging the adapter {ref!r} changes its outputs (difference {difference:.2g}, output scale {scale:.2g}); "
            "use it with the quantization that it was trained on, and please report this model"
        )
