"""The adapters of a model as one plain low-rank adapter, for a server that computes one adapter at a time.

The update of a module by several adapters is the sum of scaling * B A over them, which is one product of their matrices side by side:
[s1 B1, s2 B2] [A1; A2]. The sum of the ranks is its rank, so nothing is lost.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stages.errors import ModelError
from stages.models.adapters import active_adapters, adapter_layers_of, plain_model, wrappers_of
from stages.models.saved_adapters import BEFORE, TOKENS, SavedAdapter, fitted, module_of, read_adapter

if TYPE_CHECKING:
    from stages.registry.references import ResolvedModel


@dataclass(frozen=True)
class Update:
    """What one adapter adds to the weight of a module: ``b`` [outputs, r] times ``a`` [r, inputs], the scaling in ``b``; fp32."""

    a: Tensor
    b: Tensor


@torch.no_grad()
def updates_of(model: Any, merged: Sequence[ResolvedModel] = ()) -> dict[str, list[Update]]:
    """The low-rank updates of every adapted module of ``model``, by the module's dotted name in the plain transformers model.

    They are those of the adapters that act in ``model`` (a PeftModel, or one without adapters), on top of those in ``merged``: adapters
    whose updates are in the weights of ``model`` already and are read from their files, the lowest first. Raises ModelError where an
    adapter changes more than low-rank updates can say.
    """
    found: dict[str, list[Update]] = {}
    plain = plain_model(model)
    for adapter in merged:
        for name, update in _saved_updates(fitted(read_adapter(adapter), plain)):
            found.setdefault(name, []).append(update)
    for name, update in _acting_updates(model):
        found.setdefault(name, []).append(update)
    return found


def total_rank(updates: dict[str, list[Update]]) -> int:
    """The rank of the one adapter that holds ``updates``; 0 where there are none."""
    return max((sum(len(update.a) for update in parts) for parts in updates.values()), default=0)


def write_adapter(updates: dict[str, list[Update]], folder: Path, base: str) -> None:
    """Write ``updates`` as one adapter in peft's format. ``base``: what the adapter says that it belongs to.

    Modules of a smaller rank get rows and columns of zeros: some servers read one rank for all.
    """
    from peft import LoraConfig
    from safetensors.torch import save_file

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


def _acting_updates(model: Any) -> Iterator[tuple[str, Update]]:
    """Updates of the adapters that act in ``model``, the lowest first for each module."""
    acting = active_adapters(model)
    if not acting:
        return
    for wrapper in wrappers_of(model):
        for name in acting:
            if name in wrapper._get_available_adapters():
                kind = "rows of the embedding" if getattr(wrapper, "token_adapter", None) is not None else "whole modules"
                raise ModelError(_refusal(f"the adapter {name!r} holds {kind} beside its low-rank updates"))
    for place, module in plain_model(model).named_modules():
        for layer in adapter_layers_of(module):
            for name in acting:
                if name in layer.lora_A and name in layer.lora_B:
                    if getattr(layer, "use_dora", {}).get(name) or getattr(layer, "lora_bias", {}).get(name):
                        raise ModelError(_refusal(f"the adapter {name!r} on {place} has DoRA magnitudes or a bias"))
                    if getattr(layer, "parameter_name", None):
                        raise ModelError(_refusal(f"the adapter {name!r} on {place} changes a parameter, not a linear layer"))
                    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
                    yield place, _update(a, b, float(layer.scaling[name]))
                elif name in getattr(layer, "lora_embedding_A", {}):
                    raise ModelError(_refusal(f"the adapter {name!r} changes the embedding {place}"))


def _saved_updates(saved: SavedAdapter) -> Iterator[tuple[str, Update]]:
    """Updates of an adapter as it was saved, in the names of the model that it was fitted to."""
    config = saved.config
    if saved.changes_base or config.modules_to_save or any(name.endswith(TOKENS) or "lora_embedding" in name for name in saved.weights):
        raise ModelError(_refusal(f"the adapter {saved.ref!r} holds whole modules, rows of the embedding or biases"))
    if config.use_dora or config.target_parameters:
        raise ModelError(_refusal(f"the adapter {saved.ref!r} is a DoRA adapter, or changes parameters that are no linear layers"))
    for name, a in saved.weights.items():
        if not name.endswith(".lora_A.weight"):
            continue
        place = module_of(name)
        key = next((key for key in config.alpha_pattern if re.match(rf"(.*\.)?({key})$", place)), None)
        alpha, rank = config.alpha_pattern[key] if key is not None else config.lora_alpha, len(a)
        scaling = alpha / rank**0.5 if config.use_rslora else alpha / rank
        yield place, _update(a, saved.weights[name.replace(".lora_A.", ".lora_B.")], scaling)


def _update(a: Tensor, b: Tensor, scaling: float) -> Update:
    return Update(a.detach().float().cpu(), b.detach().float().cpu() * scaling)


def _refusal(problem: str) -> str:
    return (
        f"{problem}, and a vLLM server can load low-rank updates alone. Export the model merged (stages models export) and name that "
        "folder, train without such parts, or use generation.engine: local"
    )
