"""Limits on passes that the next start of a step reads, after memory ran out in a pass that takes all processes.

In such a pass the processes exchange gradients (DDP) or weights (FSDP), so one process cannot repeat it alone. The step ends with a
message. The same command continues from the last checkpoint with smaller passes.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from stages.process.storage import read_json, write_json

if TYPE_CHECKING:
    from stages.step import StepContext

FILE = "pass-limits.json"


def write_limit(context: StepContext, work: str, size: int) -> str:
    """Limit the passes of ``work`` to ``size`` (tokens or examples) from the next start on. Returns the next move, a sentence."""
    path = context.checkpoint_folder / FILE
    known = read_json(path)
    write_json(path, {**known, work: min(size, known.get(work, size))})
    return "Run the same command again: it continues from the last checkpoint with passes of half the size"


def read_limit(context: StepContext, work: str) -> int | None:
    """The limit that earlier starts set for ``work``, the same on every process; None if there is none. Call it on every process."""
    own = read_json(context.checkpoint_folder / FILE).get(work)
    (largest,) = context.runtime.largest(-math.inf if own is None else -own)  # machines without a common disk have a file each
    if largest == -math.inf:
        return None
    limit = int(-largest)
    context.runtime.console.print(f"{context.name}: memory ran out in an earlier start, so passes are smaller ({work}: at most {limit})")
    return limit
