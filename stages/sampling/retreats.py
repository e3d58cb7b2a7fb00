"""What to do when memory runs out in a pass: continue with fewer rows, free what other parts keep, or give one message.

A pass over several rows is repeated with half as many. A pass over a single row is repeated once, after all memory that can be freed was
freed. If it fails again, the row does not fit, and ``MemoryExhausted`` names the work and the settings to lower.
"""

from __future__ import annotations

import gc
import logging
from weakref import WeakKeyDictionary

import torch
from torch import nn

from stages.errors import MemoryExhausted, is_out_of_memory
from stages.sampling.workspace import drop_kept_workspace

logger = logging.getLogger(__name__)

ADVICE = "Use shorter texts, quantize the model (quantization: nf4), or use a smaller one"
SAME_RESULT = "The result is the same"


def release_memory() -> None:
    """Free the memory of a failed pass, and the workspace that decoding keeps for its next call.

    Call it after the ``except`` clause: before its end, the error keeps the tensors of the failed pass in memory.
    """
    drop_kept_workspace()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class LastAttempt:
    """The second attempt of a pass over a single row, after memory was freed.

    ``what``: the name of the work in the message. ``advice``: a sentence that names the settings to lower.
    """

    def __init__(self, what: str, advice: str = ADVICE) -> None:
        self.what, self.advice = what, advice
        self.begun = False  # whether the next pass is the second attempt
        self._said = False  # whether the log says that a single row was repeated
        self._taken = ""  # memory that is taken before the second attempt

    def begin(self, error: BaseException, tokens: int | None = None) -> None:
        """Allow a second attempt; the log says so once. ``tokens``: of the row, if they are known.

        Raises MemoryExhausted if this was the second attempt.
        """
        if self.begun:
            length = "" if tokens is None else f" of {tokens} tokens"
            raise MemoryExhausted(
                f"{self.what}: memory ran out in a pass over one sequence{length}, which cannot be divided{self._taken}. {self.advice}"
            ) from error
        self.begun = True
        if not self._said:
            self._said = True
            logger.warning("%s: memory ran out in a pass over one sequence; it is repeated after freeing what decoding keeps", self.what)

    def release(self) -> None:
        """``release_memory``, and measure what is still taken."""
        release_memory()
        if self.begun and torch.cuda.is_initialized():
            free, total = torch.cuda.mem_get_info()
            self._taken = f" ({(total - free) / 2**30:.1f} of the GPU's {total / 2**30:.1f} GiB were taken before it)"

    def succeeded(self) -> None:
        """The pass that failed before has succeeded."""
        self.begun = False


class RowLimit:
    """The most rows of a pass for one kind of work. It is halved when memory runs out."""

    def __init__(self, what: str, advice: str = ADVICE, same: str = SAME_RESULT) -> None:
        """``what``: the name of the work in messages. ``same``: a sentence about the result with fewer rows."""
        self.what, self.same = what, same
        self.rows: int | None = None  # None: no limit yet
        self.last_attempt = LastAttempt(what, advice)

    def within(self, rows: int) -> int:
        """``rows``, or the limit if it is smaller."""
        return rows if self.rows is None else min(rows, self.rows)

    def retreat(self, error: BaseException, rows: int) -> None:
        """Halve the limit after memory ran out in a pass over ``rows`` rows. The log says so the first time. A single row changes no limit.

        Raises ``error`` if it is another error, and MemoryExhausted if a single row did not fit twice. Call it in the ``except`` clause,
        and ``release`` after that clause.
        """
        if not is_out_of_memory(error):
            raise error
        if rows <= 1:
            self.last_attempt.begin(error)
            return
        if self.rows is None:
            logger.warning("%s: memory ran out in a pass over %d sequences; continuing with half as many. %s", self.what, rows, self.same)
        self.rows = -(-rows // 2)

    def release(self) -> None:
        """``release_memory`` after a retreat."""
        self.last_attempt.release()

    def succeeded(self) -> None:
        """A pass has succeeded."""
        self.last_attempt.succeeded()


_limits: WeakKeyDictionary[nn.Module, dict[str, RowLimit]] = WeakKeyDictionary()


def row_limit(model: nn.Module | None, what: str, advice: str = ADVICE, same: str = SAME_RESULT) -> RowLimit:
    """The limit for the work ``what`` with ``model``. It is kept as long as the model, so later calls begin with it.

    None: a limit for one call.
    """
    known = {} if model is None else _limits.setdefault(model, {})
    return known.setdefault(what, RowLimit(what, advice, same))
