"""CUDA graphs of decoding steps: recorded once for a size, replayed for every token, kept from one call of ``generate`` to the next.

A graph runs the same kernels on the same memory again, without the CPU's overhead. So a step may change nothing but tensors that keep
their address (``slots``), and its size is fixed: rows, and columns of the cache. The pool has graphs for a few sizes. A batch that has
shrunk goes on with the graph of the next smaller size, or of a larger one if there is no better. The additional rows compute what nobody
reads.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from stages.sampling.slots import Slots

logger = logging.getLogger(__name__)
_refusals: Counter[str] = Counter()  # recordings that were not used, by the reason that is logged

SAID_AT = (1, 10, 100, 1000)  # refused recordings of one reason after which the log says so
FEWEST_STEPS = 16  # a recording costs about as much as a few steps, so it is not made for less
STEPS_ON_LARGER = 64  # steps on the graph of a larger size after which a graph of the right size is recorded
SMALLEST_COLUMNS = 64
KEPT_SHARE = 0.05  # of the device's memory: what may stay allocated while no tokens are decoded


class Size(NamedTuple):
    """The size of a decoding step: rows of the batch, and columns (tokens) of the cache that it attends to."""

    rows: int
    columns: int


def row_sizes(most: int) -> list[int]:
    """The rows that graphs are recorded for: powers of two, and ``most``."""
    powers = [1 << power for power in range(most.bit_length())]
    return [rows for rows in powers if rows < most] + [most]


def column_sizes(room: int) -> list[int]:
    """The columns that graphs are recorded for: powers of two and the middles between them, from 64 on, and ``room``."""
    made, size = [], SMALLEST_COLUMNS
    while size < room:
        made += [size, size + size // 2]
        size *= 2
    return [columns for columns in made if columns < room] + [room]


def rounded_room(tokens: int) -> int:
    """Columns of a cache for ``tokens``: a multiple of 64, so that the next batch with a slightly longer prompt fits as well."""
    return -(-tokens // SMALLEST_COLUMNS) * SMALLEST_COLUMNS


def next_size(sizes: list[int], wanted: int) -> int:
    """The smallest of ``sizes`` (ascending) that is not below ``wanted``."""
    return sizes[bisect_left(sizes, wanted)]


@dataclass
class Recording:
    """A recorded step. ``logits`` [rows, V] is where a replay leaves its logits; None once that memory may be used for others."""

    replay: Callable[[], object]
    logits: Tensor | None
    num_bytes: int


class Recorder(Protocol):
    """Records steps of a device. ``memory_limit``: bytes of recordings and their cache that may be kept between two calls."""

    memory_limit: int

    def record(self, step: Callable[[], Tensor]) -> Recording:
        """Run ``step`` a few times and record it. Raises RuntimeError where that cannot be done."""


class GraphPool:
    """Recorded steps over one set of slots and one cache."""

    def __init__(self, recorder: Recorder, slots: int, room: int) -> None:
        self.memory_limit = recorder.memory_limit
        self._recorder: Recorder | None = recorder  # None: the model cannot be recorded
        self._row_sizes, self._column_sizes = row_sizes(slots), column_sizes(room)
        self._recordings: dict[tuple[Size, Hashable], Recording] = {}
        self._refused: set[tuple[Size, Hashable]] = set()
        self._wanted: Counter[tuple[Size, Hashable]] = Counter()  # steps that had no graph of their size
        self.steps: Counter[str] = Counter()  # replayed, computed
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._recordings)

    @property
    def is_useful(self) -> bool:
        """Whether there are recordings, or may be."""
        return self._recorder is not None or bool(self._recordings)

    def size(self, rows: int, columns: int) -> Size:
        """The size to decode at, which holds ``rows`` and ``columns``."""
        return Size(next_size(self._row_sizes, rows), next_size(self._column_sizes, columns))

    def step(self, size: Size, kind: Hashable, compute: Callable[[Size], Tensor], slots: Slots, remaining: int) -> None:
        """Make one step of ``size``: replay it or compute it.

        ``kind``: all else that a graph fixes, such as the temperature. ``remaining``: how many steps may follow at most, with this one.
        """
        recording = self._recordings.get((size, kind)) or self._recorded(size, kind, compute, slots, remaining) or self._larger(size, kind)
        if recording is None:
            compute(size)
        else:
            recording.replay()
        self.steps["computed" if recording is None else "replayed"] += 1

    def _recorded(self, size: Size, kind: Hashable, compute: Callable[[Size], Tensor], slots: Slots, remaining: int) -> Recording | None:
        """A new recording, if one can be made and pays."""
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
        except RuntimeError as error:
            self._recorder = None
            refuse(str(error).strip().splitlines()[0])
            return None
        if recording is None:
            self._refused.add(key)
            refuse("a replayed step says something else than a computed one")
            return None
        self.num_bytes += recording.num_bytes
        self._recordings[key] = recording
        return recording

    def _larger(self, size: Size, kind: Hashable) -> Recording | None:
        """The smallest recording that holds ``size``."""
        fitting = [
            (found.rows * found.columns, found)
            for found, of_kind in self._recordings
            if of_kind == kind and found.rows >= size.rows and found.columns >= size.columns
        ]
        return self._recordings[min(fitting)[1], kind] if fitting else None


def refuse(reason: str) -> None:
    """Count a recording that is not used, and say so now and then."""
    _refusals[reason] += 1
    if _refusals[reason] in SAID_AT:
        logger.warning(
            "decoding without a CUDA graph: %s (%d of the recordings so far; generation.cuda_graphs: false leaves out the attempt)",
            reason,
            _refusals[reason],
        )


def checked_recording(recorder: Recorder, step: Callable[[], Tensor], slots: Slots) -> Recording | None:
    """Record ``step``, which ``slots`` is the state of, and leave the state as it was. None where a replay differs from a computed step."""
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
    """Records on the current GPU. All recordings share one pool of memory, as nothing in it has to outlive a step."""

    def __init__(self, device: torch.device) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self.memory_limit = int(KEPT_SHARE * torch.cuda.get_device_properties(device).total_memory)

    def record(self, step: Callable[[], Tensor]) -> Recording:
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):  # libraries get ready at a first run, which must not be recorded
            step()
            step()
        current.wait_stream(side)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # as the recording does at its beginning; the memory that it adds is counted from here
        reserved = torch.cuda.memory_reserved()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                logits = step()
        finally:
            torch.cuda.set_stream(current)  # which a recording that failed would leave for its own
        return Recording(graph.replay, logits, max(0, torch.cuda.memory_reserved() - reserved))


def can_record(model: Any) -> bool:
    """Whether there is a GPU to record for, and nothing known that speaks against it."""
    # LLM.int8 looks for outliers on the GPU and waits for the answer.
    waits = any(type(module).__name__ == "Linear8bitLt" for module in model.modules())
    return next(model.parameters()).device.type == "cuda" and not waits


def compute_dtype(logits: Tensor) -> torch.dtype:
    """The least precise dtype that took part in ``logits``: their own, or that of autocast."""
    kind = logits.device.type
    dtypes = [logits.dtype, *([torch.get_autocast_dtype(kind)] if torch.is_autocast_enabled(kind) else [])]
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def agree(replayed: Tensor, computed: Tensor, dtype: torch.dtype) -> bool:
    """Whether two results [B, V] of one step differ by no more than ``dtype`` may make two orders of summing differ.

    That is the square root of its precision (0.09 in bf16, 0.03 in fp16, 0.0003 in fp32), as a share of what tells the tokens apart.
    """
    if torch.equal(replayed, computed):
        return True
    finite = torch.isfinite(computed)
    if not torch.equal(finite, torch.isfinite(replayed)):
        return False
    difference = torch.where(finite, replayed.float() - computed.float(), 0.0).norm()
    shown = torch.where(finite, computed.float(), 0.0)
    spread = (shown - shown.mean(dim=-1, keepdim=True)).norm()
    return bool(difference <= torch.finfo(dtype).eps ** 0.5 * spread)
