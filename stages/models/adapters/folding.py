"""Fold low-rank adapters: layers that read the same input compute their updates together, and several roles can share one pass.

peft's layers keep their parameters, names and saved form; only their ``forward`` is replaced (``kernels/low_rank.py``), for plain LoRA
and for PiSSA and OLoRA. With DoRA and other variants, with active dropout, with sharded or merged weights, peft's own forward runs.

Layers with the same input (queries, keys and values; gate and up) are found by a trial pass, not by their names.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from stages.errors import is_out_of_memory
from stages.kernels.low_rank import Update, UpdatedLayer, updated_layers
from stages.kernels.matmul import PLAIN, Linear
from stages.models.adapters.variants import Started
from stages.sampling.support import PASS_FAILURES, no_cache

logger = logging.getLogger(__name__)

TRIAL_TOKENS = 2

_roles: tuple[tuple[str, ...], ...] | None = None
"""Adapters of each part of the tokens; None: the active ones for all tokens. Not thread-local, because autograd recomputes in other
threads."""


def fold_adapters(model: nn.Module) -> Counter[str]:
    """Replace the forward of the low-rank layers of ``model``, and find out which of them read the same input.

    Call it again after adapters were added or layers were removed. Returns the number of layers per class, of newly replaced ones only.
    """
    switched: Counter[str] = Counter()
    kinds = _foldable_kinds()
    for module in model.modules():
        if type(module) in kinds:
            switched[type(module).__name__] += 1
            kind: Any = type(module)
            module.__class__ = _folded(kind)
    layers = {module: name for name, module in model.named_modules() if isinstance(module, _Folded)}
    for layer in layers:
        layer.fold_followers, layer.fold_shared = (), None
    for leader, *followers in _same_inputs(model, layers):
        shared = _Shared()
        leader.fold_followers, leader.fold_shared = tuple(followers), shared
        for follower in followers:
            follower.fold_shared = shared
    return switched


@contextmanager
def roles_together(*roles: Sequence[str]) -> Iterator[None]:
    """Context manager for passes whose tokens are divided into equal parts, one per role: adapters (lowest first) of each part.

    All adapted layers must be folded (``why_not_together``). With gradient checkpointing, the backward pass must be inside as well, because
    it recomputes the layers.
    """
    global _roles
    outer, _roles = _roles, tuple(tuple(names) for names in roles)
    try:
        yield
    finally:
        _roles = outer


def why_not_together(model: nn.Module, *roles: Sequence[str]) -> str:
    """A clause that says why passes of ``roles`` through ``model`` cannot be combined; empty if they can."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    names = {name for role in roles for name in role}
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper) and names & set(module._get_available_adapters()):
            return f"an adapter has full copies or rows of {name}"
        if isinstance(module, _Folded):
            if module.merged or not all(map(module.can_fold, names)):
                return f"the adapter of {name} is not plain LoRA"
        elif isinstance(module, BaseTunerLayer) and names & set(module._all_available_adapter_names()):
            return f"the adapter of {name} is not plain LoRA of a linear layer"
    return ""


class _Shared:
    """Outputs of layers that were computed with those of an earlier layer, until they are asked for."""

    def __init__(self) -> None:
        self.x: Tensor | None = None
        self.outputs: dict[int, Tensor] = {}  # id of a layer -> its output

    def put(self, x: Tensor, outputs: dict[int, Tensor]) -> None:
        self.x, self.outputs = x, outputs

    def take(self, x: Tensor, layer: nn.Module) -> Tensor | None:
        """The output of ``layer`` for ``x`` if it is known. It is no longer kept afterwards."""
        if self.x is not x:
            return None
        output = self.outputs.pop(id(layer), None)
        if not self.outputs:
            self.x = None
        return output

    def __deepcopy__(self, memo: dict[int, object]) -> _Shared:
        return _Shared()


