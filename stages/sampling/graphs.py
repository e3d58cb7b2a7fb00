"""CUDA graphs of decoding steps: recorded once per size, replayed for every token, and kept between calls of ``generate``.

A graph runs the same kernels on the same memory again, without the CPU's launch overhead. So a step may change only tensors that keep
their addresses (``slots``). The size of a step is fixed: rows, and columns of the cache. The pool has graphs for a few sizes. When a batch
shrinks, it continues with a graph of a smaller size that still fits, or with a larger graph if there is none. The results of surplus rows
are ignored.
"""

from __future__ import annotations

import gc
import logging
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol
from weakref import WeakSet

import torch
from torch import Tensor

from stages.errors import is_out_of_memory
from stages.kernels.token_budget import GRAPH_COLUMNS, KEPT_SHARE
from stages.sampling.slots import Slots
from stages.sampling.support import has_int8_layers

if TYPE_CHECKING:
    from stages.model_types import TransformersModel

logger = logging.getLogger(__name__)
_refusals: Counter[str] = Counter()  # counts of rejected recordings by the logged reason

SAID_AT = (1, 10, 100, 1000)  # the log reports a reason at these counts of rejected recordings
FEWEST_STEPS = 16  # a recording costs about as much as a few steps, so fewer steps than this do not justify one
STEPS_ON_LARGER = 64  # steps on the graph of a larger size before a graph of the right size is recorded
LONGEST_REASON = 200  # characters of a reason in the log


class Size(NamedTuple):
    """The size of a decoding step: rows of the batch, and columns (tokens) of the cache that it attends to."""

    rows: int
    columns: int


def row_sizes(most: int) -> list[int]:
    """The row counts for which graphs are recorded: powers of two below ``most``, and ``most``."""
    powers = [1 << power for power in range(most.bit_length())]
    return [rows for rows in powers if rows < most] + [most]


