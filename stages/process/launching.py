"""``accelerate launch`` with three fixes: the requested number of processes, their exit status, and forwarded signals.

    python -m stages.process.launching [options of accelerate launch] -m stages run RECIPE [step.field=value ...]

Without these fixes, accelerate on a CPU starts one process for any requested number (it would need MPI). It exits with status 1 on every
failure. After a signal it ends, but its children continue. ``stages run`` under a plain ``accelerate launch`` detects missing processes and
starts this launcher instead.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence

from stages.errors import LaunchError
from stages.process import ending, environment
from stages.process.threads import set_up_threads


def main() -> None:
    """The command."""
    try:
        status = launch(sys.argv[1:])
    except LaunchError as error:
        ending.print_error(f"error: {error}")
        status = error.exit_status
    sys.exit(status)


def start_missing_processes() -> None:
    """If ``accelerate launch`` should have started several processes but started only this one, replace this process by a launcher.

    Raises LaunchError if the number of processes cannot be determined.
    """
    if not environment.is_short_of_processes():
        return
    arguments = _arguments_of_launcher()
    if arguments is None:
        raise LaunchError(
            "more than one process was requested, but accelerate started only this one; start them with "
            "`./launch.sh RECIPE --num_processes N` or `torchrun --nproc_per_node N -m stages run RECIPE`"
        )
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, "-m", "stages.process.launching", *arguments], environment.environment_without_launcher())


def launch(arguments: Sequence[str]) -> int:
    """Run what ``accelerate launch ARGUMENTS`` describes. Returns the exit status of the first failed process, or 128 + signal.

    Raises LaunchError if this machine cannot run the requested processes.
    """
    from accelerate.commands.launch import _validate_launch_command, launch_command, launch_command_parser, multi_gpu_launcher

    parsed = launch_command_parser().parse_args(list(arguments))
    names_threads = parsed.num_cpu_threads_per_process is not None
    logging.getLogger("accelerate.commands.launch").setLevel(logging.ERROR)  # it would list all defaults
    try:
        parsed, _, _ = _validate_launch_command(parsed)
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise LaunchError(f"accelerate does not accept its options: {error}") from error
    parsed.num_processes = parsed.num_processes or 1
    devices = _num_devices()
    on_cpu = bool(parsed.cpu or parsed.use_cpu or devices == 0)
    per_machine = max(1, parsed.num_processes // (parsed.num_machines or 1))
    if not names_threads:
        set_up_threads(os.environ, processes=per_machine)
        parsed.num_cpu_threads_per_process = int(os.environ["OMP_NUM_THREADS"])
    if on_cpu and parsed.use_deepspeed:
        raise LaunchError("DeepSpeed was requested, but this machine has no GPU; use recipes/accelerate/fsdp2.yaml (runs on CPUs)")
    if not on_cpu and per_machine > devices:
        raise LaunchError(
            f"{per_machine} processes were requested, but this machine has {devices} GPU(s), one per process; use fewer, or add --cpu"
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
        parsed.main_process_port = 0  # any free port, so that two runs on one machine do not collide
    # Despite its name it also works on CPUs (gloo): it sets the environment and runs torch's elastic launcher.
    return _status_of(multi_gpu_launcher, parsed)


def _num_devices() -> int:
    import torch

    return torch.accelerator.device_count() if torch.accelerator.is_available() else 0


def _run_alone(parsed: Namespace) -> int:
    """Run a single child (or mpirun). SIGTERM and SIGHUP are forwarded; Ctrl-C reaches the child through the terminal."""
    from accelerate.utils.launch import prepare_simple_launcher_cmd_env

    command, environment = prepare_simple_launcher_cmd_env(parsed)
    child = subprocess.Popen(command, env=environment)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda received, _: child.send_signal(received))
    signal.signal(signal.SIGINT, lambda *_: None)
    status = child.wait()
    return 128 - status if status < 0 else status


def _status_of(launcher: Callable[[Namespace], object], parsed: Namespace) -> int:
    """Run one of accelerate's elastic launchers. Its log of a failure is suppressed, because the failed process printed its reason."""
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
    """The arguments after ``accelerate launch`` on the command line that started this process."""
    launcher = environment.launcher_command()
    return launcher[1] if launcher is not None and launcher[0][0] == "accelerate" else None


if __name__ == "__main__":
    main()
