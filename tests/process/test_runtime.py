"""The description of a process, and names of ``stages.process.runtime`` that scripts outside of this repository import."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stages import step
from stages.process import runtime
from stages.process.hardware import cpu_name
from stages.process.runtime import AutoPrecision
from stages.process.threads import describe_threads
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
    cpu = {"device": cpu_name(), "processes": 1, "threads": describe_threads()}
    assert process.describe_compute("fp32") == {**cpu, "precision": "fp32"}
    assert process.describe_compute("bf16")["precision"] == "bf16"
    process.begin_step(0, AutoPrecision("bf16", "measured"))
    assert process.describe_compute("auto") == {**cpu, "precision": "bf16", "precision_reason": "precision: auto; measured"}
    assert process.dtype("auto") == torch.bfloat16 and process.dtype("fp32") == torch.float32


def test_cpu_is_described_in_one_line_per_run_and_again_if_the_dtype_changes(monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    process = runtime.Runtime()
    process.dtype("auto")  # `stages generate`: its output is the completions alone
    assert capsys.readouterr().out == ""
    for auto in ("fp32", "fp32", "bf16"):
        process.begin_step(0, AutoPrecision(auto, "measured"))
        process.dtype("auto")
        process.dtype("auto")
    assert capsys.readouterr().out.splitlines() == [
        f"CPU: {cpu_name()}; {describe_threads()}; computes in fp32 (precision: auto; measured)",
        "CPU: computes in bf16 (precision: auto; measured)",
    ]


def test_process_without_a_share_does_no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    class Third(runtime.Runtime):
        process_index, num_processes = 2, 3

        def gather(self, value: Any) -> list[Any]:
            return [[(0, "a")], [(1, "b")], value]

    assert Third(quiet=True).distribute(2, lambda own: [max(own)]) == ["a", "b"]
