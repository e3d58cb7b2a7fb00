"""``torch.cuda`` of the pretended GPU: its properties, memory, streams and graphs. ``sitecustomize.py`` applies it. Import torch first."""

from __future__ import annotations

import atexit
import collections
import contextlib
import ctypes
import functools
import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

GIB = 1 << 30

waits: collections.Counter[str] = collections.Counter()
"""The operations that made the CPU wait for the device, since ``waits.clear()``."""
listeners: list[Callable[[str, str], None]] = []
"""Called with the kind (wait, random) and the name of each such operation, in the thread that ran it."""

_device: Any = None
_callback: Any = None  # kept, because C++ calls it


def adapt(device: ctypes.CDLL) -> None:
    """Make ``torch.cuda`` use the loaded device."""
    global _device, _callback
    _device = device
    for name in ("allocated", "peak", "limit_now", "uses"):
        getattr(device, f"pretend_{name}").restype = ctypes.c_int64
    device.pretend_limit.argtypes = [ctypes.c_int64]
    device.pretend_uses.argtypes = [ctypes.c_void_p]
    device.pretend_capturing.argtypes = [ctypes.c_bool]
    device.pretend_begin.restype = ctypes.c_bool
    if not device.pretend_begin():
        raise RuntimeError("this build of PyTorch does not accept the pretended GPU")
    device.pretend_limit(int(float(os.environ.get("PRETEND_GPU_GIB", "80")) * GIB))

    @ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p)
    def note(kind: bytes, name: bytes) -> None:
        if kind == b"wait":
            waits[name.decode()] += 1
        for listener in list(listeners):
            listener(kind.decode(), name.decode())

    _callback = note
    device.pretend_callback(note)
    atexit.register(device.pretend_callback, None)
    _properties()
    _memory()
    _streams()
    _flash_attention()


def set_limit(size: int) -> None:
    """Set the memory of the device in bytes. More raises torch.OutOfMemoryError."""
    _device.pretend_limit(size)


def _put(module: Any, **values: Any) -> None:
    for name, value in values.items():
        setattr(module, name, value)


def _properties() -> None:
    cuda = torch.cuda
    properties = SimpleNamespace(
        name="pretended H100", total_memory=_device.pretend_limit_now(), major=9, minor=0, multi_processor_count=132, uuid="0", warp_size=32
    )
    _put(
        cuda,
        _lazy_init=lambda: None,
        is_initialized=lambda: True,
        init=lambda: None,
        is_available=lambda: True,
        device_count=lambda: 1,
        current_device=lambda: 0,
        set_device=lambda device: None,
        get_device_name=lambda device=None: properties.name,
        get_device_capability=lambda device=None: (9, 0),
        get_device_properties=lambda device=None: properties,
        is_bf16_supported=lambda including_emulation=True: True,
        is_tf32_supported=lambda: True,
        get_arch_list=lambda: ["sm_90"],
        synchronize=_synchronize,
        manual_seed=lambda seed: None,
        manual_seed_all=lambda seed: None,
        get_rng_state=lambda device="cuda": torch.get_rng_state(),
        set_rng_state=lambda state, device="cuda": torch.set_rng_state(state),
        get_rng_state_all=lambda: [torch.get_rng_state()],
        set_rng_state_all=lambda states: torch.set_rng_state(states[0]),
        device=_DeviceGuard,
    )
    _put(
        cuda.random,
        **{name: getattr(cuda, name) for name in ("manual_seed", "manual_seed_all", "get_rng_state", "set_rng_state", "get_rng_state_all")},
        set_rng_state_all=cuda.set_rng_state_all,
    )
    torch.version.cuda = "13.0"
    # torch.random.fork_rng and checkpointing ask by device type.
    cuda._is_in_bad_fork = lambda: False


class _DeviceGuard:
    def __init__(self, device: Any) -> None: ...

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def _synchronize(device: Any = None) -> None:
    if graph.now is not None:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing (pretended device: synchronize)")


def _memory() -> None:
    def reset() -> None:
        _device.pretend_reset_peak()

    def free() -> tuple[int, int]:
        most = _device.pretend_limit_now()
        return most - _device.pretend_allocated(), most

    made = {
        "memory_allocated": lambda device=None: _device.pretend_allocated(),
        "max_memory_allocated": lambda device=None: _device.pretend_peak(),
        "memory_reserved": lambda device=None: _device.pretend_allocated(),
        "max_memory_reserved": lambda device=None: _device.pretend_peak(),
        "reset_peak_memory_stats": lambda device=None: reset(),
        "reset_max_memory_allocated": lambda device=None: reset(),
        "mem_get_info": lambda device=None: free(),
        "empty_cache": lambda: _synchronize(),
        "ipc_collect": lambda: None,
        "memory_stats": lambda device=None: {"allocated_bytes.all.current": _device.pretend_allocated()},
    }
    _put(torch.cuda, **made)
    _put(torch.cuda.memory, **made)


