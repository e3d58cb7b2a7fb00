"""The description of a process, and names of ``stages.process.runtime`` that scripts outside of this repository import."""

from __future__ import annotations

import pytest

from stages import step
from stages.process import runtime
from stages.process.hardware import cpu_name
from stages.registry import references


def test_moved_names_can_be_imported_from_the_old_module() -> None:
    assert runtime.ResolvedModel is references.ResolvedModel
    assert (runtime.StepContext, runtime.StepResult) == (step.StepContext, step.StepResult)
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        _ = runtime.Nothing


def test_compute_is_described_only_after_a_device_was_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    process = runtime.Runtime(quiet=True)
    assert process.describe_compute("fp32") == {}
    assert process.device.type == "cpu"
    assert process.describe_compute("fp32") == {"device": cpu_name(), "processes": 1, "precision": "fp32"}
    assert process.describe_compute("bf16")["precision"] == "bf16"
    assert process.describe_compute("auto")["precision"] in ("fp32", "bf16") and cpu_name()
