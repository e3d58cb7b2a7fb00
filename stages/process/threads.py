"""Decides the number of threads of a process on a CPU, and how they wait for each other. Does not import torch.

OpenMP reads both from environment variables when torch is imported, so ``set_up_threads`` must run before. User settings have priority.

The number of threads depends on the cores and not on the load, because sums in fp32 depend on it: equal runs must give equal bits. How
threads wait changes no result, so it depends on the load when the process starts.
"""

from __future__ import annotations

import os
import sys
from collections.abc import MutableMapping
from functools import cache
from math import inf
from pathlib import Path

from stages.process.environment import launched_processes
from stages.process.hardware import usable_cores

SPIN_COUNT = 3_000
"""Turns of the loop in which a thread waits for the others before it sleeps. A turn takes 25 ns (EPYC, Zen 5) to 50 ns (Xeon), so a thread
sleeps after 0.08 to 0.15 ms. libgomp's default of 300,000 turns is longer than the time slice of a core: if another process is busy, each
parallel operation waits for threads that have no core. On a machine with eight busy processes on two cores, 3,000 turns were 18 times as
fast as the default, 20,000 turns 4.5 times, and sleeping immediately 29 times (tests/benchmarks/cpu_threads.py)."""
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
CHOSEN = "STAGES_CHOSEN"
"""Environment variable with the names of the variables that Tristage set, for this process and those that it starts."""


def set_up_threads(environment: MutableMapping[str, str] | None = None, *, processes: int | None = None) -> None:
    """Set OpenMP's number of threads and how they wait, unless the user has set them. Call it before torch is imported.

    ``processes``: number of processes on this machine, which share its cores (default: as the launcher says). In a process that has
    already imported torch, the number of threads is lowered to that of the usable cores; how threads wait can no longer be changed.
    """
    given = os.environ if environment is None else environment
    threads = max(1, usable_cores().usable // (processes or _local_processes(given)))
    if environment is None and "torch" in sys.modules:
        if "OMP_NUM_THREADS" not in given:
            _lower(threads)
        return
    chosen = given.get(CHOSEN, "").split()
    if "OMP_NUM_THREADS" not in given:
        given["OMP_NUM_THREADS"] = str(threads)
        chosen.append("OMP_NUM_THREADS")
    if not any(name in given for name in WAITING):
        name, value = ("OMP_WAIT_POLICY", "PASSIVE") if idle_cpus() < threads * (processes or 1) else ("GOMP_SPINCOUNT", str(SPIN_COUNT))
        given[name] = value
        chosen.append(name)
    given[CHOSEN] = " ".join(chosen)


def idle_cpus(running: Path = Path("/proc/loadavg")) -> float:
    """Number of CPUs of the machine that no other thread uses at this moment; infinity if the system does not say it."""
    try:
        runnable, _, _ = running.read_text().split()[3].partition("/")
        return (os.cpu_count() or 1) - (int(runnable) - 1)  # one of them is this thread
    except (OSError, ValueError, IndexError):
        return inf


def _local_processes(environment: MutableMapping[str, str]) -> int:
    """Number of launched processes on this machine."""
    local = environment.get("LOCAL_WORLD_SIZE", "")
    return int(local) if local.isdigit() and int(local) else launched_processes()


def _lower(threads: int) -> None:
    torch = sys.modules["torch"]
    if torch.get_num_threads() > threads:
        torch.set_num_threads(threads)


def describe_threads() -> str:
    """One line for the log: threads, cores, and how threads wait. Call it after torch was imported."""
    threads = sys.modules["torch"].get_num_threads()
    counted = f"{threads} thread{'s' if threads != 1 else ''}{_origin('OMP_NUM_THREADS')} on {usable_cores()}"
    return counted if threads == 1 else f"{counted}; {_waiting()}"


def _waiting() -> str:
    library = openmp_library()
    if library != "libgomp":
        return f"threads wait as {library} decides"
    if not _environment_counts():
        return "threads wait as libgomp decides, because torch was imported before Tristage"
    for name in WAITING:
        if name in os.environ and name not in os.environ.get(CHOSEN, "").split():
            return f"threads wait by {name}={os.environ[name]} of the environment"
    if "OMP_WAIT_POLICY" in os.environ:
        return "waiting threads sleep immediately, because other programs used the cores at the start (OMP_WAIT_POLICY)"
    turns = os.environ.get("GOMP_SPINCOUNT", "")
    return f"waiting threads spin {int(turns):,} turns, then sleep (GOMP_SPINCOUNT)"


def _environment_counts() -> bool:
    """Whether the variables were there when torch was imported."""
    return any(name in os.environ for name in WAITING)


def _origin(name: str) -> str:
    is_own = name not in os.environ or name in os.environ.get(CHOSEN, "").split()
    return "" if is_own else f" ({name}={os.environ[name]} of the environment)"


@cache
def openmp_library() -> str:
    """The OpenMP library in this process: libgomp, libiomp5 or libomp; "its OpenMP library" if the system does not list it."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return "its OpenMP library"
    return next((name for name in ("libiomp5", "libgomp", "libomp") if f"/{name}" in maps), "its OpenMP library")