def column_sizes(room: int) -> list[int]:
    """The column counts for which graphs are recorded: powers of two from 64 on, 1.5 times each of them, and ``room``."""
    made, size = [], GRAPH_COLUMNS
    while size < room:
        made += [size, size + size // 2]
        size *= 2
    return [columns for columns in made if columns < room] + [room]


def rounded_room(tokens: int) -> int:
    """``tokens`` rounded up to a multiple of 64 columns, so that a later batch with a slightly longer prompt fits as well."""
    return -(-tokens // GRAPH_COLUMNS) * GRAPH_COLUMNS


def next_size(sizes: list[int], wanted: int) -> int:
    """The smallest of ``sizes`` (ascending) that is at least ``wanted``."""
    return sizes[bisect_left(sizes, wanted)]


@dataclass
class Recording:
    """A recorded step.

    ``replay`` runs the step. ``logits`` [rows, V]: the tensor to which a replay writes its logits; None after the memory was released for
    other recordings. ``num_bytes``: memory of the recording.
    """

    replay: Callable[[], object]
    logits: Tensor | None
    num_bytes: int


class Recorder(Protocol):
    """Records steps on a device. ``memory_limit``: the maximum bytes of recordings and their cache to keep between two calls."""

    memory_limit: int

    def record(self, step: Callable[[], Tensor]) -> Recording:
        """Run ``step`` a few times and record it. Raises RuntimeError if the step cannot be recorded."""


class GraphPool:
    """Recorded steps for one set of slots and one cache."""

    def __init__(self, recorder: Recorder, slots: int, room: int) -> None:
        self.memory_limit = recorder.memory_limit
        self._recorder: Recorder | None = recorder  # None: the model's steps cannot be recorded
        self._row_sizes, self._column_sizes = row_sizes(slots), column_sizes(room)
        self._recordings: dict[tuple[Size, Hashable], Recording] = {}
        self._refused: set[tuple[Size, Hashable]] = set()
        self._wanted: Counter[tuple[Size, Hashable]] = Counter()  # steps so far without a graph of their size
        self.steps: Counter[str] = Counter()  # counts of "replayed" and "computed" steps
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._recordings)

    @property
    def is_useful(self) -> bool:
        """Whether there are recordings, or recording is still possible."""
        return self._recorder is not None or bool(self._recordings)

    def size(self, rows: int, columns: int) -> Size:
        """The smallest size of the pool with at least ``rows`` rows and ``columns`` columns."""
        return Size(next_size(self._row_sizes, rows), next_size(self._column_sizes, columns))

    def step(self, size: Size, kind: Hashable, compute: Callable[[Size], Tensor], slots: Slots, remaining: int) -> None:
        """Run one step of ``size``, by replaying a recording or by calling ``compute``.

        ``kind``: everything else that a graph fixes, such as the temperature. ``remaining``: maximum number of steps that
        are left, including this one.
        """
        recording = self._recordings.get((size, kind)) or self._recorded(size, kind, compute, slots, remaining) or self._larger(size, kind)
        if recording is None:
            compute(size)
        else:
            recording.replay()
        self.steps["computed" if recording is None else "replayed"] += 1

    def _recorded(self, size: Size, kind: Hashable, compute: Callable[[Size], Tensor], slots: Slots, remaining: int) -> Recording | None:
        """A new recording for ``size``; None if recording is impossible or not worth its cost."""
        key = (size, kind)
        if self._recorder is None or key in self._refused:
            return None
        self._wanted[key] += 1
        if self._larger(size, kind) is not None:
            pays = self._wanted[key] > STEPS_ON_LARGER
        else:
            pays = max(remaining, self._wanted[key]) >= FEWEST_STEPS
        if not pays:
            return None
        try:
            recording = checked_recording(self._recorder, lambda: compute(size), slots)
        except Exception as error:  # of any class: the step is then computed, which raises the error again if recording is not its cause
            if any(is_out_of_memory(one) for one in _with_contexts(error)):
                self._refused.add(key)  # a smaller size may fit
            else:
                self._recorder = None
            refuse(f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:LONGEST_REASON])
            return None
        if recording is None:
            self._refused.add(key)
            refuse("the logits of a replayed step differ from those of a computed one")
            return None
        self.num_bytes += recording.num_bytes
        self._recordings[key] = recording
        return recording

    def _larger(self, size: Size, kind: Hashable) -> Recording | None:
        """The smallest recording with at least the rows and columns of ``size``; None if there is none."""
        fitting = [
            (recording.rows * recording.columns, recording)
            for recording, of_kind in self._recordings
            if of_kind == kind and recording.rows >= size.rows and recording.columns >= size.columns
        ]
        return self._recordings[min(fitting)[1], kind] if fitting else None


def _with_contexts(error: BaseException | None) -> Iterator[BaseException]:
    """``error``, and the errors during which it was raised: after one in a recording, the end of the recording may raise another."""
    while error is not None:
        yield error
        error = error.__context__


def refuse(reason: str) -> None:
    """Count a rejected recording, and log it at the counts in ``SAID_AT``."""
    _refusals[reason] += 1
    if _refusals[reason] in SAID_AT:
        logger.warning(
            "decoding without a CUDA graph: %s (%d recordings so far; set generation.cuda_graphs: false to avoid the attempts)",
            reason,
            _refusals[reason],
        )


def checked_recording(recorder: Recorder, step: Callable[[], Tensor], slots: Slots) -> Recording | None:
    """Record ``step`` and compare a replay with a computed step; returns None if they differ.

    ``slots`` has the state that ``step`` changes. The state is restored at the end.
    """
    before = slots.snapshot()
    try:
        recording = recorder.record(step)
        slots.restore(before)
        computed = step().clone()
        slots.restore(before)
        recording.replay()
        assert recording.logits is not None
        agrees = agree(recording.logits, computed, compute_dtype(computed))
    finally:
        slots.restore(before)
    recording.logits = None
    return recording if agrees else None


