"""The GPUs of this machine: their properties, process settings for them, and peak memory by phase."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    import torch
    from torch import nn

DEVICE_FILES = Path("/dev")  # has nvidia0 if there is a GPU
_largest = 0  # bytes; maximum over all phases, because each phase resets the counter
PIECE = 64 << 20  # bytes that ``raise_torch_peak`` takes at a time
_open: list[Peak] = []  # the measurements in progress


class Gpu(TypedDict):
    """One GPU, as summaries record it."""

    name: str
    memory_bytes: int
    driver: str | None  # None if nvidia-smi is missing


class MachineGpu(Gpu):
    """A GPU of this machine, with its UUID."""

    uuid: str


def visible_gpus() -> list[Gpu]:
    """Name, memory in bytes and driver version of every GPU that this process may use, in the order of their indices in torch.

    They are the GPUs of this machine that CUDA_VISIBLE_DEVICES selects; empty if there is none. Uses nvidia-smi, so that torch is not
    imported. Uses torch for a part of a GPU (MIG), and for different GPUs, of which CUDA numbers the fastest first. Where nvidia-smi is
    missing, uses torch if it is already imported or the machine has a GPU.
    """
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None and "MIG-" in chosen:
        return _gpus_of_torch(importlib.import_module("torch"))
    try:
        gpus = _gpus_of_machine()
    except (OSError, subprocess.SubprocessError, ValueError):
        has_driver = any(DEVICE_FILES.glob("nvidia[0-9]*"))  # a container can have the GPU, but not nvidia-smi
        return _gpus_of_torch(importlib.import_module("torch") if has_driver else sys.modules.get("torch"))
    if _is_order_unknown(gpus) and (known := _gpus_of_torch(importlib.import_module("torch"))):
        return [{**gpu, "driver": gpus[0]["driver"]} for gpu in known]
    shown = gpus if chosen is None else [gpus[index] for index in _selected(chosen, [gpu["uuid"] for gpu in gpus])]
    return [{"name": gpu["name"], "memory_bytes": gpu["memory_bytes"], "driver": gpu["driver"]} for gpu in shown]


def gpus_of_machine() -> list[MachineGpu]:
    """All GPUs of this machine, also those that CUDA_VISIBLE_DEVICES hides from this process; empty without nvidia-smi."""
    try:
        return _gpus_of_machine()
    except (OSError, subprocess.SubprocessError, ValueError):
        return []


def _gpus_of_machine() -> list[MachineGpu]:
    """The answer of nvidia-smi, in the order of its indices. Raises OSError, SubprocessError or ValueError if there is none."""
    command = ["nvidia-smi", "--query-gpu=uuid,name,memory.total,driver_version", "--format=csv,noheader,nounits"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.splitlines()
    gpus: list[MachineGpu] = []
    for line in filter(str.strip, lines):
        uuid, rest = line.split(",", 1)
        name, size, driver = rest.rsplit(",", 2)
        gpus.append({"uuid": uuid.strip(), "name": name.strip(), "memory_bytes": int(size) << 20, "driver": driver.strip()})
    return gpus


def _is_order_unknown(gpus: Sequence[MachineGpu]) -> bool:
    """Whether CUDA's order may differ from that of nvidia-smi, the order of the slots: of different GPUs, CUDA puts the fastest first."""
    kinds = {(gpu["name"], gpu["memory_bytes"]) for gpu in gpus}
    return len(kinds) > 1 and os.environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID"


def _selected(chosen: str, uuids: Sequence[str]) -> list[int]:
    """The indices that CUDA_VISIBLE_DEVICES selects: indices, or beginnings of UUIDs. As in CUDA, an invalid entry ends the list."""
    selected: list[int] = []
    for entry in chosen.split(","):
        entry = entry.strip()
        if entry.isdigit():
            matching = [int(entry)] if int(entry) < len(uuids) else []
        else:
            matching = [index for index, uuid in enumerate(uuids) if entry and uuid.startswith(entry)]
        if len(matching) != 1 or matching[0] in selected:
            break
        selected += matching
    return selected


def _gpus_of_torch(torch: ModuleType | None) -> list[Gpu]:
    if torch is None or not torch.cuda.is_available():
        return []
    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [{"name": gpu.name, "memory_bytes": gpu.total_memory, "driver": None} for gpu in properties]


