"""A stack of adapters on its loaded base: merged into whole weights, or apart from quantized ones. Every merge is checked by computing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from stages.errors import ModelError
from stages.models.adapters import add_adapter, merge, module_name, plain_model

if TYPE_CHECKING:
    from stages.models.saved_adapters import SavedAdapter

PROBE_TOKENS = 8
MERGE_TOLERANCE = 1e-3
"""Root mean square difference that merging may make, as a share of the outputs' own. fp32 rounding makes about 1e-6."""


def merged_stack(base: Any, adapters: Sequence[SavedAdapter], sizes: Sequence[int]) -> Any:
    """``base`` (fp32, a transformers model) with the adapters merged into its weights, the lowest first.

    ``sizes`` are the numbers of tokens of the adapters' tokenizers: the embedding has so many rows when an adapter is added. Raises
    ModelError where an adapter does not fit, or where the merged model computes something else than the adapter did.
    """
    for number, (adapter, size) in enumerate(zip(adapters, sizes, strict=True)):
        fit_embedding(base, adapter, size)
        model = add_adapter(base, adapter, f"below-{number}")
        if model is base:  # nothing of the adapter belongs to this kind of model
            continue
        before = _probe(model)
        base = merge(model)
        _check_merge(before, _probe(base), adapter.ref)
    return base


def stacked_apart(base: Any, adapters: Sequence[SavedAdapter], sizes: Sequence[int]) -> Any:
    """``base`` (quantized) under the adapters, which stay apart from its quantized layers; arguments as of ``merged_stack``.

    What an adapter changes of layers that are not quantized (embedding, output layer, heads) is merged into them.
    """
    model = base
    for number, (adapter, size) in enumerate(zip(adapters, sizes, strict=True)):
        fit_embedding(plain_model(model), adapter, size)
        laid = add_adapter(model, adapter, f"below-{number}")
        if laid is model and not hasattr(model, "peft_config"):
            continue
        before = _probe(laid)
        model = merge(laid, where=is_unquantized)
        _check_merge(before, _probe(model), adapter.ref)
    return model


def is_unquantized(layer: Any) -> bool:
    """Whether the weights of a layer are plain numbers."""
    weight = getattr(layer, "weight", None)
    return isinstance(weight, Tensor) and weight.is_floating_point() and not hasattr(weight, "quant_state")


def fit_embedding(model: Any, adapter: SavedAdapter, size: int) -> None:
    """Give the embedding the rows that it had when the adapter trained: those its weights tell, else at least ``size``."""
    from stages.models.loading import grow_embedding

    embedding = model.get_input_embeddings()
    rows = adapter.embedding_rows(module_name(model, embedding))
    if rows is None:
        grow_embedding(model, size)
    elif rows > embedding.weight.shape[0]:
        grow_embedding(model, rows)
    elif rows < embedding.weight.shape[0]:
        model.resize_token_embeddings(rows, mean_resizing=False)


def dequantized(model: Any) -> Any:
    """A quantized model as whole fp32 weights: those it computed with. Layers that were Conv1D (GPT-2) are Conv1D again."""
    from stages.models.loading import quiet_transformers

    transposed = [name for name, module in model.named_modules() if getattr(module, "source_cls", None) is Conv1D]
    with quiet_transformers():
        model = model.dequantize().float()
    for name in transposed:
        layer = model.get_submodule(name)
        made = Conv1D(layer.out_features, layer.in_features)
        made.weight = nn.Parameter(layer.weight.detach().T.contiguous(), requires_grad=False)
        if layer.bias is not None:
            made.bias = nn.Parameter(layer.bias.detach(), requires_grad=False)
        model.set_submodule(name, made)
    return model


@torch.no_grad()
def _probe(model: Any) -> Tensor:
    """What a model makes of a few tokens, spread over its vocabulary: logits, or hidden states without a head."""
    plain = plain_model(model)
    training = plain.training
    weight = plain.get_input_embeddings().weight
    ids = torch.linspace(1, weight.shape[0] - 1, PROBE_TOKENS, device=weight.device).long()[None]
    outputs = plain.eval()(input_ids=ids, attention_mask=torch.ones_like(ids))
    plain.train(training)
    found = getattr(outputs, "logits", None)
    return (outputs.last_hidden_state if found is None else found).float()


def _check_merge(before: Tensor, after: Tensor, ref: str) -> None:
    difference = float((after - before).pow(2).mean().sqrt())
    scale = float(before.pow(2).mean().sqrt())
    tolerance = MERGE_TOLERANCE if after.dtype == torch.float32 else 0.05
    if not difference <= tolerance * max(scale, 1e-6):
        raise ModelError(
            f"merging the adapter {ref!r} changes what the model computes (outputs differ by {difference:.2g}, and are {scale:.2g} large); "
            "use it with the quantization that it was trained on, and tell the project which model this is"
        )