class _Folded(nn.Module):
    """Mixin for peft's LoRA layers. A leader also computes the outputs of its followers, which read the same input."""

    fold_followers: tuple[_Folded, ...] = ()
    fold_shared: _Shared | None = None
    active_adapters: list[str]
    disable_adapters: bool
    merged: bool
    base_layer: Any
    lora_A: Any
    lora_B: Any
    lora_dropout: Any
    lora_variant: dict[str, object]
    lora_bias: dict[str, bool]
    scaling: dict[str, float]

    def forward(self, x: Tensor, *inputs: object, **named: object) -> Tensor:
        if inputs or named:
            return super().forward(x, *inputs, **named)
        if torch.compiler.is_compiling():
            return self._traced(x)
        if self.fold_shared is not None and not self.fold_followers:
            known = self.fold_shared.take(x, self)
            if known is not None:
                return known
        parts = None if _is_decoding_step(x) else self._updates()
        if parts is None:
            return super().forward(x)
        if not any(parts):
            return self.base_layer(x)
        others = [follower._updates() for follower in self.fold_followers]
        if self.fold_shared is None or not all(other is not None and any(other) for other in others):
            return _outputs(x, [(self, parts)])[0]
        first, *rest = _outputs(x, [(self, parts), *zip(self.fold_followers, others, strict=True)])
        if rest:
            self.fold_shared.put(x, {id(layer): output for layer, output in zip(self.fold_followers, rest, strict=True)})
        return first

    def can_fold(self, adapter: str) -> bool:
        """Whether ``adapter`` is plain LoRA here, or does not change this layer."""
        if adapter not in self.lora_A:
            return True
        dropout = self.lora_dropout[adapter]
        return (
            (adapter not in self.lora_variant or isinstance(self.lora_variant[adapter], Started))
            and not self.lora_bias.get(adapter, False)
            and (type(dropout) is nn.Identity or dropout.p == 0.0 or not dropout.training)
            and is_plain(self.lora_A[adapter])
            and is_plain(self.lora_B[adapter])
        )

    def frozen_weight(self, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """Weight [o, d] and bias of the base layer; (None, None) if the layer itself must compute its output."""
        base = self.base_layer
        weight: Any = getattr(base, "weight", None)
        bias: Any = getattr(base, "bias", None)
        is_linear = type(base) in (nn.Linear, Linear) or isinstance(base, Conv1D)
        if not is_linear or not is_plain(base):
            return None, None
        if weight.requires_grad or (bias is not None and bias.requires_grad):
            return None, None
        if weight.dtype != dtype and not torch.is_autocast_enabled(weight.device.type):
            return None, None
        return (weight.T if isinstance(base, Conv1D) else weight), bias

    def _updates(self) -> tuple[tuple[Update, ...], ...] | None:
        """The updates of each part of the tokens; None if peft's own forward must run."""
        roles = self._foldable_roles()
        if roles is None:
            return None
        return tuple(tuple(update for name in role if name in self.lora_A for update in self._updates_by(name)) for role in roles)

    def _updates_by(self, name: str) -> Iterator[Update]:
        """The updates by one adapter: its own, and the negative one that it started from."""
        start, scaling = self.lora_variant.get(name), self.scaling[name]
        if isinstance(start, Started):
            yield Update(start.a, start.b, -scaling)
        yield Update(self.lora_A[name].weight, self.lora_B[name].weight, scaling)

    def _foldable_roles(self) -> tuple[tuple[str, ...], ...] | None:
        """The adapters of each part of the tokens; None if peft's own forward must run."""
        if self.merged or (_roles is None and self.disable_adapters):
            return None
        roles = (tuple(self.active_adapters),) if _roles is None else _roles
        if not all(self.can_fold(name) for role in roles for name in role):
            assert _roles is None, "call why_not_together before roles_together"
            return None
        return roles

    def _traced(self, x: Tensor) -> Tensor:
        """The output in plain operations, for torch.compile, which joins them itself."""
        updates = self._updates()
        if updates is None:
            return super().forward(x)
        output = self.base_layer(x)
        if not any(updates):
            return output
        flat, result = x.reshape(-1, x.shape[-1]), output.reshape(-1, output.shape[-1])
        size = flat.shape[0] // len(updates)
        parts = []
        for index, own_updates in enumerate(updates):
            part, own = result[index * size : (index + 1) * size], flat[index * size : (index + 1) * size]
            for update in own_updates:
                product = functional.linear(functional.linear(own.to(update.a.dtype), update.a), update.b)
                part = part + (product * update.scaling).to(part.dtype)
            parts.append(part)
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(output.shape)


def _is_decoding_step(x: Tensor) -> bool:
    """Whether ``x`` has one token per row, on a CPU and without gradient. There peft's forward is faster.

    Other passes do not switch, because the rounding must be the same with and without gradient.
    """
    return x.is_cpu and x.dim() == 3 and x.shape[1] == 1 and _roles is None and not torch.is_grad_enabled()


def is_plain(module: Any) -> bool:
    """Whether a module's weight can be read without calling the module: not sharded, and gathered by no hook."""
    return type(module.weight) in PLAIN and not module._forward_pre_hooks and not module._forward_hooks


def _outputs(x: Tensor, layers: Sequence[tuple[_Folded, tuple[tuple[Update, ...], ...] | None]]) -> tuple[Tensor, ...]:
    """The outputs of ``layers``, each with its updates, for the same input."""
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    else:
        dtype = next(update.a.dtype for _, parts in layers for part in parts or () for update in part)
    described = []
    for layer, parts in layers:
        assert parts is not None
        weight, bias = layer.frozen_weight(dtype)
        described.append(UpdatedLayer(parts, weight, bias, None if weight is not None else layer.base_layer(x)))
    return updated_layers(x, described, dtype)


def _foldable_kinds() -> tuple[type[nn.Module], ...]:
    """peft's LoRA classes whose forward can be replaced."""
    from peft.tuners.lora import layer

    kinds: list[type[nn.Module]] = [layer.Linear]
    try:
        from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt
    except ImportError:  # no bitsandbytes, so no quantized layers
        return tuple(kinds)
    return (*kinds, Linear4bit, Linear8bitLt)


@cache
def _folded(kind: Any) -> type[nn.Module]:  # Any, because mypy takes classes of modules for unhashable
    return type(kind.__name__, (_Folded, kind), {"__module__": kind.__module__})


def _same_inputs(model: nn.Module, layers: dict[_Folded, str]) -> list[list[_Folded]]:
    """Layers that read the same input in a trial pass, in the order of their calls: siblings of one parent, two or more.

    A layer that is called several times in a pass is left out. If the pass fails, every layer computes alone.
    """
    siblings = Counter(name.rpartition(".")[0] for name in layers.values())
    if max(siblings.values(), default=0) < 2:
        return []
    calls: list[tuple[_Folded, Tensor, int]] = []

    def note(layer: Any, inputs: tuple[Tensor, ...]) -> None:
        calls.append((layer, inputs[0], inputs[0]._version))

    handles = [layer.register_forward_pre_hook(note) for layer in layers]
    try:
        _trial(model)
    except PASS_FAILURES as error:
        if is_out_of_memory(error):
            raise
        logger.debug("adapters compute alone: a trial pass failed (%s: %s)", type(error).__name__, error)
        return []
    finally:
        for handle in handles:
            handle.remove()
    times = Counter(id(layer) for layer, _, _ in calls)
    groups: list[list[_Folded]] = []
    before: tuple[object, ...] = ()
    for layer, x, version in calls:
        now = (id(x), version, layers[layer].rpartition(".")[0])
        if now == before and times[id(layer)] == 1 and times[id(groups[-1][-1])] == 1:
            groups[-1].append(layer)
        else:
            groups.append([layer])
        before = now
    return [group for group in groups if len(group) > 1]


@torch.no_grad()
def _trial(model: Any) -> None:
    """A pass over a few tokens without gradient and without dropout."""
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    weight = plain.get_input_embeddings().weight
    modes = {module: module.training for module in plain.modules()}
    plain.eval()
    try:
        ids = torch.arange(1, 1 + TRIAL_TOKENS, device=weight.device)[None] % len(weight)
        plain(input_ids=ids, attention_mask=torch.ones_like(ids), **no_cache(plain))
    finally:
        for module, training in modes.items():
            module.training = training
