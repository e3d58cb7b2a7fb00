"""How many tokens go through a model in one pass: as the recipe says, or as the memory allows; and what happens when it runs out.

``microbatch_size: auto`` means today's number of rows on a CPU, where more rows make nothing faster. On a GPU it means tokens. The first
passes are small and measured. From what a token takes in them follows how many fit into the free memory. Where memory runs out all the
same, passes shrink to half, and the work is done again. The sum over all passes, a loss or a gradient, is the same for every size.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from stages.config import Microbatch
from stages.kernels.token_budget import GPU_SHARE, GPU_TOKENS, rows_per_batch, token_budget_batches, tokens_of
from stages.process.gpus import free_gpu_memory, own_peak
from stages.sampling.workspace import drop_kept_workspace

logger = logging.getLogger(__name__)

FIRST_TOKENS = 2_048  # of a training pass on a GPU before one was measured
STEP_TOKENS = 1_024  # budgets are multiples of this: equal machines then find equal budgets
ALLOCATION_FAILURES = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED")  # said by errors that have no class of their own


class PassBudget:
    """The most sequences and tokens of a pass, for one kind of work (an update, a measurement) on one device."""

    def __init__(self, what: str, device: torch.device | str, size: Microbatch, *, rows: int, trains: bool) -> None:
        """``what`` names the work in the log. ``rows``: sequences of a pass on a CPU where ``size`` is auto. ``trains``: whether passes
        keep activations for a backward pass, so that their memory has to be measured."""
        self.what, self.device = what, torch.device(device)
        by_tokens = size == "auto" and self.device.type != "cpu"
        self.rows: int | None = rows if size == "auto" else size
        self.tokens = float("inf")
        if by_tokens:
            self.rows, self.tokens = None, FIRST_TOKENS if trains else GPU_TOKENS
        self.measures = by_tokens and trains  # until ``settle``
        self.retreats = 0  # how often memory ran out
        self.largest = 0  # tokens of the largest pass that fitted
        self._taken: list[tuple[int, int]] = []  # (tokens, bytes) of each measured pass
        self._current: tuple[int, int] = (0, 0)  # sequences and tokens of the pass that is at work

    def groups(self, order: Sequence[int], lengths: Sequence[int], *, packed: bool = False) -> list[list[int]]:
        """The sequences of ``order`` pass by pass; ``lengths`` in tokens, of all sequences by their numbers."""
        return token_budget_batches(order, lengths, rows=self.rows, device_type=self.device.type, tokens=self.tokens, packed=packed)

    def rows_for(self, number: int, length: int) -> int:
        """Sequences of a pass over ``number`` of them that are all ``length`` tokens long."""
        rows = number if self.rows is None else self.rows
        return rows_per_batch(max(1, rows), length, device_type=self.device.type, tokens=self.tokens)

    @contextmanager
    def one_pass(self, sequences: int, tokens: int) -> Iterator[None]:
        """Around one pass over so many sequences and tokens (padding included): notes its size, and its memory where that is wanted."""
        self._current = (sequences, tokens)
        if self.measures:
            with own_peak() as peak:
                yield
            self._taken.append((tokens, peak.added))
        else:
            yield
        self.largest = max(self.largest, tokens)

    def settle(self, pending: int, *, free: Callable[[], int] | None = None, agree: Callable[[int], int] | None = None) -> None:
        """Choose the tokens of a pass for the rest of the run from the passes that were measured; nothing where none was.

        ``pending``: bytes that the process will need beside the passes (optimizer moments that are not there yet). ``free`` measures the
        free memory; ``agree`` makes of this process's number the one of all processes, where they must be equal.
        """
        if not self.measures or not self._taken:
            return
        self.measures = False
        # The first pass also makes gradients and casts, which stay; with a second one it is left out.
        counted = self._taken[1:] or self._taken
        per_token = max(taken / tokens for tokens, taken in counted)
        room = GPU_SHARE * max(0, (free or free_gpu_memory)() - pending)
        fitting = room / per_token if per_token > 0 else GPU_TOKENS
        tokens = min(GPU_TOKENS, max(STEP_TOKENS, int(fitting) // STEP_TOKENS * STEP_TOKENS))
        if self.retreats:
            tokens = min(tokens, int(self.tokens))
        self.tokens = tokens if agree is None else agree(tokens)
        logger.info(
            "%s: up to %d tokens in a pass (%.1f KiB each, %.1f GiB free)",
            self.what,
            self.tokens,
            per_token / 2**10,
            room / GPU_SHARE / 2**30,
        )

    def retreat(self, error: BaseException) -> None:
        """Memory ran out in the pass at work: from now on half of its tokens at most. Raises ``error`` where it was something else, and
        where the pass had one sequence only, which cannot be halved.

        Call it in the ``except`` clause, and ``release`` after that clause: only then are the tensors of the failed pass gone.
        """
        sequences, tokens = self._current
        if not is_out_of_memory(error) or sequences <= 1:
            raise error
        if not self.retreats:
            logger.warning(
                "%s: memory ran out in a pass of %d tokens (%d sequences); it is done again with at most half as many. "
                "The result is the same. Later retreats are counted in the metric passes/retreats",
                self.what,
                tokens,
                sequences,
            )
        self.retreats += 1
        self.tokens = min(self.tokens, tokens) // 2

    def release(self) -> None:
        """Give the memory of a failed pass back, and what decoding keeps for its next call."""
        drop_kept_workspace()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def each(self, order: Sequence[int], lengths: Sequence[int], work: Callable[[list[int]], None], *, packed: bool = False) -> None:
        """``work(rows)`` for every pass over ``order``. Where memory runs out, the rows of that pass and those after it are done in smaller
        ones; those before it are not done again. ``work`` must leave nothing behind where it fails."""
        waiting = self.groups(order, lengths, packed=packed)
        while waiting:
            rows = waiting[0]
            try:
                with self.one_pass(len(rows), tokens_of(rows, lengths, packed=packed)):
                    work(rows)
            except RuntimeError as error:
                self.retreat(error)
            else:
                del waiting[0]
                continue
            self.release()
            waiting = self.groups([row for group in waiting for row in group], lengths, packed=packed)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that a device has no memory left."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in ALLOCATION_FAILURES)
