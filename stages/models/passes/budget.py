"""The token budget of forward passes: from the recipe, or from the free memory, with smaller passes if memory runs out.

``microbatch_size: auto`` is a fixed number of rows on a CPU, where more rows are not faster. On a GPU it is a number of tokens: the first
passes are small, their memory per token is measured, and the budget is set to what fits into the free memory. If memory still runs out, the
budget is halved and the work is repeated (see sampling/retreats.py). The sum over all passes (a loss, a gradient) does not depend on the
budget.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from stages.config import Microbatch
from stages.errors import TrainingError, is_out_of_memory
from stages.kernels.token_budget import GPU_SHARE, GPU_TOKENS, rows_per_batch, token_budget_batches, tokens_of
from stages.models.sharding import in_lockstep, sharded_blocks
from stages.process.console import announce, in_progress
from stages.process.gpus import free_gpu_memory, own_peak
from stages.sampling.retreats import ADVICE, SAME_RESULT, LastAttempt, row_limit

logger = logging.getLogger(__name__)


class PassTooLarge(TrainingError):
    """Memory ran out in a pass that takes all processes, so one process cannot repeat it."""

    @classmethod
    def of(cls, what: str, move: str, *, size: str = "") -> PassTooLarge:
        """The error of the work ``what``. ``size``: of the pass, such as ``of 512 tokens``. ``move``: a sentence with the next move."""
        passed = f"a pass {size}" if size else "a pass"
        return cls(f"{what}: memory ran out in {passed} that takes all processes, so one cannot repeat it alone. {move}")


FIRST_TOKENS = 2_048  # budget of a training pass on a GPU before memory is measured
SIZES_APART = 1.5
LEAST_SLOPE = 0.25
STEP_TOKENS = 1_024  # budgets are multiples of this, so that equal machines get equal budgets


class PassBudget:
    """The maximum number of sequences and tokens of a pass, for one kind of work (update, measuring) on one device."""

    def __init__(self, what: str, device: torch.device | str, size: Microbatch, *, rows: int, trains: bool, advice: str = ADVICE) -> None:
        """``what`` is the name of the work in the log. ``rows``: sequences per pass on a CPU if ``size`` is auto. ``trains``: whether
        passes keep activations for a backward pass, so that their memory must be measured. ``advice``: a sentence that names the settings
        to lower if a single sequence does not fit."""
        self.what, self.device, self.advice = what, torch.device(device), advice
        by_tokens = size == "auto" and self.device.type != "cpu"
        self.rows: int | None = rows if size == "auto" else size
        self.tokens = self._most = float("inf")
        if by_tokens:
            self.rows, self.tokens = None, FIRST_TOKENS if trains else GPU_TOKENS
        self.measures = by_tokens and trains  # until ``settle``
        self.retreats = 0  # number of times that memory ran out; callers that report it set it to 0
        self.largest = 0  # tokens of the largest pass that succeeded
        self._taken: list[tuple[int, int]] = []  # (tokens, bytes) of each measured pass
        self._current: tuple[int, int] = (0, 0)  # sequences and tokens of the current pass
        self._said = False  # whether the log says that memory ran out
        self._last_attempt = LastAttempt(what, advice)

    def groups(self, order: Sequence[int], lengths: Sequence[int], *, packed: bool = False) -> list[list[int]]:
        """Divide the sequences of ``order`` into passes. ``lengths``: tokens of all sequences, indexed by the entries of ``order``.

        While memory is measured, the last pass is divided again: passes of two sizes show what does not depend on the number of tokens.
        """
        made = token_budget_batches(order, lengths, rows=self.rows, device_type=self.device.type, tokens=self.tokens, packed=packed)
        if self.measures and len(made) > 2 and len(made[-1]) > 1:
            last = made.pop()
            made += [last[: len(last) // 2], last[len(last) // 2 :]]
        return made

    def rows_for(self, number: int, length: int) -> int:
        """Number of sequences per pass, for ``number`` sequences of ``length`` tokens."""
        rows = number if self.rows is None else self.rows
        return rows_per_batch(max(1, rows), length, device_type=self.device.type, tokens=self.tokens)

    @contextmanager
    def one_pass(self, sequences: int, tokens: int) -> Iterator[None]:
        """Context manager around one pass over this many sequences and tokens (including padding).

        Records its size, and its memory if needed.
        """
        self._current = (sequences, tokens)
        if self.measures:
            with own_peak() as peak:
                yield
            self._taken.append((tokens, peak.added))
        else:
            yield
        self.largest = max(self.largest, tokens)

    def settle(self, pending: int, *, free: Callable[[], int] | None = None, agree: Callable[[int], int] | None = None) -> None:
        """Set the budget for the rest of the run from the measured passes. Does nothing if none was measured.

        ``pending``: bytes that the process will need besides the passes (optimizer moments that do not exist yet). ``free`` returns the
        free memory. ``agree`` reduces this process's budget to the one of all processes, if they must be equal.
        """
        if not self.measures or not self._taken:
            return
        self.measures = False
        # The first pass also creates gradients and casts that stay in memory, so it is ignored if there is a second one.
        per_token, fixed = memory_of_passes(self._taken[1:] or self._taken)
        room = GPU_SHARE * max(0, (free or free_gpu_memory)() - pending)
        fitting = max(0.0, room - fixed) / per_token if per_token > 0 else GPU_TOKENS
        tokens = min(GPU_TOKENS, max(STEP_TOKENS, int(fitting) // STEP_TOKENS * STEP_TOKENS))
        if self.retreats:
            tokens = min(tokens, int(self.tokens))
        tokens = int(min(tokens, self._most))
        self.tokens = tokens if agree is None else agree(tokens)
        size = f"{per_token / 2**10:.1f} KiB each and {fixed / 2**20:.0f} MiB per pass, {room / GPU_SHARE / 2**30:.1f} GiB free"
        line = f"{self.what}: up to {self.tokens} tokens in a pass ({size})"
        logger.info("%s", line)
        announce(("tokens", self.what), line)

    @property
    def settled(self) -> int | None:
        """The number of tokens that ``settle`` has set, for a checkpoint; None before that, and without such a number."""
        return None if self.measures or self.tokens == float("inf") else int(self.tokens)

    def resume(self, tokens: int | None) -> None:
        """Continue with the value of ``settled`` from a checkpoint, so that a resumed run has the same passes and the same rounding."""
        if self.measures and tokens is not None:
            self.tokens, self.measures = min(tokens, self._most), False

    def lower_to(self, tokens: int | None) -> None:
        """Never make passes of more than ``tokens`` tokens, except those over one sequence. None: no limit."""
        if tokens is not None:
            self._most = tokens
            self.tokens = min(self.tokens, tokens)

    def retreat(self, error: BaseException) -> None:
        """Halve the budget after memory ran out in the current pass. The log says so once.

        Raises ``error`` if it is another error, and MemoryExhausted if a single sequence did not fit twice. Call it in the ``except``
        clause, and ``release`` after that clause, when the tensors of the failed pass are freed.
        """
        sequences, tokens = self._current
        if not is_out_of_memory(error):
            raise error
        if sequences <= 1:
            self._last_attempt.begin(error, tokens)
            return
        if not self._said:
            self._said = True
            logger.warning(
                "%s: memory ran out in a pass of %d tokens (%d sequences); it is repeated with at most half as many. %s",
                self.what,
                tokens,
                sequences,
                SAME_RESULT,
            )
        self.retreats += 1
        self.tokens = min(self.tokens, tokens) // 2

    @property
    def current(self) -> tuple[int, int]:
        """Sequences and tokens of the current pass."""
        return self._current

    def release(self) -> None:
        """Free the memory of a failed pass, and the workspace that decoding keeps for its next call."""
        self._last_attempt.release()

    def succeeded(self) -> None:
        """All passes have succeeded since the last ``retreat``."""
        self._last_attempt.succeeded()

    def each(self, order: Sequence[int], lengths: Sequence[int], work: Callable[[list[int]], None], *, packed: bool = False) -> None:
        """Call ``work(rows)`` for every pass over ``order``. If memory runs out, the rows of the failed pass and of later ones are divided
        into smaller passes; earlier passes are not repeated. ``work`` must have no side effects if it fails."""
        waiting = self.groups(order, lengths, packed=packed)
        while waiting:
            rows = waiting[0]
            try:
                with self.one_pass(len(rows), tokens_of(rows, lengths, packed=packed)):
                    work(rows)
            except Exception as error:
                self.retreat(error)
            else:
                self.succeeded()
                del waiting[0]
                continue
            self.release()
            waiting = self.groups([row for group in waiting for row in group], lengths, packed=packed)


def memory_of_passes(taken: Sequence[tuple[int, int]]) -> tuple[float, float]:
    """(bytes per token, bytes of every pass) of measured passes (tokens, bytes).

    A pass also takes memory that does not grow with it: chunks of logits, the gradient of the output matrix, dequantized weights. It is
    known from two sizes, of which one is at least SIZES_APART times the other. Otherwise everything counts as memory of the tokens. No
    measured pass takes more than the result says, and tokens count at least LEAST_SLOPE of that.
    """
    tokens, size = max(taken)
    per_token = max(each / number for number, each in taken)
    smaller = [(number, each) for number, each in taken if number * SIZES_APART <= tokens]
    if smaller:
        fewer, less = min(smaller, key=lambda one: one[1])
        per_token = min(per_token, max((size - less) / (tokens - fewer), LEAST_SLOPE * per_token))
    return per_token, max(0.0, *(each - per_token * number for number, each in taken))


def each_group_together(
    what: str, groups: Iterable[Sequence[int]], work: Callable[[list[int]], None], device: torch.device, *, advice: str = ADVICE
) -> None:
    """``each_group`` for models with sharded weights. It repeats the last group while other processes have more groups.

    Raises PassTooLarge with ``advice`` if memory runs out.
    """
    try:
        for rows in in_lockstep([list(group) for group in groups], device):
            work(rows)
    except Exception as error:
        refuse_alone(error, what, advice)
        raise


def each_group(
    what: str,
    groups: Iterable[Sequence[int]],
    work: Callable[[Sequence[int]], None],
    *,
    model: nn.Module | None = None,
    known_by: nn.Module | None = None,
    advice: str = ADVICE,
) -> None:
    """Call ``work(rows)`` for every group of rows, in order.

    If memory runs out, the group is repeated in halves, and later groups are split to that size. The log says so once and names ``what``.
    ``work`` must have no side effects if it fails. Raises MemoryExhausted with ``advice`` if a single row does not fit.

    ``model``: the model of the passes. If its weights are sharded, call this on every process with at least one group. All processes then
    make the same number of passes, and memory that runs out is an error. Call it with ``torch.no_grad``: FSDP keeps buffers of a pass, and
    tensors of the inference mode are not allowed there.

    ``known_by``: the model for which later calls know the smaller size; ``model`` if it is not given.
    """
    if model is not None and sharded_blocks(model):
        each_group_together(what, groups, work, next(model.parameters()).device, advice=advice)
        return
    limit = row_limit(model if known_by is None else known_by, what, advice)
    waiting = [list(group) for group in groups]
    with in_progress(what, sum(map(len, waiting))) as done:
        while waiting:
            rows = waiting.pop(0)
            most = limit.within(len(rows))
            if len(rows) > most:
                waiting.insert(0, rows[most:])
                rows = rows[:most]
            try:
                work(rows)
            except Exception as error:
                limit.retreat(error, len(rows))
            else:
                limit.succeeded()
                done(len(rows))
                continue
            waiting.insert(0, rows)
            limit.release()


def refuse_alone(error: BaseException, what: str, advice: str = ADVICE) -> None:
    """Raise PassTooLarge if ``error`` means that memory ran out in a pass through sharded weights, which takes all processes.

    ``what``: the name of the work. ``advice``: a sentence with the next move.
    """
    if is_out_of_memory(error):
        raise PassTooLarge.of(what, advice) from error