class Stream:
    """A stream. Everything runs immediately, so streams never wait."""

    current: Stream

    def __init__(self, device: Any = None, priority: int = 0, **_: Any) -> None:
        self.device = torch.device("cuda", 0)
        self.cuda_stream = id(self)

    def wait_stream(self, other: Stream) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        return event or Event()

    def synchronize(self) -> None:
        _synchronize()

    def query(self) -> bool:
        return True


class Event:
    def __init__(self, **_: Any) -> None: ...

    def record(self, stream: Any = None) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None:
        _synchronize()

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Any) -> float:
        return 0.0


def _streams() -> None:
    Stream.current = Stream()

    @contextlib.contextmanager
    def stream(chosen: Stream) -> Iterator[None]:
        before, Stream.current = Stream.current, chosen
        try:
            yield
        finally:
            Stream.current = before

    def set_stream(chosen: Stream) -> None:
        Stream.current = chosen

    _put(
        torch.cuda,
        Stream=Stream,
        Event=Event,
        stream=stream,
        set_stream=set_stream,
        current_stream=lambda device=None: Stream.current,
        default_stream=lambda device=None: Stream.current,
        CUDAGraph=CUDAGraph,
        graph=graph,
        graph_pool_handle=lambda: (0, next(_pools)),
        is_current_stream_capturing=lambda: graph.now is not None,
    )


# Graphs


def _counter() -> Iterator[int]:
    number = 0
    while True:
        number += 1
        yield number


_pools = _counter()
_recorded: dict[Any, list[_Tape]] = {}  # pool -> recordings that share its memory
_released: set[Any] = set()  # pools whose recordings were all freed
_held: collections.Counter[int] = collections.Counter()  # storage -> references that tapes hold


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


@functools.cache
def _uses_of_python() -> int:
    """References to a storage that ``_storage`` has seen, besides those of its tensors."""
    tensor = torch.ones(1, device="cuda")
    return int(_device.pretend_uses(_storage(tensor))) - 1


