"""DoRA above unmerged adapters, and adapters that start from a part of the weights (PiSSA, OLoRA) without a change of the base.

Both depend on the weights below an adapter. In peft these are the base's own, and PiSSA and OLoRA subtract their initial update from them.
Here they are the base's weights with the adapters below, and they do not change, because other roles use them. o outputs, d inputs, r rank.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from stages.errors import ModelError

if TYPE_CHECKING:
    from peft import PeftModel

Layer = Any
"""A layer of peft (LoraLayer). For mypy, its attributes could be tensors or modules."""
STARTS = ("pissa", "olora")
"""Values of peft's ``init_lora_weights`` with which an adapter starts from a part of the weights."""
OWN_STARTS = (*STARTS, "orthogonal")
"""Values that peft cannot use with quantized weights."""
INT8_MAX = 127


class Dora:
    """The computation of DoRA (a variant of peft's layers) whose magnitudes belong to the weights with the adapters ``below``."""

    def __init__(self, below: Sequence[str]) -> None:
        self.below = tuple(below)

    def forward(self, module: Layer, active_adapter: str, x: Tensor, result: Tensor, **_: object) -> Tensor:
        """``result`` [..., o] of the base and the adapters below for ``x`` [..., d], with this adapter."""
        dropout, bias = module.lora_dropout[active_adapter], getattr(module.get_base_layer(), "bias", None)
        drops = module.training and not isinstance(dropout, nn.Identity)
        added: Tensor = module.lora_magnitude_vector[active_adapter](
            dropout(x),
            lora_A=module.lora_A[active_adapter],
            lora_B=module.lora_B[active_adapter],
            scaling=module.scaling[active_adapter],
            base_layer=SimpleNamespace(weight=weight_with(module, self.below), bias=bias),
            base_result=None if drops else result,
            adapter_name=active_adapter,
        )
        return result + added

    def merge_safe(self, module: Layer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """The weight with this adapter, from ``orig_weight``, which contains the adapters below."""
        changed = orig_weight.float() + module.get_delta_weight(active_adapter).float()
        factor = module.lora_magnitude_vector[active_adapter].weight / _norms(changed, module)
        return (changed * (factor if module.fan_in_fan_out else factor[:, None])).to(orig_weight.dtype)


class Started(nn.Module):
    """The computation of LoRA without its initial update (a variant of peft's layers): scaling (b a - b0 a0).

    ``a`` [r, d] and ``b`` [o, r] are a0 and b0. They are neither trained nor saved.
    """

    a: Tensor
    b: Tensor

    def __init__(self, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.register_buffer("a", a.detach().clone(), persistent=False)
        self.register_buffer("b", b.detach().clone(), persistent=False)

    def forward(self, module: Layer, active_adapter: str, x: Tensor, result: Tensor, **_: object) -> Tensor:
        """``result`` [..., o] of the base and the adapters below for ``x`` [..., d], with this adapter."""
        lora_a, lora_b = module.lora_A[active_adapter], module.lora_B[active_adapter]
        trained = lora_b(lora_a(module.lora_dropout[active_adapter](x)))
        return result + (trained - functional.linear(functional.linear(x, self.a), self.b)) * module.scaling[active_adapter]

    def merge_safe(self, module: Layer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """The weight with this adapter, from ``orig_weight``, which contains the adapters below."""
        start = self.b @ self.a * module.scaling[active_adapter]
        delta = module.get_delta_weight(active_adapter) - (start.T if module.fan_in_fan_out else start)
        return (orig_weight.float() + delta).to(orig_weight.dtype)


@torch.no_grad()
def weight_with(layer: Layer, names: Sequence[str]) -> Tensor:
    """The weight of an adapted linear layer with the adapters ``names``, lowest first, as if they were merged. It is not quantized."""
    weight = _unquantized(layer.get_base_layer())
    for name in names:
        if name in layer.lora_A:
            variant, weight = layer.lora_variant.get(name), weight.float()
            weight = weight + layer.get_delta_weight(name) if variant is None else variant.merge_safe(layer, name, weight)
    return weight.detach()


def _unquantized(base: Layer) -> Tensor:
    """The weight of a linear layer, with the values that it computes with if it is quantized."""
    from peft.utils.integrations import dequantize_module_weight

    if type(base).__name__ != "Linear8bitLt":
        weight: Tensor = dequantize_module_weight(base)
        return weight
    # Before the first pass of an int8 layer on a CPU, peft's function would remove what the layer computes with.
    scales = base.weight.SCB if base.state.SCB is None else base.state.SCB
    return base.weight.data * (scales.to(base.weight.device)[:, None] / INT8_MAX)


def _norms(weight: Tensor, layer: Layer) -> Tensor:
    """The norm of the weights of each output."""
    return torch.linalg.norm(weight.float(), dim=0 if layer.fan_in_fan_out else 1)


def use_weights_below(model: PeftModel, name: str, below: Sequence[str], start: str | None) -> None:
    """Let the adapter ``name`` depend on the weights with the adapters ``below``. Call it after peft added the adapter.

    ``start``: the value of ``init_lora_weights`` if it is one of OWN_STARTS; peft must not get it. Weights of a saved adapter are loaded
    afterwards. Raises ModelError if the adapter cannot be computed.
    """
    for path, layer in adapted_layers(model, name):
        own = [other for other in below if other in layer.lora_A or other in layer.lora_embedding_A]
        if start == "orthogonal":
            if name in layer.lora_A and not getattr(layer, "parameter_name", None):
                with _stand_in(layer, torch.empty(0, device=layer.lora_A[name].weight.device)):
                    layer.orthogonal_init(name)
        elif start is not None:
            _start(path, layer, name, own, start)
        elif own and name in layer.lora_magnitude_vector:
            if name not in layer.lora_A:
                raise ModelError(f"a DoRA adapter of {path} cannot be computed above another adapter of this embedding")
            layer.lora_variant[name] = Dora(own)
            layer.lora_magnitude_vector[name].weight.data = _norms(weight_with(layer, own), layer)


def adapted_layers(model: PeftModel, name: str) -> Iterator[tuple[str, Layer]]:
    """(name, layer) of the layers with a low-rank update by the adapter ``name``."""
    from peft.tuners.lora import LoraLayer

    for path, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and (name in layer.lora_A or name in layer.lora_embedding_A):
            yield path.removeprefix("base_model.model."), layer


def _start(path: str, layer: Layer, name: str, below: Sequence[str], start: str) -> None:
    """Set the weights of a new adapter to a part of the weights of its layer, and let its computation leave that part out."""
    if name not in layer.lora_A or getattr(layer, "parameter_name", None):
        raise ModelError(
            f"init_lora_weights={start!r} is impossible for {path}, which is no linear layer. Leave it out, or write "
            "init_lora_weights: true"
        )
    weight = weight_with(layer, below).float()
    rank, fewest = layer.r[name], min(weight.shape)
    if rank > fewest:
        raise ModelError(f"init_lora_weights={start!r} needs a rank of at most {fewest} for {path}, but it is {rank}. Lower lora.r")
    transposed = bool(getattr(layer, "fan_in_fan_out", False))
    with _stand_in(layer, (weight.T if transposed and start == "olora" else weight).clone()):
        if start == "olora":
            layer.olora_init(name)
        else:
            layer.pissa_init(name, start)
    started = Started(layer.lora_A[name].weight, layer.lora_B[name].weight)
    layer.add_module(f"start_{name}", started)
    layer.lora_variant[name] = started


@contextmanager
def _stand_in(layer: Layer, weight: Tensor) -> Iterator[None]:
    """Context manager in which the base of a layer has another weight, which peft may read and change."""
    base, other = layer.base_layer, nn.Module()
    other.weight = nn.Parameter(weight, requires_grad=False)
    layer.base_layer = other
    try:
        yield
    finally:
        layer.base_layer = base


def write_as_lora(model: PeftModel, name: str, folder: Path, *, prefix: str = "") -> None:
    """Convert the saved adapter ``name`` of ``model`` in ``folder`` to plain LoRA of twice the rank, if it has a start.

    b a - b0 a0 = [b, -b0] [a; a0]. So it belongs to the unchanged base, in every program. ``prefix``: what the names of its modules in
    ``model`` have before those in the file.
    """
    starts = {
        path: layer.lora_variant[name] for path, layer in adapted_layers(model, name) if isinstance(layer.lora_variant.get(name), Started)
    }
    if not starts:
        return
    file = folder / "adapter_model.safetensors"
    weights = load_file(file)
    for path, start in starts.items():
        own = f"base_model.model.{path.removeprefix(prefix)}"
        a, b = f"{own}.lora_A.weight", f"{own}.lora_B.weight"
        weights[a] = torch.cat([weights[a], start.a.to(weights[a]).cpu()]).contiguous()
        weights[b] = torch.cat([weights[b], -start.b.to(weights[b]).cpu()], dim=1).contiguous()
    save_file(weights, file, metadata={"format": "pt"})
    written = folder / "adapter_config.json"
    config = json.loads(written.read_text(encoding="utf-8"))
    factor = 2**0.5 if config["use_rslora"] else 2.0  # the scaling alpha / r, or alpha / sqrt(r), stays the same
    config["r"], config["lora_alpha"] = 2 * config["r"], factor * config["lora_alpha"]
    config["rank_pattern"] = {key: 2 * rank for key, rank in config["rank_pattern"].items()}
    config["alpha_pattern"] = {key: factor * alpha for key, alpha in config["alpha_pattern"].items()}
    written.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
