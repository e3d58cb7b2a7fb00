"""How a command ends: an error becomes one message on stderr and an exit status, and a signal stops a run in an orderly way."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, ParamSpec, TypeVar

import typer

from stages.commands.options import home_path
from stages.errors import LaunchError, Stopped, Waiting

if TYPE_CHECKING:
    from stages.process.runtime import Runtime

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def reports_errors(command: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Report an error as one message on stderr. Exit status: 2 if the user can fix it, 1 if it is unexpected.

    ``--debug`` shows the traceback instead. Ctrl-C ends a command with status 130.
    """

    name = command.__name__.removesuffix("_models").removesuffix("_command")

    @wraps(command)
    def wrapped(*arguments: Parameters.args, **options: Parameters.kwargs) -> Result:
        from stages.process import ending, logs

        logs.silence()
        try:
            return command(*arguments, **options)
        except (typer.Exit, typer.Abort, typer.BadParameter, BrokenPipeError):
            raise
        except KeyboardInterrupt as error:
            if not ending.was_in_step(error):  # in a step Ctrl-C raises Stopped, so a recipe function raised this
                _end(130, error)
            _report(error, name, options)
        except (Exception, SystemExit) as error:
            if isinstance(error, SystemExit) and isinstance(error.__context__, BrokenPipeError):
                raise  # rich ends the program if the reader of the output has ended, as in `stages plan RECIPE | head`
            if isinstance(error, Exception) and ending.lost_the_others(error):
                explained = LaunchError("another process of this run ended, and this one cannot continue alone; see its message above")
                _say(f"error: {explained}", is_echo=True)
                _end(explained.exit_status, error)
            _report(error, name, options)

    return wrapped


def _report(error: BaseException, command: str, options: Mapping[str, object]) -> NoReturn:
    """Print the error and end the command. With --debug raise ``error`` instead."""
    from stages.process.ending import explain

    if isinstance(error, Waiting):
        _say(f"waiting: {error}", is_echo=False)
        _end(error.exit_status, error)
    if options.get("debug"):
        if isinstance(error, SystemExit):  # it would end the program without a message
            raise RuntimeError(f"the program was ended by {error!r}") from error
        raise error
    home = options.get("home")
    explained = explain(error, f"stages {command}", home_path(home if isinstance(home, Path) else None))
    _say(f"error: {explained}", is_echo=False)
    _end(explained.exit_status, error)


def _end(status: int, cause: BaseException) -> NoReturn:
    from stages.process import ending, environment

    if environment.launched_processes() > 1:
        ending.leave_at_once(status)
    raise typer.Exit(status) from cause


def _say(message: str, *, is_echo: bool) -> None:
    """Show a message. Processes with the same error show it only once: rank zero prints first, and its exit ends the waiting others."""
    from stages.process import ending, environment

    rank = environment.launched_rank()
    if is_echo or rank > 0:  # the other process prints its own message; rank zero may print the same error
        time.sleep(5 if is_echo else 2)
    ending.print_error(f"process {rank}: {message}" if rank > 0 else message)


@contextmanager
def stoppable(runtime: Runtime) -> Iterator[None]:
    """Context in which SIGTERM and Ctrl-C stop in an orderly way: print the command to continue, and exit with the signal's status."""
    from stages.process.ending import print_error
    from stages.process.environment import continue_command

    try:
        with runtime.stop.installed():
            yield
    except Stopped as stop:
        if runtime.is_main:
            print_error(f"stopped by {stop.name}; completed work is kept. To continue: {continue_command()}")
        _end(stop.exit_status, stop)