class CudaRecorder:
    """Records on the current GPU. Recordings share a memory pool, because nothing in it must outlive a step.

    After the last recording of a pool is freed, PyTorch may refuse the pool. So the next recording gets a new one.
    """

    def __init__(self, device: torch.device) -> None:
        self._pool: Any = None
        self._graphs: WeakSet[torch.cuda.CUDAGraph] = WeakSet()  # recordings in the pool
        self.memory_limit = int(KEPT_SHARE * torch.cuda.get_device_properties(device).total_memory)

    def record(self, step: Callable[[], Tensor]) -> Recording:
        current, side = torch.cuda.current_stream(), recording_stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):  # libraries initialise on the first run, which must not be recorded
            step()
            step()
        current.wait_stream(side)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # the recording also does this at its start; done here, it does not distort the memory difference
        reserved = torch.cuda.memory_reserved()
        if not self._graphs:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        try:
            with garbage_kept(), torch.cuda.graph(graph, pool=self._pool, stream=side, capture_error_mode="thread_local"):
                logits = step()
        except BaseException:
            if not _has_ended(graph):
                self._leave_pool(graph)
            raise
        finally:
            torch.cuda.set_stream(current)  # a failed recording would leave its own stream as the current one
        self._graphs.add(graph)
        return Recording(graph.replay, logits, max(0, torch.cuda.memory_reserved() - reserved))

    def _leave_pool(self, graph: torch.cuda.CUDAGraph) -> None:
        """End the allocation of a recording that failed before its end. Otherwise PyTorch would never again free the pool's memory."""
        _unended.append(graph)
        with suppress(RuntimeError, AttributeError):  # the recording has not begun
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self._pool)
            torch._C._cuda_releasePool(torch.cuda.current_device(), self._pool)


_unended: list[torch.cuda.CUDAGraph] = []
"""Recordings that failed before their end. They stay, because PyTorch's allocator for pinned memory refers to them."""


def _has_ended(graph: torch.cuda.CUDAGraph) -> bool:
    """Whether the recording of ``graph`` has ended, so that it leaves its pool when it is freed."""
    try:
        graph.pool()
    except RuntimeError:
        return False
    return True


@cache
def recording_stream() -> torch.cuda.Stream:
    """The stream on which steps are prepared and recorded. One for the process, because cuBLAS keeps memory per stream."""
    return torch.cuda.Stream()


@contextmanager
def garbage_kept() -> Iterator[None]:
    """Context manager without Python's garbage collection, which could free memory of the GPU while a step is recorded."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def can_record(model: TransformersModel) -> bool:
    """Whether the steps of ``model`` may be recordable: it is on a GPU and has no layer that is known to prevent recording."""
    return next(model.parameters()).device.type == "cuda" and not has_int8_layers(model)


def compute_dtype(logits: Tensor) -> torch.dtype:
    """The less precise of two dtypes: that of ``logits``, and that of autocast if it is enabled."""
    kind = logits.device.type
    dtypes = [logits.dtype, *([torch.get_autocast_dtype(kind)] if torch.is_autocast_enabled(kind) else [])]
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def agree(replayed: Tensor, computed: Tensor, dtype: torch.dtype) -> bool:
    """Whether two logits tensors [B, V] of the same step are equal up to the rounding of ``dtype``.

    The norm of the difference may be at most a share of the logits' spread. The spread is the norm of the logits minus their mean over the
    vocabulary. The share is the square root of the machine epsilon: 0.09 in bf16, 0.03 in fp16, 0.0003 in fp32.
    """
    if torch.allclose(replayed, computed, rtol=0.0, atol=0.0):  # to the bit
        return True
    finite = torch.isfinite(computed)
    if not torch.equal(finite, torch.isfinite(replayed)):
        return False
    difference = torch.where(finite, replayed.float() - computed.float(), 0.0).norm()
    shown = torch.where(finite, computed.float(), 0.0)
    spread = (shown - shown.mean(dim=-1, keepdim=True)).norm()
    return bool(difference <= torch.finfo(dtype).eps ** 0.5 * spread)