class _Tape(TorchDispatchMode):
    """Writes down the operations of a capture, and runs them again on the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []
        self.own: dict[int, Tensor] = {}  # storage -> a tensor that was made in the capture
        self.outside: dict[tuple[Any, ...], Tensor] = {}  # description -> a tensor over memory that was there before

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        outside = {_storage(tensor) for tensor in tree_leaves((arguments, options)) if isinstance(tensor, Tensor)} - self.own.keys()
        result = function(*arguments, **(options or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.is_cuda and _storage(tensor) not in outside:
                self.own.setdefault(_storage(tensor), tensor)
        self.operations.append((function, *(tree_map(self._described, part) for part in (arguments, options or {}, result))))
        return result

    def _described(self, value: Any) -> Any:
        """``value``, or for a tensor over memory from outside another tensor over it, so that the tape does not keep the first one."""
        if not isinstance(value, Tensor) or not value.is_cuda or _storage(value) in self.own:
            return value
        key = _storage(value), value.dtype, value.storage_offset(), value.shape, value.stride()
        if key not in self.outside:
            self.outside[key] = value.detach()
            _held[_storage(value)] += 1
        return self.outside[key]

    def forget(self) -> None:
        for tensor in self.outside.values():
            _held[_storage(tensor)] -= 1
        self.outside, self.own, self.operations = {}, {}, []

    def spoil(self) -> None:
        """Fill the memory of this recording, because recordings that share it write to it."""
        for tensor in self.own.values():
            if tensor.is_floating_point():
                tensor.detach().as_strided((tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0).fill_(float("nan"))

    def replay(self) -> None:
        for tensor in self.outside.values():
            # More references than the tapes hold: someone else still needs it, so a real graph would find the memory in place.
            if _device.pretend_uses(_storage(tensor)) <= _held[_storage(tensor)] + _uses_of_python():
                raise AssertionError(
                    f"a recorded graph reads memory that was freed: a tensor of sizes {tuple(tensor.shape)}, {tensor.dtype}"
                )
        for function, arguments, options, result in self.operations:
            aliases = [returned.alias_info for returned in function._schema.returns]
            if any(alias is not None and not alias.is_write for alias in aliases):
                continue  # a view, whose memory is where it was
            again = function(*arguments, **options)
            if any(alias is not None for alias in aliases):
                continue  # written in place
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old is not new:
                    old.copy_(new)


class CUDAGraph:
    """A recorded graph. Replays spoil the intermediate results of all graphs of the same pool."""

    def __init__(self, keep_graph: bool = False) -> None:
        self._tape, self._pool = _Tape(), None

    def replay(self) -> None:
        if graph.now is not None:
            raise RuntimeError("CUDA error: a graph cannot be replayed while another one is recorded")
        with torch.no_grad(), torch.autocast("cuda", enabled=False):
            for tape in _recorded[self._pool]:
                tape.spoil()
            self._tape.replay()

    def reset(self) -> None:
        self._tape.forget()

    def pool(self) -> Any:
        return self._pool

    def __del__(self) -> None:
        if _recorded is not None and self._pool is not None:  # None at the end of the process
            _recorded[self._pool] = [tape for tape in _recorded.get(self._pool, []) if tape is not self._tape]
            self._tape.forget()
            if not _recorded[self._pool]:
                _released.add(self._pool)


class graph:  # noqa: N801  # the name in torch.cuda
    now: graph | None = None

    def __init__(self, cuda_graph: CUDAGraph, pool: Any = None, stream: Any = None, capture_error_mode: str = "global") -> None:
        assert capture_error_mode in ("global", "thread_local", "relaxed")
        self._graph, self._stream = cuda_graph, stream or Stream()
        cuda_graph._pool = pool if pool is not None else (0, next(_pools))

    def __enter__(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        assert graph.now is None, "a capture within a capture"
        if self._graph._pool in _released:  # PyTorch keeps such a pool as long as a tensor in it lives, and refuses it
            raise RuntimeError("it->second->use_count > 0 INTERNAL ASSERT FAILED: the pool was released with its last graph")
        if torch.is_grad_enabled():
            raise AssertionError("a capture with gradients")
        graph.now, self._before = self, Stream.current
        Stream.current = self._stream
        self._graph._tape.__enter__()
        _device.pretend_capturing(True)

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        _device.pretend_capturing(False)
        self._graph._tape.__exit__(kind, error, trace)
        graph.now = None
        Stream.current = self._before
        _recorded.setdefault(self._graph._pool, []).append(self._graph._tape)


# Attention kernels


_library: Any = None


def _flash_attention() -> None:
    """The kernels behind ``torch.nn.attention.varlen``, with the conditions of the real ones."""
    global _library
    _library = torch.library.Library("aten", "IMPL")
    _library.impl("_flash_attention_forward", _flash_forward, "CUDA")
    _library.impl("_flash_attention_backward", _flash_backward, "CUDA")
    _library.impl("_fused_rms_norm", _rms_norm, "CUDA")
    _library.impl("_fused_rms_norm_backward", _rms_norm_backward, "CUDA")
    _library.impl("addmm.dtype_out", _addmm_in, "CUDA")
    _library.impl("mm.dtype_out", _mm_in, "CUDA")


def _rms_norm(x: Tensor, shape: list[int], weight: Tensor | None, eps: float | None) -> tuple[Tensor, Tensor]:
    """One operation on a GPU. Inputs and outputs have one dtype; it computes in fp32."""
    assert weight is not None and eps is not None and weight.dtype == x.dtype and shape == [x.shape[-1]]
    with quiet():
        scale = (x.float().pow(2).mean(-1, keepdim=True) + eps).rsqrt()
        return (x.float() * scale * weight.float()).to(x.dtype), scale


def _rms_norm_backward(gradient: Tensor, x: Tensor, shape: list[int], scale: Tensor, weight: Tensor, wanted: list[bool]) -> tuple[Any, Any]:
    with quiet():
        normed, upstream = x.float() * scale, gradient.float()
        of_normed = upstream * weight.float()
        of_x = scale * (of_normed - normed * (of_normed * normed).mean(-1, keepdim=True))
        of_weight = (upstream * normed).flatten(0, -2).sum(0)
        return of_x.to(x.dtype) if wanted[0] else None, of_weight.to(weight.dtype) if wanted[1] else None


def _addmm_in(total: Tensor, a: Tensor, b: Tensor, out_dtype: torch.dtype, *, beta: float = 1, alpha: float = 1, out: Tensor) -> Tensor:
    """A product of half-precision matrices with an fp32 result, which CUDA has and a CPU does not."""
    return out.copy_(beta * total.to(out_dtype) + alpha * (a.to(out_dtype) @ b.to(out_dtype)))


def _mm_in(a: Tensor, b: Tensor, out_dtype: torch.dtype, *, out: Tensor) -> Tensor:
    return out.copy_(a.to(out_dtype) @ b.to(out_dtype))


def check_varlen(q: Tensor, k: Tensor, v: Tensor, starts: Tensor) -> None:
    """Raise RuntimeError where flash-attention's kernel for sequences of any length does."""
    for name, states in (("query", q), ("key", k), ("value", v)):
        if states.dtype not in (torch.float16, torch.bfloat16):
            raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
        if states.dim() != 3 or states.shape[2] % 8 or states.shape[2] > 256:
            raise RuntimeError(
                f"FlashAttention: {name} has sizes {tuple(states.shape)}; the head dimension must be a multiple of 8, up to 256"
            )
        if states.stride(-1) != 1:
            raise RuntimeError("Input tensor must have contiguous last dimension")
        if states.dtype != q.dtype:
            raise RuntimeError("query and key must have the same dtype")
    if starts.dtype != torch.int32 or not starts.is_cuda or not starts.is_contiguous():
        raise RuntimeError("cu_seqlens_q must have dtype int32, be on the device and be contiguous")


