"""The dtype of ``precision: auto`` in a step."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AutoPrecision:
    """The dtype of ``precision: auto``, fp32 or bf16, and the reason for the log and the summary."""

    precision: str
    reason: str
