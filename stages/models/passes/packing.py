"""Packed passes without padding: all sequences are concatenated into one row, and attention is restricted to each sequence.

B sequences of a pass, S tokens of all sequences, L tokens of the longest sequence, H heads, D width of a head.

A model can be packed if everything except attention works on single tokens, if it takes position ids, and if its attention uses
transformers' attention interface. Class and config are checked first; then a few tokens are computed packed and alone, and compared.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, masking_utils

from stages.errors import is_out_of_memory
from stages.models.parts import evaluation_mode
from stages.process.console import announce
from stages.sampling.support import PASS_FAILURES, family_of, plain_model, says_causal, weight_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from stages.model_types import TransformersModel

logger = logging.getLogger(__name__)

PACKED = "stages_packed"  # the name of ``attend_packed`` in transformers' attention interface
REPLACED = ("sdpa", "flash_attention_2")  # attention implementations that ``attend_packed`` is equivalent to
UNDERSTOOD = {"full_attention", "sliding_attention"}  # supported layer types of a config
KERNELS = ("flash_attn", "torch", "torch_repeated", "padded")
"""Attention kernels, the fastest first: flash-attention for variable lengths; the same in PyTorch; that by PyTorch's public function, with
a copy of the keys and values for each query head; and PyTorch's usual attention on padded queries, keys and values, which works
everywhere."""

PROBE_LENGTHS = (5, 9, 3)  # tokens of the test sequences
TOLERANCE = 1e-4  # relative, in fp32: far above rounding errors, far below the effect of attention across sequences
LOW_PRECISION_TOLERANCE = 5e-2  # the same in half precision
GRADIENT_TOLERANCE = 0.1  # relative, for the gradients of attention in any precision


@dataclass(frozen=True)
class Packing:
    """The layout of a packed row. Tensors are on the device of the pass."""

    positions: Tensor  # [1, S] position of each token in its sequence
    starts: Tensor  # [B + 1] int32: the first token of each sequence, and S
    padded: Tensor  # [B, L] index of each token among S; any valid index after the end of a sequence
    kept: Tensor  # [S] index of each token among B * L
    lengths: tuple[int, ...]
    kernel: str = "padded"
    windows: list[int | None] = field(default_factory=list, compare=False)  # sliding window of each attention layer, if ``traced``
    inputs: list[tuple[Tensor, Tensor, Tensor, float | None, int | None]] = field(default_factory=list, compare=False)
    """If ``traced``: queries, keys and values [S, heads, D], scaling and window of the first attention layer."""
    traced: bool = False

    @property
    def longest(self) -> int:
        return self.padded.shape[1]  # not from ``lengths``, which torch.compile would take for constants

    def twice(self) -> Packing:
        """The layout of a row with all sequences of this one two times."""
        size, places = self.positions.shape[1], self.padded.numel()
        starts = torch.cat([self.starts, self.starts[1:] + size])
        padded, kept = torch.cat([self.padded, self.padded + size]), torch.cat([self.kept, self.kept + places])
        return Packing(self.positions.repeat(1, 2), starts, padded, kept, self.lengths * 2, self.kernel)


def packing_indices(lengths: Sequence[int]) -> list[Tensor]:
    """The tensors of a ``Packing``, in order, on the CPU, in int64."""
    counts = torch.tensor(lengths)
    total, longest = sum(lengths), max(lengths)
    starts = functional.pad(counts.cumsum(0), (1, 0))
    owners = torch.repeat_interleave(torch.arange(len(lengths)), counts, output_size=total)
    positions = torch.arange(total) - starts[owners]
    padded = (starts[:-1, None] + torch.arange(longest)).clamp(max=total - 1)
    return [positions[None], starts, padded, owners * longest + positions]


_now: Packing | None = None  # packing of the current pass; not thread-local, because autograd recomputes in other threads


@contextmanager
def packed_attention(packing: Packing | None, *models: TransformersModel) -> Iterator[None]:
    """Context manager in which ``models`` attend only within the sequences of ``packing``. Does nothing if ``packing`` is None.

    With gradient checkpointing, the backward pass must be inside as well, because it recomputes the layers.
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
def one_sequence_per_row() -> Iterator[None]:
    """Context manager in which transformers treats every row of a pass as one sequence, without looking for several.

    Otherwise transformers checks the position ids of every pass without a mask, which makes the CPU wait for the GPU. The result is the
    same.
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
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **options: object,
) -> tuple[Tensor, None]:
    """Causal attention within each sequence of the current packing. query [1, H, S, D], key and value [1, H or fewer, S, D]; returns
    [1, S, H, D]. Raises ValueError for unsupported inputs (a mask, a bias, a soft cap), so that the test pass fails."""
    packing = _now
    assert packing is not None, "call a packed model only inside packed_attention"
    refused = [name for name in ("softcap", "s_aux", "position_bias", "head_mask", "indexer_mask") if options.get(name) is not None]
    if attention_mask is not None or refused or options.get("is_causal") is False or query.shape[0] != 1 or key.shape[2] != query.shape[2]:
        raise ValueError(f"packed attention does not support {', '.join(refused) or 'masks, caches or non-causal attention'}")
    if packing.traced:
        packing.windows.append(sliding_window)
    if torch.is_autocast_enabled(query.device.type):  # like PyTorch's attention; rotary positions convert queries and keys to fp32
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))  # [S, heads, D]
    if packing.traced and not packing.inputs:
        packing.inputs.append((q, k, v, scaling, sliding_window))
    return _attended(packing, q, k, v, dropout, scaling, sliding_window)[None], None


def _attended(packing: Packing, q: Tensor, k: Tensor, v: Tensor, dropout: float, scaling: float | None, window: int | None) -> Tensor:
    """Attention [S, H, D] by the kernel of ``packing``."""
    kernels = {"flash_attn": _by_flash_attn, "torch": _by_torch, "torch_repeated": _by_torch_repeated, "padded": _by_padding}
    # The kernels of PyTorch have no dropout.
    attend = _by_padding if dropout and packing.kernel.startswith("torch") else kernels[packing.kernel]
    return attend(packing, q, k, v, dropout, scaling, window)


AttentionInterface.register(PACKED, attend_packed)  # without registering a mask of this name, so that transformers creates none


def _by_flash_attn(packing: Packing, q: Tensor, k: Tensor, v: Tensor, dropout: float, scaling: float | None, window: int | None) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    window_size = (-1, -1) if window is None or window >= packing.longest else (window - 1, 0)
    bounds = (packing.starts, packing.starts, packing.longest, packing.longest)
    return flash_attn_varlen_func(q, k, v, *bounds, dropout_p=dropout, softmax_scale=scaling, causal=True, window_size=window_size)


def _by_torch(packing: Packing, q: Tensor, k: Tensor, v: Tensor, dropout: float, scaling: float | None, window: int | None) -> Tensor:
    """The operator behind PyTorch's ``varlen_attn``, with the same arguments.

    The public function is a Python operator, which takes four times as much time of the CPU per layer. In torch 2.11 it has no argument
    for keys with fewer heads, which the operator itself accepts: autograd then keeps keys and values with their own heads.
    """
    left, right = _torch_window(packing, window)
    bounds = (packing.starts, packing.starts, packing.longest, packing.longest)
    options = {"scale": scaling, "window_size_left": left, "window_size_right": right}
    attended: Tensor = torch.ops.aten._flash_attention_forward(q, k, v, *bounds, 0.0, left < 0, False, **options)[0]
    return attended


def _by_torch_repeated(
    packing: Packing, q: Tensor, k: Tensor, v: Tensor, dropout: float, scaling: float | None, window: int | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    if k.shape[1] != q.shape[1]:
        k, v = (states.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for states in (k, v))
    bounds = (packing.starts, packing.starts, packing.longest, packing.longest)
    attended = varlen_attn(q, k, v, *bounds, scale=scaling, window_size=_torch_window(packing, window))
    assert isinstance(attended, Tensor)  # a pair only where the log-sum-exp is asked for
    return attended


def _torch_window(packing: Packing, window: int | None) -> tuple[int, int]:
    """The earlier tokens (-1: all) and later tokens that a token attends to."""
    return (-1, 0) if window is None or window >= packing.longest else (window - 1, 0)


def _by_padding(packing: Packing, q: Tensor, k: Tensor, v: Tensor, dropout: float, scaling: float | None, window: int | None) -> Tensor:
    rows, longest = packing.padded.shape
    flat = packing.padded.flatten()
    # [B, heads, L, D]. After its end, a row has tokens of other sequences. Causality hides them from the row, and their outputs are
    # dropped.
    query, key, value = (states.index_select(0, flat).view(rows, longest, *states.shape[1:]).transpose(1, 2) for states in (q, k, v))
    if k.shape[1] != q.shape[1]:
        key, value = (states.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for states in (key, value))
    band = None
    if window is not None and window < longest:
        columns = torch.arange(longest, device=q.device)
        distance = columns[:, None] - columns
        band = (distance >= 0) & (distance < window)
    made = functional.scaled_dot_product_attention(
        query, key, value, attn_mask=band, is_causal=band is None, dropout_p=dropout, scale=scaling
    )
    return made.transpose(1, 2).reshape(rows * longest, *made.shape[1:2], made.shape[-1]).index_select(0, packing.kept)


# Which models can be packed

_kernels: WeakKeyDictionary[TransformersModel, str | None] = WeakKeyDictionary()
_logged: set[str] = set()


def packing_kernel(decoder: TransformersModel, precision: Callable[[], AbstractContextManager[object]]) -> str | None:
    """The kernel for packed passes of ``decoder`` (a transformer without its output layer); None if it cannot be packed (logged once).

    ``precision`` creates the context of a pass (autocast).
    """
    if decoder not in _kernels:
        _kernels[decoder], message = _tried(decoder, precision)
        known, line = f"{type(decoder).__name__} {_kernels[decoder]}", f"{type(decoder).__name__}: {message}"
        if known not in _logged:
            _logged.add(known)
            (logger.info if _kernels[decoder] else logger.warning)("%s", line)
        if _kernels[decoder] and next(decoder.parameters()).device.type == "cuda":
            announce(("packing", known), line)
    return _kernels[decoder]


def _tried(decoder: TransformersModel, precision: Callable[[], AbstractContextManager[object]]) -> tuple[str | None, str]:
    """(kernel, message for the log)."""
    if reason := why_not(decoder):
        return None, f"its passes are padded, not packed: {reason}"
    reasons = []
    for kernel in usable_kernels(next(decoder.parameters()).device.type):
        with precision():
            problem = _problem(decoder, kernel)
        torch.clear_autocast_cache()  # a cast made without gradient must not be reused by a pass with gradient
        if problem is None:
            return kernel, f"the sequences of a pass are packed; attention by {kernel}"
        reasons.append(f"{kernel}: {problem}")
    return None, f"its passes are padded, not packed: {'; '.join(reasons)}"


def why_not(decoder: TransformersModel) -> str:
    """A clause that says why the class or config of ``decoder`` cannot be packed; empty if a test pass decides."""
    decoder = plain_model(decoder)  # the forward pass of a PeftModel does not name its arguments
    config = decoder.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    if "position_ids" not in inspect.signature(family_of(decoder).forward).parameters:
        return "it does not accept position ids"
    if not getattr(decoder, "_supports_attention_backend", False):
        return "its class does not use transformers' attention interface"
    if config._attn_implementation not in REPLACED:
        return f"its attention is {config._attn_implementation}"
    if kinds - UNDERSTOOD:
        return f"it has layers of type {', '.join(sorted(kinds - UNDERSTOOD))}"
    if getattr(config, "attention_chunk_size", None):
        return "it attends in chunks"
    if any(isinstance(module, nn.Conv1d | nn.RNNBase) for module in decoder.modules()):
        return "it has layers that mix neighbouring tokens"
    if not says_causal(decoder):
        return "it is not declared causal"
    return ""


@cache
def usable_kernels(device_type: str) -> tuple[str, ...]:
    """The kernels of KERNELS that are installed and support the device, the fastest first."""
    kernels = ["padded"]
    if device_type != "cuda":
        return tuple(kernels)
    try:
        from torch.nn.attention.varlen import varlen_attn

        if {"scale", "window_size"} <= set(inspect.signature(varlen_attn).parameters):
            kernels.insert(0, "torch_repeated")
    except ImportError:
        pass
    if hasattr(torch.ops.aten, "_flash_attention_forward"):
        kernels.insert(0, "torch")
    try:
        import flash_attn  # noqa: F401

        kernels.insert(0, "flash_attn")
    except ImportError:
        pass
    except Exception as error:  # a package that was built for another version of PyTorch or CUDA
        logger.warning("the package flash_attn is not used: its import fails (%s: %s)", type(error).__name__, str(error)[:120])
    return tuple(kernels)


@torch.no_grad()
def _problem(decoder: TransformersModel, kernel: str) -> str | None:
    """The problem of packed passes by ``kernel``; None if packed and separate test sequences have the same hidden states."""
    config = decoder.config.get_text_config()
    device, size = next(decoder.parameters()).device, weight_of(decoder.get_input_embeddings()).shape[0]
    rows = [torch.arange(1 + start, 1 + start + length, device=device) * 7 % size for start, length in enumerate(PROBE_LENGTHS)]
    packing = make_packing(PROBE_LENGTHS, device, kernel=kernel, traced=True)
    try:
        with evaluation_mode(decoder):
            with packed_attention(packing, decoder):
                inputs = {"input_ids": torch.cat(rows)[None], "position_ids": packing.positions}
                packed = decoder(**inputs, use_cache=False).last_hidden_state[0].float()
            expected = torch.cat([decoder(input_ids=row[None], use_cache=False).last_hidden_state[0].float() for row in rows])
        gradient_error = _gradient_error(kernel, packing)
    except (*PASS_FAILURES, ImportError) as error:
        if is_out_of_memory(error):
            raise
        return f"a test pass failed ({type(error).__name__}: {' '.join(str(error).split())[:120]})"
    if _slides(config) != sum(window is not None for window in packing.windows):
        return "not every layer passes its sliding window"
    difference = float((packed - expected).norm() / expected.norm().clamp(min=torch.finfo(torch.float32).tiny))
    is_fp32 = next(decoder.parameters()).dtype == torch.float32 and not torch.is_autocast_enabled(device.type)
    if not difference <= (TOLERANCE if is_fp32 else LOW_PRECISION_TOLERANCE):
        return f"its hidden states would differ by {difference:.0%}"
    if not gradient_error <= GRADIENT_TOLERANCE:
        return f"the gradients of its attention would differ by {gradient_error:.0%}"
    return None


@torch.inference_mode(False)
@torch.enable_grad()
def _gradient_error(kernel: str, traced: Packing) -> float:
    """The largest relative difference of a gradient by ``kernel`` from that of padded attention in fp32, for the first layer of a traced
    pass."""
    if kernel == "padded" or not traced.inputs:
        return 0.0
    *inputs, scaling, window = traced.inputs[0]
    gradients = []
    for name, dtype in ((kernel, inputs[0].dtype), ("padded", torch.float32)):
        packing = make_packing(traced.lengths, inputs[0].device, kernel=name)
        q, k, v = leaves = [states.clone().to(dtype).requires_grad_() for states in inputs]
        output = _attended(packing, q, k, v, 0.0, scaling, window)
        upstream = torch.linspace(-1.0, 1.0, output.numel(), device=output.device).view(output.shape).to(dtype)
        gradients.append(torch.autograd.grad(output, leaves, upstream))
    pairs = [(own.float(), expected) for own, expected in zip(*gradients, strict=True)]
    tiny = torch.finfo(torch.float32).tiny
    return max(float((own - expected).norm() / expected.norm().clamp(min=tiny)) for own, expected in pairs)


def _slides(config: PretrainedConfig) -> int:
    """The number of layers with a sliding window, according to the config."""
    if kinds := getattr(config, "layer_types", None):
        return sum(kind == "sliding_attention" for kind in kinds)
    return config.num_hidden_layers if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True) else 0


def make_packing(lengths: Sequence[int], device: torch.device | str, *, kernel: str = "padded", traced: bool = False) -> Packing:
    """The packing of sequences of ``lengths`` tokens, on ``device``."""
    positions, starts, padded, kept = (tensor.to(device) for tensor in packing_indices(lengths))
    return Packing(positions, starts.to(torch.int32), padded, kept, tuple(lengths), kernel, traced=traced)