def gpu_name(gpu: Gpu | str) -> str:
    """The name of an entry of ``environment.gpus``. Summaries of older runs contain only names."""
    return str(gpu["name"]) if isinstance(gpu, dict) else str(gpu)


def set_up_gpu() -> str:
    """Configure this process for training and decoding on its GPU. Returns a description for the log.

    Disables cuDNN's attention, which plans for every new shape, while rollouts always have new shapes. On an H200 it made PPO up to three
    times slower, and replays of CUDA graphs differed from normal execution.
    """
    import torch

    torch.backends.cuda.enable_cudnn_sdp(False)
    kernels = {"flash": torch.backends.cuda.flash_sdp_enabled(), "memory-efficient": torch.backends.cuda.mem_efficient_sdp_enabled()}
    on = " and ".join([name for name, enabled in kernels.items() if enabled]) or "plain"
    return f"torch {torch.__version__}, CUDA {torch.version.cuda}; sdpa kernels {on}, cuDNN's attention off"


def describe_model(model: nn.Module, dtype: torch.dtype) -> str:
    """Description of a model for the log of a GPU run: weight dtypes, compute dtype, attention and quantized layers."""
    weights = sorted({str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()})
    attention = getattr(getattr(model, "config", None), "_attn_implementation", None) or "its own"
    kinds = [type(module).__name__ for module in model.modules()]
    quantized = [f"{kinds.count(kind)} {kind}" for kind in ("Linear4bit", "Linear8bitLt") if kind in kinds]
    computes = str(dtype).removeprefix("torch.")
    return ", ".join([f"weights {' and '.join(weights)}", f"computes in {computes}", f"attention {attention}", *quantized])


@dataclass(eq=False)
class Peak:
    """A measurement of GPU memory in bytes: the maximum that tensors took at a time, and the value at its beginning."""

    total: int = 0
    before: int = 0

    @property
    def added(self) -> int:
        """The maximum increase since its beginning."""
        return max(0, self.total - self.before)


@contextmanager
def own_peak() -> Iterator[Peak]:
    """Measure the peak of GPU memory within it; such measurements may be nested. Nothing is measured without a GPU."""
    peak = Peak()
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        yield peak
        return
    _take_peak(torch)
    peak.before = torch.cuda.memory_allocated()
    _open.append(peak)
    try:
        yield peak
    finally:
        _take_peak(torch)
        _open.remove(peak)


def _take_peak(torch: ModuleType) -> None:
    """Record the peak so far in every active measurement, and reset the counter."""
    global _largest
    allocated = torch.cuda.max_memory_allocated()
    _largest = max(_largest, allocated)
    for peak in _open:
        peak.total = max(peak.total, allocated)
    torch.cuda.reset_peak_memory_stats()


def raise_torch_peak() -> None:
    """Let ``torch.cuda.max_memory_allocated`` return the peak of the complete run again, for other programs in this process.

    Measurements of parts of a run reset PyTorch's counter, and it has no function that sets it. So this takes as much memory as the run did
    at its peak, without writing to it, and frees it immediately. It comes in small pieces, which fit into the blocks that PyTorch's
    allocator kept. Does nothing without a GPU, or if the counter already has the peak.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or torch.cuda.max_memory_allocated() >= _largest:
        return
    pieces = []
    with suppress(torch.OutOfMemoryError):  # another process has taken the memory
        while (missing := _largest - torch.cuda.memory_allocated()) > 0:
            pieces.append(torch.empty(min(missing, PIECE), dtype=torch.uint8, device="cuda"))


def free_gpu_memory() -> int:
    """Bytes that tensors can still take: the free memory of the GPU, and memory that PyTorch has reserved but does not use."""
    import torch

    free, _ = torch.cuda.mem_get_info()
    return int(free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated())


@contextmanager
def measured_gpu_memory(peaks: dict[str, int], phase: str) -> Iterator[None]:
    """Context that records its peak GPU memory in bytes in ``peaks[phase]`` (maximum over uses). Does nothing without a GPU."""
    peak = Peak()
    try:
        with own_peak() as peak:
            yield
    finally:
        if peak.total:
            peaks[phase] = max(peaks.get(phase, 0), peak.total)


def peak_gpu_memory() -> int | None:
    """Peak GPU memory in bytes of this process's tensors until now; None without a GPU."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return None
    return max(_largest, torch.cuda.max_memory_allocated())
