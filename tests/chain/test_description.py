"""What `models show` prints: rows of data, settings that are no defaults, numbers with three digits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stages.chain.description import changed_settings, data_lines, describe, three_digits
from stages.config import DataSource
from stages.corpora.files import fingerprint
from stages.registry.ledger import Registry
from tests.conftest import write_model


def step(**fields: Any) -> dict[str, Any]:
    from stages.sft.config import SFTStepConfig

    config = SFTStepConfig.model_validate({"name": "tuned", "model": "base", "data": {"train": "rows.jsonl"}, **fields})
    return config.model_dump(mode="json")


@pytest.mark.parametrize(
    ("value", "shown"), [(0.123456, "0.123"), (2.0, "2"), (12345.678, "1.23e+04"), (1e-7, "1e-07"), (7, "7"), (True, "True"), ("a", "a")]
)
def test_numbers_have_three_digits(value: Any, shown: str) -> None:
    assert three_digits(value) == shown


def test_only_settings_that_differ_from_defaults_are_shown() -> None:
    assert changed_settings(step()) == []
    changed = changed_settings(step(training={"epochs": 3.0, "batch_size": 64}, lora={"r": 4}, seed=5, preset="instructgpt2022"))
    assert dict(changed) == {"training.epochs": 3.0, "training.batch_size": 64, "lora": {"r": 4}, "seed": 5, "preset": "instructgpt2022"}


def test_unknown_step_or_setting_is_shown_as_written() -> None:
    assert changed_settings({"stage": "alchemy", "name": "x", "gold": 1}) == [("gold", 1)]
    assert changed_settings({**step(), "gone": 1})[-1] == ("gone", 1)
    assert data_lines({"recipe_step": {"stage": "alchemy"}, "data": {"data": "0" * 64}}) == ["data: content " + "0" * 19]


def test_data_is_shown_by_path_and_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n' * 1200)
    hub = {"path": "owner/set", "name": "part", "split": "test"}
    made = step(data={"train": [{"path": str(path), "limit": 1100}], "validation": [hub]})
    manifest = {"recipe_step": made, "data": {"data.train": fingerprint([DataSource(path=str(path))])}}
    assert data_lines(manifest) == [
        "data.train: rows.jsonl (1,100 rows)",
        "data.validation: owner/set, config part, split test (on the Hub)",
    ]
    path.write_text("{}\n")
    assert data_lines(manifest)[0] == "data.train: rows.jsonl (changed since)"
    path.unlink()
    assert data_lines(manifest)[0] == f"data.train: {path.name} (no longer there)"


def test_nested_metrics_are_shown_by_dotted_name(tmp_path: Path) -> None:
    metrics = {"accuracy": 0.66667, "by_length": {"short": 0.5}, "histogram": [1, 2], "steps": 10}
    record = Registry(tmp_path).publish("a/b", write_model, role="language_model", metrics=metrics, recipe_step=step())
    assert describe(record)["metrics"] == ["accuracy  0.667", "by_length.short  0.5", "steps  10"]
