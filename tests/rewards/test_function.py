"""Reward functions: their arguments, the values that they may return, and their failures."""

from __future__ import annotations

import gc
import json
import math
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.config import DataSource
from stages.corpora.prompts import load_prompt_rows
from stages.corpora.rows import Row
from stages.errors import DataError, RecipeError, TrainingError
from stages.rewards.building import build_reward
from stages.rewards.config import RewardInput
from stages.rewards.details import Details
from stages.rewards.function import FunctionSource, SpanFunctionSource
from stages.rewards.signature import columns_asked_for, signature_in_source, signature_of
from stages.rewards.source import CombinedReward

CODE = """
import functools, time
calls = []
def plain(p, c): return [len(text) for text in c]
def named(prompts, completions, answer): return [float(text == one) for text, one in zip(completions, answer)]
def other_order(completions, *, answer, prompts): return named(prompts, completions, answer)
def trl(completions, **kwargs): calls.append(sorted(kwargs)); return named(None, completions, kwargs["answer"])
def everything(p, c, **rest): calls.append(sorted(rest)); return [0.0 for _ in c]
def optional(p, c, answer="none", level=None): calls.append((answer, level)); return [0.0 for _ in c]
def talks(prompts, completions, messages): calls.append((prompts, messages)); return [len(turns) for turns in messages]
def tokens(prompts, completions, completion_ids): return [sum(ids) for ids in completion_ids]
def only(prompts, completions, /, answer): return named(prompts, completions, answer)
def old(texts, completions): return [len(text) for text in completions]
def anything(*args): return [len(text) for text in args[1]]
def one(texts): return [0.0]
def none(): return [0.0]
async def waits(p, c): return [0.0 for _ in c]
def helper(text): raise ValueError("no digit")
def broken(p, c): return [helper(text) for text in c]
@functools.wraps(named)
def wrapped(*args, **kwargs): return named(*args, **kwargs)
def sometimes(p, c): return [None if "x" in text else len(text) for text in c]
def never(p, c): return [None for _ in c]
def spans(p, c): return [None if "x" in text else [(0, 1.0), (len(text), 2.0)] for text in c]
def flaky(p, c):
    calls.append("flaky")
    if len(calls) < 3: raise ConnectionError("busy")
    return [1.0 for _ in c]
def slow_once(p, c):
    calls.append("slow")
    if len(calls) == 1: time.sleep(30)
    return [2.0 for _ in c]
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module ``asking``, imported again."""
    (tmp_path / "asking.py").write_text(CODE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "asking", raising=False)
    import asking  # type: ignore[import-not-found]

    return asking


COLUMNS = Details({"answer": ["a", "b"], "level": [1, 2]}, completion_ids=[[1, 2], [3]])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("plain", [1.0, 2.0]),
        ("old", [1.0, 2.0]),
        ("anything", [1.0, 2.0]),
        ("named", [1.0, 0.0]),
        ("other_order", [1.0, 0.0]),
        ("trl", [1.0, 0.0]),
        ("only", [1.0, 0.0]),
        ("wrapped", [1.0, 0.0]),
        ("tokens", [3.0, 3.0]),
        ("talks", [1.0, 1.0]),
    ],
)
def test_a_function_gets_what_its_signature_names(module, name, expected) -> None:
    assert FunctionSource("f", f"asking:{name}").score(["p", "q"], ["a", "bc"], COLUMNS).tolist() == expected


def test_function_gets_messages_and_token_ids(module) -> None:
    for name in ("everything", "trl", "optional"):
        FunctionSource("f", f"asking:{name}").score(["p", "q"], ["a", "b"], COLUMNS)
    FunctionSource("f", "asking:optional").score(["p", "q"], ["a", "b"])
    everything = ["answer", "completion_ids", "level", "messages"]
    assert module.calls == [everything, [*everything, "prompts"], (["a", "b"], [1, 2]), ("none", None)]


def test_a_conversation_has_its_roles(module) -> None:
    turns = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}]
    assert FunctionSource("f", "asking:talks").score([turns, "hi"], ["a", "b"]).tolist() == [2.0, 1.0]
    assert module.calls == [(["system: be kind\n\nuser: hello", "hi"], [turns, [{"role": "user", "content": "hi"}]])]


def test_function_with_an_unavailable_argument_is_an_error(module) -> None:
    with pytest.raises(RecipeError, match=r"takes \(texts\); expected a function of \(prompts, completions\)"):
        FunctionSource("f", "asking:one")
    with pytest.raises(RecipeError, match=r"takes \(\); expected a function of \(prompts, completions\)"):
        FunctionSource("f", "asking:none")
    with pytest.raises(RecipeError, match="is async; expected a plain function"):
        FunctionSource("f", "asking:waits")
    with pytest.raises(TrainingError, match="needs 'answer', but this data has no such column"):
        FunctionSource("f", "asking:named").score(["p"], ["a"])
    with pytest.raises(TrainingError, match="needs 'completion_ids', but no model of this run wrote these completions"):
        FunctionSource("f", "asking:tokens").score(["p"], ["a"])


def test_signatures_are_the_same_with_and_without_the_module(module) -> None:
    for name in ("plain", "named", "other_order", "trl", "everything", "optional", "talks", "tokens", "only", "old", "anything", "spans"):
        read, run = signature_in_source(f"asking:{name}"), signature_of(getattr(module, name), f"asking:{name}")
        assert read is not None
        assert [(one.name, one.kind, one.default is one.empty) for one in read.parameters] == [
            (one.name, one.kind, one.default is one.empty) for one in run.parameters
        ]
        assert (read.by_position, read.takes_everything) == (run.by_position, run.takes_everything)
    assert signature_in_source("asking:wrapped") is None and signature_in_source("asking:nothing") is None


