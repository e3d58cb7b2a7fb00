"""GPUs of a machine, the settings of the process for them, and their memory by phase; nvidia-smi and torch.cuda are stand-ins."""

from __future__ import annotations

import stat
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from stages.chain.run import environment
from stages.commands.recipes import _machine
from stages.process import gpus
from stages.process.runtime import Runtime

GIB = 2**30


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An nvidia-smi that lists three GPUs and records its arguments."""
    program = tmp_path / "nvidia-smi"
    program.write_text(
        f"#!/bin/sh\necho \"$@\" >> {tmp_path}/asked\necho 'GPU-8932f937-a1, NVIDIA H200, 143771, 580.95.05'\n"
        "echo 'GPU-77, NVIDIA L4, 23034, 580.95.05'\necho 'GPU-8932aaaa-a2, NVIDIA A10, 23028, 580.95.05'\n"
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    return tmp_path / "asked"


class Cuda:
    """torch.cuda with a memory that a test sets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.peak = 0
        monkeypatch.setattr(gpus, "_largest", 0)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *_: self.peak)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda *_: setattr(self, "peak", 0))


def test_the_environment_of_a_run_names_its_gpus_before_torch_is_loaded(smi: Path, monkeypatch) -> None:
    monkeypatch.setitem(gpus.sys.modules, "torch", None)
    assert environment()["gpus"] == [
        {"name": "NVIDIA H200", "memory_bytes": 143771 * 2**20, "driver": "580.95.05"},
        {"name": "NVIDIA L4", "memory_bytes": 23034 * 2**20, "driver": "580.95.05"},
        {"name": "NVIDIA A10", "memory_bytes": 23028 * 2**20, "driver": "580.95.05"},
    ]
    assert gpus.gpu_name(environment()["gpus"][0]) == gpus.gpu_name("NVIDIA H200") == "NVIDIA H200"


@pytest.mark.parametrize(
    ("chosen", "names"),
    [
        ("", []),
        ("-1", []),
        ("1, 0", ["NVIDIA L4", "NVIDIA H200"]),
        ("2", ["NVIDIA A10"]),
        ("0,-1,1", ["NVIDIA H200"]),  # CUDA ignores everything from an invalid entry on
        ("0,7,1", ["NVIDIA H200"]),
        ("GPU-77,GPU-8932f", ["NVIDIA L4", "NVIDIA H200"]),
        ("GPU-8932", []),  # two GPUs have this prefix
    ],
)
def test_visible_gpus_are_those_of_cuda_visible_devices(smi: Path, monkeypatch, chosen: str, names: list[str]) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    assert [gpu["name"] for gpu in gpus.visible_gpus()] == names
    assert len(gpus.gpus_of_machine()) == 3


