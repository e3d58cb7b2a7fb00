"""Combine the adapters of a model into one plain low-rank adapter, for a server that applies one adapter at a time.

The update of a module by several adapters is the sum of scaling * B A, which equals a single product of concatenated matrices:
[s1 B1, s2 B2] [A1; A2]. So the combined adapter is lossless, and its rank is the sum of the ranks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor

from stages.errors import ModelError
from stages.models.adapters.activation import active_adapters, is_adapter_layer, wrappers_of
from stages.models.adapters.saved import BEFORE, TOKENS, SavedAdapter, fitted, module_of, read_adapter
from stages.models.adapters.variants import Started
from stages.sampling.support import plain_model, weight_of

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

    from stages.model_types import TransformersModel
    from stages.registry.references import ResolvedModel


@dataclass(frozen=True)
class Update:
    """The update of a module's weight by one adapter: ``b`` [outputs, r] times ``a`` [r, inputs], with the scaling in ``b``; fp32."""

    a: Tensor
    b: Tensor


@torch.no_grad()
def updates_of(model: TransformersModel, merged: Sequence[ResolvedModel] = ()) -> dict[str, list[Update]]:
    """The low-rank updates of every adapted module of ``model``, by the module's dotted name in the plain transformers model.

    They come from the active adapters of ``model`` (a PeftModel, or a model without adapters) and from ``merged``: adapters, the lowest
    first, that are already merged into the weights of ``model`` and are read from their files. Raises ModelError if an adapter has parts
    other than low-rank updates.
    """
    updates: dict[str, list[Update]] = {}
    plain = plain_model(model)
    for adapter in merged:
        for name, update in _saved_updates(fitted(read_adapter(adapter), plain)):
            updates.setdefault(name, []).append(update)
    for name, update in _acting_updates(model):
        updates.setdefault(name, []).append(update)
    return updates


def total_rank(updates: dict[str, list[Update]]) -> int:
    """The rank of the combined adapter; 0 if there are no updates."""
    return max((sum(len(update.a) for update in parts) for parts in updates.values()), default=0)


def write_adapter(updates: dict[str, list[Update]], folder: Path, base: str) -> None:
    """Write ``updates`` as one adapter in peft's format. ``base``: the base model in its config.

    Modules with a smaller rank are padded with zeros, because some servers expect the same rank everywhere.
    """
    from peft import LoraConfig

    rank = total_rank(updates)
    weights: dict[str, Tensor] = {}
    for name, parts in updates.items():
        a, b = torch.cat([part.a for part in parts]), torch.cat([part.b for part in parts], dim=1)
        missing = rank - len(a)
        weights[f"{BEFORE}{name}.lora_A.weight"] = torch.nn.functional.pad(a, (0, 0, 0, missing)).contiguous()
        weights[f"{BEFORE}{name}.lora_B.weight"] = torch.nn.functional.pad(b, (0, missing)).contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    targets = sorted({name.rpartition(".")[2] for name in updates})
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, task_type="CAUSAL_LM", base_model_name_or_path=base)
    config.inference_mode = True
    config.save_pretrained(str(folder))


def _acting_updates(model: TransformersModel) -> Iterator[tuple[str, Update]]:
    """Updates of the active adapters of ``model``, the lowest first for each module."""
    from peft.tuners import lora

    acting = active_adapters(model)
    if not acting:
        return
    for wrapper in wrappers_of(model):
        for name in acting:
            if name in wrapper._get_available_adapters():
                kind = "rows of the embedding" if getattr(wrapper, "token_adapter", None) is not None else "full modules"
                raise ModelError(_refusal(f"the adapter {name!r} has {kind} besides its low-rank updates"))
    for module_name, layer in plain_model(model).named_modules():
        if is_adapter_layer(layer):
            assert isinstance(layer, lora.LoraLayer)  # adapters of other types are refused when they are read
            for name in acting:
                if (update := _layer_update(layer, module_name, name)) is not None:
                    yield module_name, update


def _layer_update(layer: LoraLayer, module_name: str, name: str) -> Update | None:
    """The update of a layer by the adapter ``name``; None if that adapter does not change the layer."""
    if name in getattr(layer, "lora_embedding_A", {}):
        raise ModelError(_refusal(f"the adapter {name!r} changes the embedding {module_name}"))
    if name not in layer.lora_A or name not in layer.lora_B:
        return None
    start = layer.lora_variant.get(name)
    if (start is not None and not isinstance(start, Started)) or getattr(layer, "lora_bias", {}).get(name):
        raise ModelError(_refusal(f"the adapter {name!r} on {module_name} is a variant of LoRA (such as DoRA), or has a bias"))
    if getattr(layer, "parameter_name", None):
        raise ModelError(_refusal(f"the adapter {name!r} on {module_name} changes a parameter, not a linear layer"))
    a, b = weight_of(layer.lora_A[name]), weight_of(layer.lora_B[name])
    if isinstance(start, Started):
        a, b = torch.cat([a, start.a]), torch.cat([b, -start.b], dim=1)
    return _update(a, b, float(layer.scaling[name]))


def _saved_updates(saved: SavedAdapter) -> Iterator[tuple[str, Update]]:
    """Updates of a saved adapter, with the module names of the model that it was fitted to."""
    config = saved.config
    if (
        saved.changes_base
        or saved.start
        or config.modules_to_save
        or any(name.endswith(TOKENS) or "lora_embedding" in name for name in saved.weights)
    ):
        raise ModelError(_refusal(f"the adapter {saved.ref!r} has full modules or rows of the embedding, or changes weights of its base"))
    is_plain = all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in saved.weights)
    if not is_plain or config.target_parameters or config.use_qalora or config.use_bdlora is not None:
        raise ModelError(
            _refusal(f"the adapter {saved.ref!r} is a variant of LoRA (such as DoRA), or changes parameters other than linear layers")
        )
    for name, a in saved.weights.items():
        if not name.endswith(".lora_A.weight"):
            continue
        module_name = module_of(name)
        alphas = config.alpha_pattern or {}
        key = next((key for key in alphas if re.match(rf"(.*\.)?({key})$", module_name)), None)
        alpha, rank = alphas[key] if key is not None else config.lora_alpha, len(a)
        scaling = alpha / rank**0.5 if config.use_rslora else alpha / rank
        yield module_name, _update(a, saved.weights[name.replace(".lora_A.", ".lora_B.")], scaling)


def _update(a: Tensor, b: Tensor, scaling: float) -> Update:
    return Update(a.detach().float().cpu(), b.detach().float().cpu() * scaling)


def _refusal(problem: str) -> str:
    return (
        f"{problem}, but a vLLM server can load only low-rank updates. Export the merged model (stages models export) and use that "
        "folder, train without such parts, or use generation.engine: local"
    )
