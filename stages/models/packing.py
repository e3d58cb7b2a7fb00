"""Padding-free passes: the sequences of a pass lie one behind the other in one row, and attention stays inside each of them.

B sequences of a pass, S tokens of all of them together, L tokens of the longest, H heads, D the width of a head.

A model can be packed if everything but its attention works on each token alone, if it takes position ids, and if its attention goes
through transformers' table of attention functions. Its class and config say so; then a few tokens are tried out, packed and alone.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, masking_utils

from stages.sampling.support import family_of, says_causal

logger = logging.getLogger(__name__)

PACKED = "stages_packed"  # the name of ``attend_packed`` in transformers' table of attention functions
REPLACED = ("sdpa", "flash_attention_2")  # attention that ``attend_packed`` computes the same as
UNDERSTOOD = {"full_attention", "sliding_attention"}  # kinds of layers in a config that it can compute
KERNELS = ("flash_attn", "torch", "padded")
"""Ways to attend inside each sequence, the fastest first: flash-attention's kernel for sequences of any lengths; the same kernel in
PyTorch; and queries, keys and values laid out with padding, for PyTorch's attention of rows, which works everywhere."""

PROBE_LENGTHS = (5, 9, 3)  # tokens of the sequences that are tried out
TOLERANCE = 1e-4  # of the hidden states' size, in fp32: far above rounding, far below what a look across sequences does
LOW_PRECISION_TOLERANCE = 5e-2  # the same in half precision
FAILURES = (RuntimeError, IndexError, ValueError, TypeError, AttributeError, AssertionError, KeyError, NotImplementedError, ImportError)


@dataclass(frozen=True)
class Packing:
    """Where the sequences of a packed row lie. Tensors are on the device of the pass."""

    positions: Tensor  # [1, S] place of each token in its own sequence
    starts: Tensor  # [B + 1] int32: the first token of each sequence, and S
    padded: Tensor  # [B, L] number of each token among S; behind the end of a sequence that of any token
    kept: Tensor  # [S] number of each token among B * L
    lengths: tuple[int, ...]
    kernel: str = "padded"
    windows: list[int | None] = field(default_factory=list, compare=False)  # of each layer that attended, where ``traced``
    traced: bool = False

    @property
    def longest(self) -> int:
        return max(self.lengths)


def packing_indices(lengths: Sequence[int]) -> list[Tensor]:
    """The tensors of a ``Packing``, in order and on the CPU, as int64."""
    counts = torch.tensor(lengths)
    total, longest = sum(lengths), max(lengths)
    starts = functional.pad(counts.cumsum(0), (1, 0))
    owners = torch.repeat_interleave(torch.arange(len(lengths)), counts, output_size=total)
    positions = torch.arange(total) - starts[owners]
    padded = (starts[:-1, None] + torch.arange(longest)).clamp(max=total - 1)
    return [positions[None], starts, padded, owners * longest + positions]


_now: Packing | None = None  # of the pass at work; not by thread, since autograd recomputes in threads of its own


@contextmanager
def packed_attention(packing: Packing | None, *models: Any) -> Iterator[None]:
    """Within it ``models`` attend inside the sequences of ``packing``; nothing changes where it is None.

    Backward passes of models with gradient checkpointing have to lie within it, too: they compute the layers again.
    """
    global _now
    if packing is None:
        yield
        return
    outer, _now = _now, packing
    configs = {id(config): config for model in models for config in (model.config, model.config.get_text_config())}
    usual = {key: config._attn_implementation for key, config in configs.items()}
    for config in configs.values():
        config._attn_implementation = PACKED
    try:
        yield
    finally:
        _now = outer
        for key, config in configs.items():
            config._attn_implementation = usual[key]


@contextmanager
def whole_rows() -> Iterator[None]:
    """Within it every row of a pass is one sequence, and transformers does not look for several.

    It would look at the position ids of every pass without a mask, and so make the CPU wait for the GPU. What it finds is the same.
    """
    usual = getattr(masking_utils, "find_packed_sequence_indices", None)
    if usual is not None:
        masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        if usual is not None:
            masking_utils.find_packed_sequence_indices = usual


