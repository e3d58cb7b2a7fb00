"""The hardware of this machine besides its GPUs: memory, the CPU and its matrix tiles. Does not import torch."""

from __future__ import annotations

import os
import platform
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