def test_rows_with_one_prompt_and_different_answers_keep_their_columns(module, tmp_path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": "1+1", "answer": answer, "id": number} for number, answer in enumerate(("2", "two", "2"), 1)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def load(function: str) -> list[dict[str, Any]]:
        columns = columns_asked_for([RewardInput(function=f"asking:{function}")])
        return [row.columns for row in load_prompt_rows([DataSource(path=str(path))], columns=columns)]

    assert load("plain") == [{}]
    assert load("named") == [{"answer": "2"}, {"answer": "two"}]
    assert load("optional") == [{"answer": "2"}, {"answer": "two"}]  # no column is called level
    assert [row["id"] for row in load("everything")] == [1, 2, 3]


@pytest.mark.parametrize("run", [True, False])
def test_missing_column_gives_one_message(module, run) -> None:
    row = Row({"prompt": "p", "answers": "a"})
    row.location = "data.jsonl:3"
    columns = columns_asked_for([RewardInput(function="asking:named")], run=run)
    with pytest.raises(DataError, match=r"data.jsonl:3: .*:named needs the column 'answer', but the row has prompt, answers; did you"):
        columns(row)


def test_none_is_left_out_of_the_sum(module) -> None:
    reward = build_reward(
        [RewardInput(function="asking:plain", weight=0.5), RewardInput(function="asking:sometimes", weight=2.0)],
        {},
        "reward",
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    scores = reward.score(["p"] * 3, ["a", "xx", "ccc"])
    assert scores.total.tolist() == [2.5, 1.0, 7.5]  # 0.5 len + 2 len; 0.5 len alone
    assert [math.isnan(value) for value in scores.parts["sometimes"].tolist()] == [False, True, False]


def test_completion_without_any_score_is_an_error(module) -> None:
    reward = CombinedReward([(FunctionSource("never", "asking:never"), 1.0), (FunctionSource("sometimes", "asking:sometimes"), 1.0)])
    with pytest.raises(TrainingError, match="no reward applies to the completion 'x y': never, sometimes returned None"):
        reward.score(["p"] * 2, ["a", "x y"])
    assert reward.score(["p"], ["x"], may_abstain=True).total.tolist() == [0.0]  # monitors


def test_ensemble_members_that_return_none_are_left_out(module) -> None:
    members = [{"function": "asking:sometimes"}, {"function": "asking:plain", "weight": 3.0}, {"function": "asking:never"}]
    reward = build_reward(
        [RewardInput.model_validate({"name": "all", "ensemble": members, "combine": "min"})],
        {},
        "reward",
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    scores = reward.score(["p"] * 2, ["aa", "x"])
    assert scores.total.tolist() == [2.0, 3.0]
    assert scores.parts["all.variance"].tolist() == [4.0, 0.0]  # of 2 and 6; of 3 alone


def test_function_may_return_none_instead_of_spans(module) -> None:
    reward = CombinedReward([(SpanFunctionSource("s", "asking:spans"), 2.0), (FunctionSource("plain", "asking:plain"), 1.0)])
    scores = reward.score(["p"] * 2, ["ab", "x"])
    assert scores.total.tolist() == [8.0, 1.0] and scores.spans == [[(0, 2.0), (2, 4.0)], []]


def test_retries_with_a_growing_wait(module) -> None:
    waits: list[float] = []
    source = FunctionSource("f", "asking:flaky", retries=3, backoff_seconds=0.5, sleep=waits.append)
    assert source.score(["p"], ["a"]).tolist() == [1.0] and waits == [0.5, 1.0]
    module.calls.clear()
    with pytest.raises(TrainingError, match=r"asking:flaky raised ConnectionError: busy \(asking.py, line 27\) \(attempt 2 of 2\)"):
        FunctionSource("f", "asking:flaky", retries=1, sleep=waits.append).score(["p"], ["a"])
    module.calls.clear()
    source = FunctionSource("f", "asking:slow_once", retries=1, timeout=0.2, sleep=waits.append)
    assert source.score(["p"], ["a"]).tolist() == [2.0]  # the hanging call continues in its thread
    assert source.score(["p", "q"], ["a", "b"]).tolist() == [2.0, 2.0]
    with pytest.raises(ValueError, match="retries needs a function or an endpoint"):
        RewardInput.model_validate({"model": "m", "label": 1, "retries": 2})


def test_thread_of_a_function_ends_with_its_source(module) -> None:
    def threads() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name == "reward asking:plain"]

    source = FunctionSource("f", "asking:plain")
    source.score(["p"], ["a"])
    assert len(threads()) == 1
    del source
    gc.collect()
    waited = time.monotonic()
    while threads() and time.monotonic() - waited < 10:
        time.sleep(0.01)
    assert not threads()


def test_an_exception_of_a_function_is_reported_with_its_line(module) -> None:
    line = CODE[: CODE.index("def helper")].count("\n") + 1
    with pytest.raises(TrainingError, match=rf"asking:broken raised ValueError: no digit \(asking.py, line {line}\)"):
        FunctionSource("f", "asking:broken").score(["p"], ["a"])
