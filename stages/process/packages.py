"""Packages and modules of Python without importing them: which optional packages are installed, and the source files of modules."""

from __future__ import annotations

import importlib.util
from pathlib import Path

FLASH_ATTENTION = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface", "flash_attention_4": "flash_attn.cute"}
"""The package of each flash attention. If it is missing, transformers uses the Hub's kernels (package ``kernels``)."""
EXPECTED_MODULE = "expected a module in the current folder, on PYTHONPATH, or installed"


def missing_attention_package(attention: str) -> str:
    """The reason why a model input's ``attention`` cannot be used in this environment; empty if nothing is missing."""
    if "/" in attention:
        return "" if is_installed("kernels") else "Hub kernels need the package kernels, which is not installed"
    module = FLASH_ATTENTION.get(attention)
    if module is None or is_installed(module) or is_installed("kernels"):
        return ""
    return f"neither {module.partition('.')[0]} nor kernels is installed"


def missing_quantization_package(quantization: str, optimizer: str) -> str:
    """The reason why a step with this quantization and optimizer cannot run in this environment; empty if nothing is missing."""
    needed_by = f"quantization: {quantization}" if quantization != "none" else f"optimizer: {optimizer}"
    if (quantization == "none" and optimizer == "adamw") or is_installed("bitsandbytes"):
        return ""
    return f"{needed_by} needs the package bitsandbytes, which is not installed; pip install 'tristage[quantize]'"


def is_installed(module: str) -> bool:
    """Whether the module can be imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def source_of(module: str) -> Path | None:
    """The source file of a module; None if it has none."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None
    is_file = spec is not None and spec.origin is not None and spec.origin.endswith(".py") and Path(spec.origin).is_file()
    return Path(str(spec.origin)) if is_file and spec is not None else None
