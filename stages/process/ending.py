"""How a process ends after an error: one message, the traceback in a file, and rules for several processes. Does not import torch."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from contextlib import suppress
from pathlib import Path

from stages.errors import MemoryExhausted, StagesError, UnexpectedError, is_out_of_memory
from stages.process.environment import launched_processes, launched_rank
from stages.process.redaction import without_secrets
from stages.process.storage import storage_error

LONGEST_REASON = 300  # characters of the exception's first line
PACKAGE = Path(__file__).resolve().parents[1]
OUT_OF_MEMORY = (
    "Use a smaller model, quantize it (quantization: nf4), train an adapter (lora) or 8-bit moments (training.optimizer: adamw_8bit), or "
    "shorten the texts. PPO: set offload: true. End other programs that use this memory. `stages plan` estimates what a step needs"
)
"""The next move if memory ran out outside of passes that can be smaller: the weights and what belongs to them do not fit."""


def was_in_step(error: BaseException) -> bool:
    """Whether ``error`` was raised inside a recipe step."""
    return any(folder is not None for _, folder in vars(error).get("stages_notes", []))


def explain(error: BaseException, doing: str, home: Path) -> StagesError:
    """The message for ``error``: its own message, a disk error, or one of ``unexpected``."""
    if isinstance(error, StagesError):
        return error
    return storage_error(error) or unexpected(error, doing, home)


def unexpected(error: BaseException, doing: str, home: Path) -> StagesError:
    """The message for ``error``: MemoryExhausted if memory ran out, else UnexpectedError.

    Writes its traceback to the folder in its notes, else to ``<home>/errors``.

    ``doing`` is the activity if the error has no notes.
    """
    notes = vars(error).get("stages_notes", [])
    folder = next((folder for _, folder in notes if folder is not None), home / "errors")
    did = ", ".join(what for what, _ in reversed(notes)) or doing
    no_memory = is_out_of_memory(error)
    what = "memory ran out, " if no_memory else "unexpected "
    parts = [f"{did}: {what}{_reason(error)}{_location(error)}"]
    if no_memory:
        parts.append(OUT_OF_MEMORY)
    file = _write(traceback.format_exception(error), folder)
    parts.append(f"The traceback is in {file}; --debug shows it" if file is not None else "--debug shows the traceback")
    return (MemoryExhausted if no_memory else UnexpectedError)(". ".join(parts))


def _reason(error: BaseException) -> str:
    """``ValueError: the first line of its message``."""
    try:
        lines = str(error).strip().splitlines()
    except Exception:  # a user's exception may fail to print itself
        lines = ["(its message cannot be printed)"]
    first = lines[0] if lines else ""
    shown = first if len(first) <= LONGEST_REASON else first[: LONGEST_REASON - 3] + "..."
    return f"{type(error).__name__}: {shown}" if shown else type(error).__name__


def _location(error: BaseException) -> str:
    """`` (stages/models/heads.py:12)``: the innermost line of this package; empty if there is none."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if path.is_relative_to(PACKAGE):
            return f" ({path.relative_to(PACKAGE.parent)}:{frame.lineno})"
    return ""


def _write(lines: list[str], folder: Path) -> Path | None:
    """Write the traceback to ``folder``, else to the folder for temporary files. Returns None if both fail."""
    rank = launched_rank()
    name = "traceback.txt" if rank == 0 else f"traceback-{rank}.txt"
    text = without_secrets("".join(lines)).encode("utf-8", "backslashreplace")
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text)
        return folder / name
    with suppress(OSError), tempfile.NamedTemporaryFile(prefix="stages-", suffix=f"-{name}", delete=False) as file:
        file.write(text)
        return Path(file.name)
    return None


def print_error(text: str) -> None:
    """Write one message to stderr in a single call, so that messages of several processes do not mix."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def leave_at_once(status: int) -> None:
    """End one of several processes after an error, without an orderly shutdown of the communication, which could hang."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def lost_the_others(error: BaseException) -> bool:
    """Whether ``error`` means that another process of this run has ended. gloo and NCCL notice it at their next communication."""
    if launched_processes() == 1:
        return False
    if type(error).__name__ in ("DistBackendError", "DistNetworkError"):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in ("gloo", "closed by peer", "reset by peer"))
