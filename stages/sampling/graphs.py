"""Decoding steps without the CPU's overhead: on a GPU a step is recorded once as a CUDA graph and replayed for every token.

A replay runs the same kernels on the same memory, so everything that changes from step to step lies in tensors that are made once. B rows,
T tokens that the cache has room for.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)
_refusals: Counter[str] = Counter()  # recordings that were not used, by the reason that is logged

SAID_AT = (1, 10, 100, 1000)  # refused recordings of one reason after which the log says so
FEWEST_STEPS = 16  # recording costs about as much as a few steps, so it is not done for less


class StepRecorder:
    """One decoding step of ``model`` after another over ``cache``, each either computed or replayed.

    A recording is good for the rows and the room that the cache has. It is made anew where either changes. Where a replay does not say what
    was computed, steps are computed until then. Where the model cannot be recorded (because it asks the GPU something on its way), steps
    are computed for the rest of the batch.
    """

    def __init__(self, model: Any, cache: Any, options: dict[str, Any], *, enabled: bool) -> None:
        self._model, self._cache, self._options = model, cache, options
        self._enabled = enabled and can_record(model)
        self._step: StaticStep | None = None
        self._waits = False  # for other rows or another room, after a recording that was of no use

    def __call__(self, tokens: Tensor, positions: Tensor, bias: Tensor | None, remaining: int) -> Tensor | None:
        """Logits [B, V] after ``tokens`` [B] at ``positions`` [B, 1]; None where the step has to be computed the usual way.

        ``bias``: what is added to the attention scores [B, 1, 1, at least T] (None: nothing). ``remaining``: the most steps that are left.
        """
        if self._step is not None and self._step.is_full:
            self.release()
        if self._step is None:
            if not self._enabled or self._waits or remaining < FEWEST_STEPS:
                return None
            self._step = self._recorded(StaticStep(self._model, self._cache, self._options, len(tokens), bias), tokens, positions)
            if self._step is None:
                return None
        return self._step(tokens, positions)

    def release(self) -> None:
        """Leave the cache to computed steps again: before its rows change, and at the end."""
        self._waits = False
        if self._step is not None:
            self._step.close()
            self._step = None

    def _recorded(self, step: StaticStep, tokens: Tensor, positions: Tensor) -> StaticStep | None:
        step.load(tokens, positions)
        try:
            reason = record(step)
            self._waits = reason is not None
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            self._enabled = False
        if reason is None:
            return step
        step.close()
        _refusals[reason] += 1
        if _refusals[reason] in SAID_AT:
            logger.warning(
                "decoding without a CUDA graph: %s (%d of the recordings so far; generation.cuda_graphs: false leaves out the attempt)",
                reason,
                _refusals[reason],
            )
        return None


class StaticStep:
    """A decoding step whose inputs and results have fixed places."""

    def __init__(self, model: Any, cache: Any, options: dict[str, Any], rows: int, bias: Tensor | None) -> None:
        self._model, self._options = model, options
        self._layers = [layer for layer in cache.layers if layer.is_initialized]
        self._width = cache.get_seq_length()
        device, dtype = next(model.parameters()).device, model.dtype if bias is None else bias.dtype
        self._at = torch.tensor([self._width], device=device)  # the place in the cache of the token to come
        for layer in self._layers:
            layer.fix(self._at)
        self._room = min(layer.room_in_all for layer in self._layers)
        self._tokens = torch.zeros((rows, 1), dtype=torch.long, device=device)
        self._positions = torch.zeros((rows, 1), dtype=torch.long, device=device)
        # Places not yet written count as little as padding.
        self._bias = torch.full((rows, 1, 1, self._room), -torch.inf, dtype=dtype, device=device)
        self._bias[..., : self._width] = 0.0 if bias is None else bias[..., : self._width]
        self.logits: Tensor | None = None
        self.replay: Callable[[], object] = self.run

    @property
    def is_full(self) -> bool:
        return self._width == self._room

    def load(self, tokens: Tensor, positions: Tensor) -> None:
        self._tokens.copy_(tokens[:, None])
        self._positions.copy_(positions)
        self._at.fill_(self._width)

    def run(self) -> Tensor:
        """The step itself, which may be run again and again: it writes the same token to the same place."""
        self._bias.index_fill_(3, self._at, 0.0)
        output = self._model(input_ids=self._tokens, attention_mask=self._bias, position_ids=self._positions, **self._options)
        self.logits = output.logits[:, -1]
        return self.logits

    def __call__(self, tokens: Tensor, positions: Tensor) -> Tensor:
        self.load(tokens, positions)
        self.replay()
        self._width += 1
        assert self.logits is not None
        return self.logits

    def close(self) -> None:
        for layer in self._layers:
            layer.unfix(self._width)


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


def record(step: StaticStep) -> str | None:
    """Record ``step``, as it is loaded, as a CUDA graph; returns why that was no use, or None. Raises RuntimeError where it cannot be."""
    current, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):  # libraries get ready at a first run, which must not be recorded
        step.run()
        computed = step.run().clone()
    current.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            step.run()
    finally:
        torch.cuda.set_stream(current)  # which a recording that failed would leave for its own
    graph.replay()
    assert step.logits is not None
    if not agree(step.logits, computed, compute_dtype(step.logits)):
        return "a replayed step says something else than a computed one"
    step.replay = graph.replay
    return None
