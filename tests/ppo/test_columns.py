"""The arguments of reward functions in PPO: the columns of each prompt's row, messages and token ids; and scores of None."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from stages.errors import DataError, Stopped, TrainingError
from stages.ppo.loop import run

CODE = """
import os, signal
seen, calls = [], []
def graded(prompts, completions, answer, level, messages, completion_ids):
    calls.append(len(completions))
    if str(len(calls)) == os.environ.get("CUT_OFF"):
        os.kill(os.getpid(), signal.SIGTERM)
        return [0.0 for _ in completions]
    seen.extend(zip(prompts, answer, level, [len(turns) for turns in messages], [len(ids) for ids in completion_ids]))
    return [float(one) + 0.01 * len(text) for one, text in zip(answer, completions)]
def even(prompts, completions, answer): return [None if one % 2 else 1.0 for one in answer]
def misspelt(prompts, completions, anwser): return [0.0 for _ in completions]
def down(prompts, completions): raise ConnectionError("nobody answers")
"""


@pytest.fixture
def grading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of the functions, imported again."""
    (tmp_path / "grading.py").write_text(CODE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "grading", raising=False)
    import grading  # type: ignore[import-not-found]

    return grading


@pytest.fixture
def rows(tmp_path: Path) -> str:
    """Two prompts with six answers each, and one of the rows twice."""
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"the {word}", "answer": number, "level": word} for word in ("film", "plot") for number in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0]]))
    return str(path)


def test_reward_function_gets_the_columns_of_each_row(grading, rows, ppo_config, ppo_context) -> None:
    rewards = [{"function": "grading:graded"}, {"function": "grading:even", "weight": 10.0}]
    config = ppo_config(data=rows, reward=rewards, total_episodes=12, ppo_epochs=1)
    run(config, ppo_context)
    assert sorted((prompt, answer, level) for prompt, answer, level, *_ in grading.seen) == [
        (f"the {word}", number, word) for word in ("film", "plot") for number in range(6)
    ]
    assert all(turns == 1 and 1 <= tokens <= 10 for *_, turns, tokens in grading.seen)
    metrics = json.loads((ppo_context.folder / "metrics.jsonl").read_text().splitlines()[0])
    assert metrics["rewards/even"] == 1.0 and metrics["scoring/even_not_applied"] == 6.0  # the mean of those that it applies to
    assert "scoring/graded_not_applied" not in metrics
    samples = [json.loads(line) for line in (ppo_context.folder / "samples.jsonl").read_text().splitlines()]
    scores = {(prompt, answer): answer + 10.0 * (answer % 2 == 0) for prompt, answer, *_ in grading.seen[:2]}
    for sample, ((prompt, _), score) in zip(samples, scores.items(), strict=True):
        assert sample["prompt"] == prompt and sample["score"] == pytest.approx(score + 0.01 * len(sample["completion"]), abs=1e-4)


def test_resumed_run_passes_the_same_rows(grading, rows, ppo_config, step_context, resolve_folder, tiny_llama_folder, monkeypatch) -> None:
    models = {"policy": resolve_folder(tiny_llama_folder)}
    config = ppo_config(data=rows, reward=[{"function": "grading:graded"}], total_episodes=24, ppo_epochs=1, checkpoint_seconds=1e9)
    run(config, step_context("test/uninterrupted", 1, models))
    uninterrupted = list(grading.seen)
    grading.seen.clear()
    grading.calls.clear()
    monkeypatch.setenv("CUT_OFF", "2")  # while the second of two rollouts is scored
    context = step_context("test/cut", 1, models)
    with pytest.raises(Stopped), context.runtime.stop.installed():
        run(config, context)
    monkeypatch.delenv("CUT_OFF")
    assert grading.seen == uninterrupted[:12]
    run(config, step_context("test/cut", 1, models))
    assert grading.seen == uninterrupted


@pytest.mark.parametrize("by", ["check_data", "run"])
def test_misspelt_column_gives_one_message_before_training(grading, rows, ppo_config, ppo_context, by) -> None:
    config = ppo_config(data=rows, reward=[{"function": "grading:misspelt"}])
    message = "grading:misspelt needs the column 'anwser', but the row has prompt, answer, level; did you mean 'answer'"
    with pytest.raises(DataError, match=message):
        config.check_data() if by == "check_data" else run(config, ppo_context)


def test_run_that_ends_after_retries_keeps_its_episodes(grading, rows, ppo_config, ppo_context) -> None:
    config = ppo_config(data=rows, reward=[{"function": "grading:down", "retries": 2, "backoff_seconds": 0.0}])
    with pytest.raises(
        TrainingError, match=r"raised ConnectionError: nobody answers \(\w+\.py, line \d+\) \(attempt 3 of 3\).*episodes are in"
    ):
        run(config, ppo_context)
    assert len((ppo_context.folder / "failed_rollout.jsonl").read_text().splitlines()) == 12
