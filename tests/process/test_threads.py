"""The number of threads and how they wait: chosen before torch is imported, and never instead of the user."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from stages.process import threads
from stages.process.hardware import Cores
from stages.process.threads import SPIN_COUNT, describe_threads, idle_cpus, set_up_threads


@pytest.fixture(autouse=True)
def four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "usable_cores", lambda: Cores(4, 8, "affinity"))
    monkeypatch.setattr(threads, "idle_cpus", lambda: 99)


@pytest.mark.parametrize(
    ("given", "processes", "expected"),
    [
        ({}, None, {"OMP_NUM_THREADS": "4", "GOMP_SPINCOUNT": str(SPIN_COUNT)}),
        ({}, 2, {"OMP_NUM_THREADS": "2", "GOMP_SPINCOUNT": str(SPIN_COUNT)}),
        ({}, 9, {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": str(SPIN_COUNT)}),
        ({"LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "8"}, None, {"OMP_NUM_THREADS": "2", "GOMP_SPINCOUNT": str(SPIN_COUNT)}),
        ({"OMP_NUM_THREADS": "3"}, None, {"OMP_NUM_THREADS": "3", "GOMP_SPINCOUNT": str(SPIN_COUNT)}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, None, {"OMP_NUM_THREADS": "4", "OMP_WAIT_POLICY": "ACTIVE"}),
        ({"GOMP_SPINCOUNT": "7"}, None, {"OMP_NUM_THREADS": "4", "GOMP_SPINCOUNT": "7"}),
    ],
)
def test_threads_share_the_cores_and_settings_of_the_user_count(given, processes, expected) -> None:
    environment = dict(given)
    set_up_threads(environment, processes=processes)
    assert {name: value for name, value in environment.items() if name.startswith(("OMP", "GOMP"))} == expected
    assert set(environment["STAGES_CHOSEN"].split()) == expected.keys() - given.keys()
    again = dict(environment)
    set_up_threads(again)  # a process that this one starts
    assert again == environment


@pytest.mark.parametrize(
    ("load", "expected"),
    [
        ("0.10 0.20 0.30 1/400 4711\n", 8),  # only this thread
        ("9.00 0.20 0.30 6/400 4711\n", 3),  # the mean of the last minute does not count
        ("0.10 0.20 0.30 12/400 4711\n", -3),
        ("unreadable", float("inf")),
    ],
)
def test_idle_cpus_are_those_without_another_runnable_thread(monkeypatch, tmp_path, load: str, expected: float) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    (tmp_path / "loadavg").write_text(load)
    assert idle_cpus(tmp_path / "loadavg") == expected


@pytest.mark.parametrize(("idle", "passive"), [(4, False), (3, True)])
def test_threads_sleep_at_once_if_other_programs_use_the_cores(monkeypatch: pytest.MonkeyPatch, idle: int, passive: bool) -> None:
    monkeypatch.setattr(threads, "idle_cpus", lambda: idle)
    environment: dict[str, str] = {}
    set_up_threads(environment)
    assert (environment.get("OMP_WAIT_POLICY") == "PASSIVE") is passive and ("GOMP_SPINCOUNT" in environment) is not passive
    assert environment["OMP_NUM_THREADS"] == "4"  # sums in fp32 depend on the number of threads, so it does not depend on the load


def test_every_command_sets_threads_up_before_torch_is_imported() -> None:
    script = (
        "import os, sys\nfrom stages.cli import app\n"
        "try: app(['models', 'list'])\nexcept SystemExit: pass\n"
        "print('torch' in sys.modules, os.environ['OMP_NUM_THREADS'], os.environ['STAGES_CHOSEN'])"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "STAGES_CHOSEN"))}
    done = subprocess.run([sys.executable, "-c", script], env={**environment, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] in ("False 1 GOMP_SPINCOUNT", "False 1 OMP_WAIT_POLICY"), done.stderr


def test_torch_that_is_imported_already_gets_no_more_threads_than_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    try:
        torch.set_num_threads(6)
        set_up_threads()
        assert torch.get_num_threads() == 4
        torch.set_num_threads(2)
        set_up_threads()
        assert torch.get_num_threads() == 2
        assert "OMP_NUM_THREADS" not in os.environ
    finally:
        torch.set_num_threads(before)


def test_description_names_the_origin_of_each_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(threads, "openmp_library", lambda: "libgomp")
    for name in ("OMP_NUM_THREADS", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "STAGES_CHOSEN"):
        monkeypatch.delenv(name, raising=False)
    cores = "4 threads on 4 of 8 physical cores (affinity)"
    assert describe_threads() == f"{cores}; threads wait as libgomp decides, because torch was imported before Tristage"
    monkeypatch.setenv("STAGES_CHOSEN", "OMP_NUM_THREADS GOMP_SPINCOUNT")
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    monkeypatch.setenv("GOMP_SPINCOUNT", "20000")
    assert describe_threads() == f"{cores}; waiting threads spin 20,000 turns, then sleep (GOMP_SPINCOUNT)"
    monkeypatch.setenv("STAGES_CHOSEN", "OMP_NUM_THREADS OMP_WAIT_POLICY")
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    monkeypatch.delenv("GOMP_SPINCOUNT")
    assert describe_threads().startswith(f"{cores}; waiting threads sleep immediately, because other programs used the cores at the start")
    monkeypatch.delenv("OMP_WAIT_POLICY")
    monkeypatch.setenv("GOMP_SPINCOUNT", "20000")
    monkeypatch.setenv("STAGES_CHOSEN", "")
    assert describe_threads() == (
        "4 threads (OMP_NUM_THREADS=4 of the environment) on 4 of 8 physical cores (affinity); "
        "threads wait by GOMP_SPINCOUNT=20000 of the environment"
    )
    monkeypatch.setattr(threads, "openmp_library", lambda: "libiomp5")
    assert describe_threads().endswith("; threads wait as libiomp5 decides")
