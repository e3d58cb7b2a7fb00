"""What this machine has: memory, the first GPU, the CPU and its matrix tiles. Imports no torch."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path


def cpu_memory() -> int:
    """Bytes of memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def gpu_memory() -> tuple[str, int] | None:
    """Name and bytes of the first GPU, asked of nvidia-smi and so without torch; None where there is none."""
    try:
        asked = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
        first = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=10).stdout.splitlines()[0]
        name, size = first.rsplit(",", 1)
        return name.strip(), int(size) << 20
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def cpu_name() -> str:
    """The model of the CPU as the system names it; its architecture where the system has no name for it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next((name for name in named if name), platform.processor() or platform.machine())


def has_amx() -> bool:
    """Whether the CPU has matrix tiles for bf16; known without torch."""
    try:
        return "amx_bf16" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