def _weights(q: Tensor, k: Tensor, scale: float, left: int, right: int) -> Tensor:
    """Attention weights [heads, S, S] of one sequence; a token sees ``left`` tokens before it and ``right`` after it (-1: all)."""
    places = torch.arange(q.shape[1], device=q.device)
    distance = places[:, None] - places
    seen = ((distance <= left) | (left < 0)) & ((-distance <= right) | (right < 0))
    return (q @ k.transpose(1, 2) * scale).masked_fill(~seen, float("-inf")).softmax(-1)


def _sequences(bounds: list[int], *states: Tensor) -> Iterator[tuple[slice, list[Tensor]]]:
    for start, end in zip(bounds, bounds[1:], strict=False):
        yield slice(start, end), [one[start:end].transpose(0, 1).float() for one in states]


def _window(causal: bool, named: dict[str, Any]) -> tuple[int, int]:
    left, right = named.get("window_size_left"), named.get("window_size_right")
    return -1 if left is None else left, 0 if causal else -1 if right is None else right


def _scale(q: Tensor, named: dict[str, Any]) -> float:
    given = named.get("scale")
    return q.shape[-1] ** -0.5 if given is None else given


def _flash_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Any,
    starts_k: Any,
    most: int,
    most_k: int,
    dropout: float,
    causal: bool,
    *rest: Any,
    **named: Any,
) -> Any:
    check_varlen(q, k, v, starts)
    if q.shape[1] % k.shape[1]:
        raise RuntimeError("Number of heads in key/value must divide number of heads in query")
    repeats = q.shape[1] // k.shape[1]
    with quiet():
        made = torch.empty_like(q)
        for rows, (one, keys, values) in _sequences(starts.cpu().tolist(), q, k, v):
            keys, values = keys.repeat_interleave(repeats, dim=0), values.repeat_interleave(repeats, dim=0)
            made[rows] = (_weights(one, keys, _scale(q, named), *_window(causal, named)) @ values).transpose(0, 1).to(q.dtype)
    lse = torch.zeros(q.shape[1], q.shape[0], device=q.device)
    state = torch.zeros(2, dtype=torch.uint64, device=q.device)
    return made, lse, state, torch.zeros(0, device=q.device), torch.zeros(0, device=q.device)


def _flash_backward(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    starts: Tensor,
    starts_k: Tensor,
    most: int,
    most_k: int,
    dropout: float,
    causal: bool,
    *rest: Any,
    **named: Any,
) -> Any:
    check_varlen(q, k, v, starts)
    scale, repeats = _scale(q, named), q.shape[1] // k.shape[1]
    with quiet():
        made = [torch.empty_like(states) for states in (q, k, v)]
        for rows, (one, keys, values, upstream) in _sequences(starts.cpu().tolist(), q, k, v, gradient):
            keys, values = keys.repeat_interleave(repeats, dim=0), values.repeat_interleave(repeats, dim=0)
            weights = _weights(one, keys, scale, *_window(causal, named))
            of_weights = upstream @ values.transpose(1, 2)
            of_scores = weights * (of_weights - (of_weights * weights).sum(-1, keepdim=True)) * scale
            parts = of_scores @ keys, of_scores.transpose(1, 2) @ one, weights.transpose(1, 2) @ upstream
            for target, part in zip(made, parts, strict=True):
                heads = target.shape[1]  # query heads that share keys add up
                target[rows] = part.view(heads, -1, *part.shape[1:]).sum(1).transpose(0, 1).to(q.dtype)
    return tuple(made)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Operations within it do not count as waits: they stand for one kernel."""
    before = dict(waits)
    _device.pretend_callback(None)
    try:
        yield
    finally:
        _device.pretend_callback(_callback)
        waits.clear()
        waits.update(before)