def attend_packed(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each sequence of the packing at work. query [1, H, S, D], key and value [1, H or fewer, S, D]; returns
    [1, S, H, D]. Raises ValueError for what it does not compute (a mask, a bias, a cap on scores), so that a trial pass fails."""
    packing = _now
    assert packing is not None, "a packed model computes inside packed_attention only"
    refused = [name for name in ("softcap", "s_aux", "position_bias", "head_mask", "indexer_mask") if options.get(name) is not None]
    if attention_mask is not None or refused or options.get("is_causal") is False or query.shape[0] != 1 or key.shape[2] != query.shape[2]:
        raise ValueError(f"packed attention computes no {', '.join(refused) or 'mask, cache or look ahead'}")
    if packing.traced:
        packing.windows.append(sliding_window)
    if torch.is_autocast_enabled(query.device.type):  # as PyTorch's own attention does; positions make fp32 of queries and keys
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))  # [S, heads, D]
    attend = {"flash_attn": _by_flash_attn, "torch": _by_torch, "padded": _by_padding}[packing.kernel]
    return attend(packing, q, k, v, dropout, scaling, sliding_window)[None], None


AttentionInterface.register(PACKED, attend_packed)  # and no mask by this name: then transformers makes none


def _by_flash_attn(packing: Packing, q: Tensor, k: Tensor, v: Tensor, dropout: float, scaling: float | None, window: int | None) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    window_size = (-1, -1) if window is None or window >= packing.longest else (window - 1, 0)
    bounds = (packing.starts, packing.starts, packing.longest, packing.longest)
    return flash_attn_varlen_func(q, k, v, *bounds, dropout_p=dropout, softmax_scale=scaling, causal=True, window_size=window_size)


def _by_torch(packing: Packing, q: Tensor, k: Tensor, v: Tensor, dropout: float, scaling: float | None, window: int | None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    if dropout:
        raise ValueError("PyTorch's attention of any lengths has no dropout")
    if k.shape[1] != q.shape[1]:  # not every version of it shares keys among heads
        k, v = (states.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for states in (k, v))
    window_size = (-1, 0) if window is None or window >= packing.longest else (window - 1, 0)
    bounds = (packing.starts, packing.starts, packing.longest, packing.longest)
    attended = varlen_attn(q, k, v, *bounds, scale=scaling, window_size=window_size)
    assert isinstance(attended, Tensor)  # a pair only where the log-sum-exp is asked for
    return attended


def _by_padding(packing: Packing, q: Tensor, k: Tensor, v: Tensor, dropout: float, scaling: float | None, window: int | None) -> Tensor:
    rows, longest = packing.padded.shape
    flat = packing.padded.flatten()
    # [B, heads, L, D]. Behind its end a row has tokens of others: no token of the row looks there, and what they see is dropped.
    query, key, value = (states.index_select(0, flat).view(rows, longest, *states.shape[1:]).transpose(1, 2) for states in (q, k, v))
    if k.shape[1] != q.shape[1]:
        key, value = (states.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for states in (key, value))
    band = None
    if window is not None and window < longest:
        places = torch.arange(longest, device=q.device)
        distance = places[:, None] - places
        band = (distance >= 0) & (distance < window)
    options: dict[str, Any] = {"attn_mask": band, "is_causal": band is None, "dropout_p": dropout, "scale": scaling}
    made = functional.scaled_dot_product_attention(query, key, value, **options)
    return made.transpose(1, 2).reshape(rows * longest, *made.shape[1:2], made.shape[-1]).index_select(0, packing.kept)


# Which models can be packed

_found: WeakKeyDictionary[Any, str | None] = WeakKeyDictionary()
_said: set[str] = set()


def packing_kernel(decoder: Any, precision: Any) -> str | None:
    """The kernel with which passes of ``decoder`` (a transformer without its output layer) can be packed; None where they cannot, which
    the log then says once. ``precision`` makes the context of a pass (autocast)."""
    if decoder not in _found:
        _found[decoder], said = _tried(decoder, precision)
        known = f"{type(decoder).__name__} {_found[decoder]}"
        if known not in _said:
            _said.add(known)
            (logger.info if _found[decoder] else logger.warning)("%s: %s", type(decoder).__name__, said)
    return _found[decoder]


def _tried(decoder: Any, precision: Any) -> tuple[str | None, str]:
    """(kernel, what to say of it)."""
    if reason := why_not(decoder):
        return None, f"its passes are padded, not packed: {reason}"
    reasons = []
    for kernel in usable_kernels(next(decoder.parameters()).device.type):
        with precision():
            problem = _problem(decoder, kernel)
        torch.clear_autocast_cache()  # a cast that was made without gradient must not be used by a pass with gradient
        if problem is None:
            return kernel, f"the sequences of a pass are packed; attention by {kernel}"
        reasons.append(f"{kernel}: {problem}")
    return None, f"its passes are padded, not packed: {'; '.join(reasons)}"


def why_not(decoder: Any) -> str:
    """Why the class or the config of ``decoder`` cannot be packed, in a clause; empty where a trial decides."""
    config = decoder.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    if "position_ids" not in inspect.signature(family_of(decoder).forward).parameters:
        return "it takes no position ids"
    if not getattr(decoder, "_supports_attention_backend", False):
        return "its class has an attention of its own"
    if config._attn_implementation not in REPLACED:
        return f"its attention is {config._attn_implementation}"
    if kinds - UNDERSTOOD:
        return f"it has layers of the kind {', '.join(sorted(kinds - UNDERSTOOD))}"
    if getattr(config, "attention_chunk_size", None):
        return "it attends in chunks"
    if any(isinstance(module, nn.Conv1d | nn.RNNBase) for module in decoder.modules()):
        return "it has layers that mix neighbouring tokens"
    if not says_causal(decoder):
        return "it does not say that its attention is causal"
    return ""


@cache
def usable_kernels(device_type: str) -> tuple[str, ...]:
    """Those of KERNELS that are installed and fit the device, the fastest first."""
    found = ["padded"]
    if device_type != "cuda":
        return tuple(found)
    try:
        from torch.nn.attention.varlen import varlen_attn

        if {"scale", "window_size"} <= set(inspect.signature(varlen_attn).parameters):
            found.insert(0, "torch")
    except ImportError:
        pass
    try:
        import flash_attn  # noqa: F401

        found.insert(0, "flash_attn")
    except ImportError:
        pass
    return tuple(found)


@torch.no_grad()
def _problem(decoder: Any, kernel: str) -> str | None:
    """What is wrong with packed passes by ``kernel``; None where a few sequences have the hidden states that they have alone."""
    config = decoder.config.get_text_config()
    device, size = next(decoder.parameters()).device, decoder.get_input_embeddings().weight.shape[0]
    rows = [torch.arange(1 + place, 1 + place + length, device=device) * 7 % size for place, length in enumerate(PROBE_LENGTHS)]
    packing = make_packing(PROBE_LENGTHS, device, kernel=kernel, traced=True)
    training = decoder.training
    decoder.eval()
    try:
        with packed_attention(packing, decoder):
            inputs = {"input_ids": torch.cat(rows)[None], "position_ids": packing.positions}
            found = decoder(**inputs, use_cache=False).last_hidden_state[0].float()
        expected = torch.cat([decoder(input_ids=row[None], use_cache=False).last_hidden_state[0].float() for row in rows])
    except torch.OutOfMemoryError:
        raise
    except FAILURES as error:
        return f"a trial fails ({type(error).__name__}: {' '.join(str(error).split())[:120]})"
    finally:
        decoder.train(training)
    if _slides(config) != sum(window is not None for window in packing.windows):
        return "not every layer says how far it looks back"
    difference = float((found - expected).norm() / expected.norm().clamp(min=torch.finfo(torch.float32).tiny))
    exact = next(decoder.parameters()).dtype == torch.float32 and not torch.is_autocast_enabled(device.type)
    if difference <= (TOLERANCE if exact else LOW_PRECISION_TOLERANCE):
        return None
    return f"its hidden states would differ by {difference:.0%}"


def _slides(config: Any) -> int:
    """How many layers look back a limited distance, as the config says."""
    if kinds := getattr(config, "layer_types", None):
        return sum(kind == "sliding_attention" for kind in kinds)
    return config.num_hidden_layers if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True) else 0


def make_packing(lengths: Sequence[int], device: Any, *, kernel: str = "padded", traced: bool = False) -> Packing:
    """The packing of sequences of ``lengths`` tokens, on ``device``."""
    positions, starts, padded, kept = (tensor.to(device) for tensor in packing_indices(lengths))
    return Packing(positions, starts.to(torch.int32), padded, kept, tuple(lengths), kernel, traced=traced)
