"""The cores that a process may use: affinity, hyperthreads, and the quota of a container in both versions of control groups."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from stages.process.hardware import Cores, cpu_quota, usable_cores


def machine(folder: Path, cores: int, *, threads_per_core: int = 1) -> Path:
    """A machine as the system describes it: hyperthreads of core n are the CPUs n, n + cores, ..."""
    for cpu in range(cores * threads_per_core):
        topology = folder / "cpus" / f"cpu{cpu}" / "topology"
        topology.mkdir(parents=True)
        (topology / "physical_package_id").write_text("0\n")
        (topology / "core_id").write_text(f"{cpu % cores}\n")
    return folder / "cpus"


def group(folder: Path, path: str, **files: str) -> Path:
    """A control group with its files; returns the root of all groups."""
    own = folder / "cgroup" / path
    own.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (own / name.replace("__", ".")).write_text(text + "\n")
    return folder / "cgroup"


def member(folder: Path, line: str) -> Path:
    (folder / "membership").write_text(f"12:cpuset:/\n{line}\n")
    return folder / "membership"


@pytest.mark.parametrize(
    ("allowed", "threads_per_core", "expected"),
    [
        ({0, 1, 2, 3}, 1, Cores(4, 4, "")),
        (set(range(8)), 2, Cores(4, 4, "")),  # hyperthreads
        ({0, 4}, 2, Cores(1, 4, "affinity")),  # both threads of one core
        ({1, 2}, 1, Cores(2, 4, "affinity")),
    ],
)
def test_cores_are_counted_within_affinity(monkeypatch, tmp_path, allowed, threads_per_core, expected) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 4 * threads_per_core)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: allowed)
    cpus = machine(tmp_path, 4, threads_per_core=threads_per_core)
    assert usable_cores(cpus=cpus, cgroups=tmp_path / "none", membership=tmp_path / "none") == expected


def test_container_with_two_of_64_cores(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    cgroups, membership = group(tmp_path, "", cpu__max="250000 100000"), member(tmp_path, "0::/")
    cores = usable_cores(cpus=machine(tmp_path, 64), cgroups=cgroups, membership=membership)
    assert cores == Cores(2, 64, "a quota of 2.5 CPUs")
    assert str(cores) == "2 of 64 physical cores (a quota of 2.5 CPUs)"


def test_quota_is_the_least_of_the_groups_above(tmp_path) -> None:
    group(tmp_path, "pods", cpu__max="300000 100000")
    cgroups = group(tmp_path, "pods/mine", cpu__max="max 100000")
    assert cpu_quota(cgroups, member(tmp_path, "0::/pods/mine")) == 3
    assert cpu_quota(cgroups, member(tmp_path, "0::/elsewhere")) == float("inf")


@pytest.mark.parametrize(("quota", "expected"), [("50000", 0.5), ("-1", float("inf"))])
def test_quota_by_version_1(tmp_path, quota: str, expected: float) -> None:
    # A container sees its group as the root, under the path that it has on the host.
    cgroups = group(tmp_path, "cpu,cpuacct", cpu__cfs_quota_us=quota, cpu__cfs_period_us="100000")
    assert cpu_quota(cgroups, member(tmp_path, "4:cpu,cpuacct:/docker/1234")) == expected


def test_less_than_one_core_is_one(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    cgroups = group(tmp_path, "", cpu__max="50000 100000")
    assert usable_cores(cpus=machine(tmp_path, 1), cgroups=cgroups, membership=member(tmp_path, "0::/")).usable == 1
