"""The hardware of this machine besides its GPUs: its memory, the CPU, and the cores that this process may use. Does not import torch."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from math import inf
from pathlib import Path


def cpu_memory() -> int:
    """This machine's memory in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def cpu_name() -> str:
    """The CPU's model name from the system; its architecture if there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next((name for name in named if name), platform.processor() or platform.machine())


def has_amx() -> bool:
    """Whether the CPU has matrix tiles (AMX) for bf16."""
    try:
        return "amx_bf16" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False


CPUS = Path("/sys/devices/system/cpu")
CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


@dataclass(frozen=True)
class Cores:
    """Physical cores: those that this process may use, those of the machine, and what limits the first ("" if nothing does)."""

    usable: int
    machine: int
    limit: str

    def __str__(self) -> str:
        of = f"{self.usable} of {self.machine} physical cores ({self.limit})" if self.limit else f"{self.usable} physical cores"
        return of if self.machine > 1 else of.replace("cores", "core")


def usable_cores(*, cpus: Path = CPUS, cgroups: Path = CGROUPS, membership: Path = MEMBERSHIP) -> Cores:
    """Count the cores. The two hyperthreads of a core count once, because they share its arithmetic units.

    The quota of a control group (``docker run --cpus``, Kubernetes' limits) is rounded down. At least one core is usable.
    """
    count = os.cpu_count() or 1
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(count))
    machine, usable = _physical(range(max(count, *allowed) + 1), cpus) or count, _physical(allowed, cpus) or len(allowed)
    limit = "affinity" if usable < machine else ""
    quota = cpu_quota(cgroups, membership)
    if quota < usable:
        usable, limit = max(1, int(quota)), f"a quota of {quota:g} CPUs"
    return Cores(usable, max(machine, usable), limit)


def _physical(numbers: Iterable[int], cpus: Path) -> int:
    """Number of different cores among the CPUs ``numbers``; 0 if the system does not describe them."""
    seen = set()
    for number in numbers:
        topology = cpus / f"cpu{number}" / "topology"
        try:
            seen.add(tuple((topology / name).read_text().strip() for name in ("physical_package_id", "core_id")))
        except OSError:  # offline, or no such CPU
            continue
    return len(seen)


def cpu_quota(cgroups: Path = CGROUPS, membership: Path = MEMBERSHIP) -> float:
    """Number of CPUs that the control groups of this process allow (minimum over its group and those above); infinity without a limit."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return inf
    quotas = [inf]
    for line in lines:
        number, controllers, path = line.split(":", 2)
        roots = [cgroups, cgroups / "unified"] if number == "0" else [cgroups / controllers, cgroups / "cpu"]
        if number == "0" or "cpu" in controllers.split(","):
            # A container sees its group as the root. The path on the host may differ.
            parts = Path(path).relative_to("/").parts
            quotas += [_quota_of(root.joinpath(*parts[:depth])) for root in roots for depth in range(len(parts) + 1)]
    return min(quotas)


def _quota_of(group: Path) -> float:
    """The quota of one group, by version 2 of control groups or by version 1."""
    try:
        if (group / "cpu.max").exists():
            most, period = (group / "cpu.max").read_text().split()
        else:
            most, period = ((group / name).read_text().strip() for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us"))
        return inf if most in ("max", "-1") else int(most) / int(period)
    except (OSError, ValueError):
        return inf
