"""Errors that a user can fix. Each message names the value, what was expected and the next move; the command exits with status 2.

``doing`` records the current activity, for the message of an unexpected error. ``is_out_of_memory`` recognizes that memory ran out.

    StagesError
    |- RecipeError      the recipe file, or an override on the command line
    |- DataError        a data file, a row of it, or a missing column
    |- ModelError       a model, tokenizer, head or adapter that cannot be used as requested
    |- RegistryError    the registry: an unknown reference, a damaged version, a refused removal
    |- TrainingError    a run that must stop (NaN, a reward function with invalid output)
    |- MemoryExhausted  a single sequence does not fit into memory
    |- StorageError     a full disk, a folder without write permission
    |- HubError         a model or data set of the Hub that cannot be used
    |  |- HubMissing        the Hub does not have it
    |  '- HubUnreachable    the Hub cannot be reached, and the local cache does not have it
    |- LaunchError      processes that cannot start as requested, or that lost each other
    |- UnexpectedError  any other exception, in one message; exit status 1
    '- Waiting          not an error: annotators have to answer first; the same command continues afterwards (status 75)
    Stopped             not an error: SIGTERM or Ctrl-C requested an orderly stop
"""

import errno
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


class StagesError(Exception):
    """Base class of all errors with a message for the user. Commands report any other exception as an UnexpectedError."""

    exit_status = 2


class RecipeError(StagesError):
    """The recipe is invalid. The message begins with ``file:line:`` if the file is known."""


class DataError(StagesError):
    """The data cannot be used. The message names file, line and column."""


class ModelError(StagesError):
    """A model cannot be used in the role that the recipe gives it."""


class RegistryError(StagesError):
    """The registry cannot do what was requested. It was not changed."""


class TrainingError(StagesError):
    """Training was stopped on purpose. Earlier results are kept."""


class MemoryExhausted(StagesError):
    """Memory ran out in work that cannot be divided. The message names the work, its size and the settings to lower."""


class StorageError(StagesError):
    """A file could not be written. The registry and earlier checkpoints are intact."""


class HubError(StagesError):
    """A model or data set of the Hub cannot be used. The message gives the Hub's answer and the next move."""


class HubMissing(HubError):
    """The Hub has no such repository or revision."""


class HubUnreachable(HubError):
    """The Hub did not answer, or HF_HUB_OFFLINE is set and the local cache does not have the file."""


class LaunchError(StagesError):
    """Processes cannot start as requested, or a process lost the others."""


class Waiting(StagesError):
    """A step waits for annotators. The message says what they have to do."""

    exit_status = 75  # EX_TEMPFAIL of sysexits.h: try again later


class UnexpectedError(StagesError):
    """An unexpected exception. The message names the activity and the path of the traceback."""

    exit_status = 1


ALLOCATION_FAILURES = (
    "out of memory",
    "out_of_memory",
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "alloc_failed",
    "bad_alloc",
    "cublas_status_not_initialized",
)
"""Parts of messages of memory errors with a general class: CUDA, Triton, torch's allocators, the system, cuBLAS and similar, C++.
cuBLAS is not initialized if its own memory does not fit."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on the CPU or a GPU. The only place that decides this.

    Python and NumPy raise MemoryError, the system an OSError, torch on a GPU OutOfMemoryError. Torch on a CPU, libraries of CUDA and
    safetensors raise errors of a general class, which only their message distinguishes.
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    by_message = isinstance(error, RuntimeError | OSError) or type(error).__name__ == "SafetensorError"
    return by_message and any(words in str(error).lower() for words in ALLOCATION_FAILURES)


def some_of(names: Sequence[str], most: int = 4) -> str:
    """The first names for a message, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


@contextmanager
def doing(what: str, folder: Path | None = None) -> Iterator[None]:
    """Attach ``what`` (the current activity) and a folder for the traceback to exceptions in the block. Inner notes come first."""
    try:
        yield
    except (Exception, SystemExit, KeyboardInterrupt) as error:
        if not isinstance(error, StagesError):
            vars(error).setdefault("stages_notes", []).append((what, folder))
        raise


class Stopped(BaseException):
    """A signal requested a stop. It is not an Exception, so that libraries do not catch it as one."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number

    @property
    def name(self) -> str:
        return signal.Signals(self.number).name

    @property
    def exit_status(self) -> int:
        """128 + the signal number, as in shells."""
        return 128 + self.number