def test_of_different_gpus_cuda_puts_the_fastest_first(smi: Path, monkeypatch) -> None:
    """nvidia-smi lists an H200, an L4 and an A10; here CUDA's order is that of two other slots."""
    monkeypatch.delenv("CUDA_DEVICE_ORDER")
    assert [gpu["name"] for gpu in gpus.visible_gpus()] == ["NVIDIA H200", "NVIDIA L4", "NVIDIA A10"]  # torch sees no GPU
    ordered = [SimpleNamespace(name="NVIDIA A10", total_memory=23 * GIB), SimpleNamespace(name="NVIDIA L4", total_memory=22 * GIB)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", ordered.__getitem__)
    assert gpus.visible_gpus()[0] == {"name": "NVIDIA A10", "memory_bytes": 23 * GIB, "driver": "580.95.05"}
    assert _machine(None).name == "NVIDIA A10"


def test_mig_slice_is_described_by_torch(smi: Path, monkeypatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-0f")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(name="H200 MIG 1g.18gb", total_memory=18 * GIB))
    assert gpus.visible_gpus() == [{"name": "H200 MIG 1g.18gb", "memory_bytes": 18 * GIB, "driver": None}]


@pytest.mark.parametrize(
    ("variables", "planned"),
    [
        ({}, ("cuda", "NVIDIA H200")),
        ({"CUDA_VISIBLE_DEVICES": "1"}, ("cuda", "NVIDIA L4")),
        ({"WORLD_SIZE": "2"}, ("cuda", "NVIDIA L4")),  # the smallest GPU of two processes
        ({"CUDA_VISIBLE_DEVICES": ""}, ("cpu", "this machine's memory")),
        ({"ACCELERATE_USE_CPU": "true"}, ("cpu", "this machine's memory")),
    ],
)
def test_a_plan_is_for_the_gpus_that_the_processes_use(smi: Path, monkeypatch, variables, planned) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    machine = _machine(None)
    assert (machine.kind, machine.name) == planned


def test_without_nvidia_smi_torch_describes_the_gpus(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpus.visible_gpus() == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(name="NVIDIA A10", total_memory=24 * GIB))
    assert gpus.visible_gpus() == [{"name": "NVIDIA A10", "memory_bytes": 24 * GIB, "driver": None}]


def test_without_nvidia_smi_torch_is_imported_only_on_a_machine_with_a_gpu(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(name="NVIDIA A10", total_memory=24 * GIB))
    monkeypatch.setattr(gpus, "DEVICE_FILES", tmp_path)
    monkeypatch.setattr(gpus.importlib, "import_module", lambda name: {"torch": torch}[name])
    with monkeypatch.context() as patch:
        patch.delitem(sys.modules, "torch")
        assert gpus.visible_gpus() == []
        (tmp_path / "nvidia0").touch()
        assert [gpu["name"] for gpu in gpus.visible_gpus()] == ["NVIDIA A10"]


def test_gpu_run_disables_cudnn_attention_and_logs_its_device(smi: Path, monkeypatch, capsys) -> None:
    import accelerate

    turned: list[bool] = []
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", turned.append)
    state = SimpleNamespace(num_processes=1, process_index=0, device=torch.device("cuda", 0))
    monkeypatch.setattr(accelerate, "PartialState", lambda **_: state)
    runtime = Runtime()
    assert runtime.device.type == "cuda" and runtime.device.type == "cuda"
    model = torch.nn.Linear(2, 2).to(torch.bfloat16)
    model.config = SimpleNamespace(_attn_implementation="sdpa")  # type: ignore[assignment]
    runtime.say_model("ppo: policy", model, torch.bfloat16)
    said = capsys.readouterr().out
    assert turned == [False]  # once
    assert "GPU: NVIDIA H200, NVIDIA L4, NVIDIA A10; torch " in said and "cuDNN's attention off" in said
    assert "ppo: policy: weights bfloat16, computes in bfloat16, attention sdpa" in said


def test_cpu_run_changes_no_setting_and_logs_nothing(monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", lambda _: pytest.fail("no GPU"))
    runtime = Runtime()
    if runtime.device.type != "cpu":
        pytest.skip("there is a GPU")
    runtime.say_model("ppo: policy", torch.nn.Linear(2, 2), torch.float32)
    assert capsys.readouterr().out == ""


def test_each_phase_has_its_own_memory_peak_and_the_run_the_largest(monkeypatch) -> None:
    cuda, peaks = Cuda(monkeypatch), dict[str, int]()
    cuda.peak = 3 * GIB  # while the models were loaded
    for phase, used in (("generation", 5), ("update", 2), ("generation", 4)):
        with gpus.measured_gpu_memory(peaks, phase):
            assert cuda.peak == 0
            cuda.peak = used * GIB
    assert peaks == {"generation": 5 * GIB, "update": 2 * GIB}
    assert gpus.peak_gpu_memory() == 5 * GIB


@pytest.mark.parametrize("fits", [True, False])
def test_after_a_run_the_counter_of_torch_has_the_peak_of_the_run(fits: bool, monkeypatch) -> None:
    monkeypatch.setattr(gpus, "_largest", 0)
    cuda, taken = Cuda(monkeypatch), list[int]()
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda *_: GIB + sum(taken))

    def empty(size: int, **_: Any) -> object:
        if not fits:
            raise torch.OutOfMemoryError("another process has it")
        taken.append(size)
        cuda.peak = max(cuda.peak, GIB + sum(taken))
        return object()

    with gpus.measured_gpu_memory({}, "update"):
        cuda.peak = 5 * GIB
    cuda.peak = GIB
    monkeypatch.setattr(torch, "empty", empty)
    gpus.raise_torch_peak()
    assert torch.cuda.max_memory_allocated() == (5 * GIB if fits else GIB) and gpus.peak_gpu_memory() == 5 * GIB
    assert max(taken, default=0) <= gpus.PIECE
    gpus.raise_torch_peak()  # nothing is missing any more
    assert sum(taken) == (4 * GIB if fits else 0)


def test_without_a_gpu_there_is_no_gpu_memory(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    peaks: dict[str, Any] = {}
    with gpus.measured_gpu_memory(peaks, "update"):
        pass
    assert peaks == {} and gpus.peak_gpu_memory() is None
