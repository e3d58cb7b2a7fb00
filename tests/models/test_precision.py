"""What precision: auto means on a CPU: fp32 without matrix tiles, else by a measurement that is kept; a resumed step keeps its dtype."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from stages.models import precision
from stages.models.precision import UNKNOWN_WIDTH, auto_precision, pass_seconds, width_of


def no_width() -> int:
    raise AssertionError("the width is not needed")


@pytest.fixture
def measure(monkeypatch: pytest.MonkeyPatch):
    """measure(fp32, bf16): let this CPU have matrix tiles, and passes take so many seconds. Returns the list of measured widths."""

    def pretend(fp32: float, bf16: float) -> list[int]:
        widths: list[int] = []
        monkeypatch.setattr(precision, "has_tiles", lambda: True)
        monkeypatch.setattr(precision, "pass_seconds", lambda width: widths.append(width) or {"fp32": fp32, "bf16": bf16})
        return widths

    return pretend


def test_cpu_without_tiles_computes_in_fp32_and_measures_nothing(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(precision, "has_tiles", lambda: False)
    decided = auto_precision(no_width, tmp_path)
    assert (decided.precision, decided.reason) == ("fp32", "this CPU has no matrix tiles for bf16")


@pytest.mark.parametrize(("bf16", "expected"), [(0.5, "bf16"), (0.79, "bf16"), (0.85, "fp32"), (1.3, "fp32")])
def test_bf16_is_chosen_if_it_is_clearly_faster(measure, tmp_path: Path, bf16: float, expected: str) -> None:
    widths = measure(1.0, bf16)
    decided = auto_precision(lambda: 4096, tmp_path)
    assert decided.precision == expected and widths == [1024]  # wider models gain more
    assert f"1/{1 / bf16:.2f} of the time of fp32 at width 1024 (measured)" in decided.reason


def test_equal_runs_decide_the_same_although_timings_differ(measure, tmp_path: Path) -> None:
    measure(1.0, 0.5)
    assert auto_precision(lambda: 128, tmp_path).precision == "bf16"
    widths = measure(1.0, 2.0)
    again = auto_precision(lambda: 128, tmp_path)
    assert again.precision == "bf16" and "measured earlier" in again.reason and not widths
    assert auto_precision(lambda: 256, tmp_path).precision == "fp32" and widths == [256]


def test_resumed_step_keeps_its_dtype_on_any_machine(measure, monkeypatch, tmp_path: Path) -> None:
    kept = tmp_path / "work" / "step.precision.json"
    measure(1.0, 0.5)
    first = auto_precision(lambda: 128, tmp_path / "cache", kept=kept)
    monkeypatch.setattr(precision, "has_tiles", lambda: False)
    resumed = auto_precision(no_width, tmp_path / "other", kept=kept)
    assert first.precision == resumed.precision == "bf16" and resumed.reason.endswith("decided when the step began")
    kept.write_text("{")  # a damaged file is not used
    assert auto_precision(no_width, tmp_path / "other", kept=kept).precision == "fp32"
    assert json.loads(kept.read_text())["precision"] == "fp32"


def test_measurement_times_both_dtypes_and_does_not_change_the_random_generator(monkeypatch) -> None:
    monkeypatch.setattr(precision, "SECONDS", 0.0)
    monkeypatch.setattr(precision, "TOKENS", 64)
    torch.manual_seed(5)
    expected = torch.Generator().manual_seed(5)
    seconds = pass_seconds(64)
    assert seconds.keys() == {"fp32", "bf16"} and all(0 < value < 60 for value in seconds.values())
    assert torch.equal(torch.rand(2), torch.rand(2, generator=expected))


def test_width_is_that_of_the_model_or_of_the_architecture(tiny_llama_folder, resolve_folder, tmp_path: Path) -> None:
    hidden = json.loads((Path(tiny_llama_folder) / "config.json").read_text())["hidden_size"]
    assert width_of([resolve_folder(tiny_llama_folder)]) == hidden
    assert width_of([], {"type": "distilbert", "dim": 96}) == 96
    assert width_of([resolve_folder(tmp_path)]) == UNKNOWN_WIDTH
