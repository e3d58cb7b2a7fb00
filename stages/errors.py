"""The errors a user can act on. Each message names the value, what was expected and the next move; the command exits with status 2.

``doing`` notes what the program was at, for the message of an error that nobody expected.

    StagesError
    |- RecipeError      the recipe file, or an override on the command line
    |- DataError        a data file, a row of it, or a missing column
    |- ModelError       a model, a tokenizer, a head or an adapter that cannot be used as asked
    |- RegistryError    the registry: a reference that does not resolve, a damaged version, a refused removal
    |- TrainingError    a run that must not go on (NaN, a reward function that returns nonsense)
    |- StorageError     a disk that is full, a folder that may not be written
    |- HubError         a model or a data set of the Hub that cannot be used
    |  |- HubMissing        the Hub does not have it
    |  '- HubUnreachable    the Hub cannot be asked, and the local cache has no answer
    |- LaunchError      processes that cannot be started as asked, or that lost each other
    |- UnexpectedError  any other exception, in one message; exit status 1
    '- Waiting          no error: people have to answer first, and the same command goes on afterwards (status 75)
    Stopped             no error: SIGTERM or Ctrl-C asked for an orderly end
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class StagesError(Exception):
    """Base of every error that has a message for the user. Commands report any other exception as an UnexpectedError."""

    exit_status = 2


class RecipeError(StagesError):
    """The recipe is wrong; the message begins with ``file:line:`` where the file is known."""


class DataError(StagesError):
    """The data cannot be used; the message names file, line and column."""


class ModelError(StagesError):
    """A model cannot play the role the recipe gives it."""


class RegistryError(StagesError):
    """The registry cannot do what was asked; nothing in it was changed."""


class TrainingError(StagesError):
    """Training was stopped on purpose; what was made before is kept."""


class StorageError(StagesError):
    """Something could not be written; the registry and the checkpoints before it are whole."""


class HubError(StagesError):
    """A model or a data set of the Hub cannot be used; the message says what the Hub answered and what to do."""


class HubMissing(HubError):
    """The Hub has no such repository or revision."""


class HubUnreachable(HubError):
    """The Hub did not answer, or must not be asked (HF_HUB_OFFLINE) and the local cache does not have it."""


class LaunchError(StagesError):
    """Processes cannot be started as asked, or one of them lost the others."""


class Waiting(StagesError):
    """A step waits for people; the message says what they are asked to do."""

    exit_status = 75  # EX_TEMPFAIL of sysexits.h: try again later


class UnexpectedError(StagesError):
    """An exception that no code expected; the message says what was being done, and where the traceback is."""

    exit_status = 1


@contextmanager
def doing(what: str, folder: Path | None = None) -> Iterator[None]:
    """Note on an exception that leaves the block that this was being done, and a folder for its traceback. Innermost notes come first."""
    try:
        yield
    except (Exception, SystemExit, KeyboardInterrupt) as error:
        if not isinstance(error, StagesError):
            vars(error).setdefault("stages_notes", []).append((what, folder))
        raise


class Stopped(BaseException):
    """A signal asked for an end. Not an Exception: no library on the way may take it for an error of its own."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number

    @property
    def name(self) -> str:
        return signal.Signals(self.number).name

    @property
    def exit_status(self) -> int:
        """128 + the signal's number, as shells count."""
        return 128 + self.number
