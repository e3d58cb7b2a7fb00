"""``accelerate launch`` with three repairs: as many processes as were asked for, their exit status, and signals that reach them.

    python -m stages.process.launching [options of accelerate launch] -m stages run RECIPE [step.field=value ...]

Accelerate alone starts one process on a CPU whatever the number (it would need MPI), ends with status 1 whatever happened, and dies of a
signal without its children. ``stages run`` under a plain ``accelerate launch`` sees that processes are missing and starts this instead.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from stages.errors import LaunchError
from stages.process import ending, environment


def main() -> None:
    """The command."""
    try:
        status = launch(sys.argv[1:])
    except LaunchError as error:
        ending.print_error(f"error: {error}")
        status = error.exit_status
    sys.exit(status)


def start_missing_processes() -> None:
    """Replace this process by a launcher where ``accelerate launch`` was asked for several processes and started this one alone.

    Raises LaunchError where it cannot be found out how many.
    """
    if not environment.is_short_of_processes():
        return
    arguments = _arguments_of_launcher()
    if arguments is None:
        raise LaunchError(
            "more than one process was asked for, and accelerate started this one alone; start them with "
            "`./launch.sh RECIPE --num_processes N` or `torchrun --nproc_per_node N -m stages run RECIPE`"
        )
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, "-m", "stages.process.launching", *arguments], environment.environment_without_launcher())


def launch(arguments: Sequence[str]) -> int:
    """Run what ``accelerate launch ARGUMENTS`` describes; returns the exit status: that of the process that failed first, or 128 + signal.

    Raises LaunchError where this machine cannot run so many processes.
    """
    from accelerate.commands.launch import _validate_launch_command, launch_command, launch_command_parser, multi_gpu_launcher

    parsed = launch_command_parser().parse_args(list(arguments))
    logging.getLogger("accelerate.commands.launch").setLevel(logging.ERROR)  # it lists the defaults it takes
    try:
        parsed, _, _ = _validate_launch_command(parsed)
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise LaunchError(f"accelerate does not accept its options: {error}") from error
    parsed.num_processes = parsed.num_processes or 1
    devices = _num_devices()
    on_cpu = bool(parsed.cpu or parsed.use_cpu or devices == 0)
    per_machine = max(1, parsed.num_processes // (parsed.num_machines or 1))
    if on_cpu and parsed.use_deepspeed:
        raise LaunchError("DeepSpeed was asked for, and this machine has no GPU; use recipes/accelerate/fsdp2.yaml, which runs on CPUs too")
    if not on_cpu and per_machine > devices:
        raise LaunchError(
            f"{per_machine} processes were asked for and this machine has {devices} GPU(s), one for each; ask for fewer, or add --cpu"
        )
    if on_cpu:
        os.environ["ACCELERATE_USE_CPU"] = "true"
        if parsed.mpirun_hostfile is not None:
            return _run_alone(parsed)
    if parsed.use_deepspeed:
        return _status_of(launch_command, launch_command_parser().parse_args(list(arguments)))
    if parsed.num_processes == 1 and (parsed.num_machines or 1) == 1 and not parsed.use_fsdp:
        return _run_alone(parsed)
    if parsed.main_process_port is None and (parsed.num_machines or 1) == 1:
        parsed.main_process_port = 0  # any free port: two runs on one machine must not meet
    # Nothing of it is about GPUs: it sets the environment and runs torch's elastic launcher, which serves CPUs (gloo) as well.
    return _status_of(multi_gpu_launcher, parsed)


def _num_devices() -> int:
    import torch

    return torch.accelerator.device_count() if torch.accelerator.is_available() else 0


def _run_alone(parsed: Any) -> int:
    """One child (or mpirun's); SIGTERM and SIGHUP are passed on, and Ctrl-C reaches it through the terminal."""
    from accelerate.utils.launch import prepare_simple_launcher_cmd_env

    command, environment = prepare_simple_launcher_cmd_env(parsed)
    child = subprocess.Popen(command, env=environment)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda received, _: child.send_signal(received))
    signal.signal(signal.SIGINT, lambda *_: None)
    status = child.wait()
    return 128 - status if status < 0 else status


def _status_of(launcher: Any, parsed: Any) -> int:
    """Run an elastic launcher of accelerate's. Its own log of a failure is left out: the process that failed has said why."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    try:
        launcher(parsed)
    except SignalException as error:
        return 128 + int(error.sigval)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            return int(failure.exitcode)
        name = signal.Signals(-failure.exitcode).name
        ending.print_error(f"error: process {rank} of {parsed.num_processes} was ended by {name}; the others were ended with it")
        return 128 - int(failure.exitcode)
    return 0


def _arguments_of_launcher() -> list[str] | None:
    """What followed ``accelerate launch`` on the command line that started this process."""
    import psutil

    for parent in psutil.Process().parents():
        try:
            words = parent.cmdline()
        except psutil.Error:
            continue
        for place, word in enumerate(words[:4]):
            name = os.path.basename(word)
            if name == "accelerate" and words[place + 1 : place + 2] == ["launch"]:
                return words[place + 2 :]
            if name == "accelerate-launch" or word in ("accelerate.commands.launch", "accelerate/commands/launch.py"):
                return words[place + 1 :]
    return None


if __name__ == "__main__":
    main()
