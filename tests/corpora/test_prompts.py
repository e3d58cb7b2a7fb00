"""Prompts: equal ones are used once."""

from __future__ import annotations

import json
from pathlib import Path

from stages.config import DataSource
from stages.corpora.prompts import load_prompts
from stages.process.console import announcing


def test_repeated_prompts_are_counted(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("a", "b", "a", "c", "a")))
    said: list[str] = []
    with announcing(said.append):
        for _ in range(2):  # a step reads its prompts more than once
            assert load_prompts([DataSource(path=str(tmp_path / "rows.jsonl"))]) == ["a", "b", "c"]
    assert said == [f"{tmp_path}/rows.jsonl: left out 2 prompts that repeat an earlier one"]
