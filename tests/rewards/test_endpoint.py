"""Rewards behind an HTTP endpoint: requests, responses, and every failure of a server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from stages.corpora.conversations.messages import prompt_of
from stages.corpora.rows import Row
from stages.errors import DataError, TrainingError
from stages.process.remote import AnswerCache
from stages.rewards.config import RewardInput
from stages.rewards.details import Details
from stages.rewards.endpoint import EndpointSource
from stages.rewards.signature import columns_asked_for
from tests.rewards.conftest import TURNS, Server, lengths


def source(
    server: Server, *, key: str | None = None, cache: AnswerCache | None = None, sleep: Any = lambda seconds: None, **fields: Any
) -> EndpointSource:
    given = {"endpoint": server.url, "name": "far", "retries": 2, **fields}
    return EndpointSource(RewardInput.model_validate(given), key=key, cache=cache, sleep=sleep)


def test_request_and_response_of_the_openrlhf_protocol(server) -> None:
    far = source(server, key="k-secret-9", columns=["level"], label_column="answer", batch_size=2, concurrency=1)
    details = Details({"answer": ["x", "y", "z"], "level": [1, 2, 3]})
    assert far.score(["p", TURNS, "q"], ["a", "bc", "d"], details).tolist() == [1.0, 2.0, 1.0]
    first, second = server.bodies
    assert first == {
        "query": ["p a", "system: be kind\n\nuser: hello\n\nassistant: bc"],
        "prompts": ["p", "system: be kind\n\nuser: hello"],
        "completions": ["a", "bc"],
        "messages": [[{"role": "user", "content": "p"}], TURNS],
        "labels": ["x", "y"],
        "columns": {"level": [1, 2]},
    }
    called = prompt_of(Row({"prompt": "r", "tools": [{"name": "f"}], "chat_template_kwargs": {"thinking": False}}))
    far.score([called, "s"], ["e", "f"], Details({"answer": ["x", "y"], "level": [1, 2]}))
    assert server.bodies[2]["tools"] == [[{"name": "f"}], None]
    assert server.bodies[2]["chat_template_kwargs"] == [{"thinking": False}, None]
    assert second["labels"] == ["z"] and server.headers[0]["authorization"] == "Bearer k-secret-9"


@pytest.mark.parametrize(
    ("fields", "answer", "expected", "sent"),
    [
        ({}, {"rewards": [[0.5], [2]]}, [0.5, 2.0], "query"),
        ({}, {"scores": [0.5, 2]}, [0.5, 2.0], "query"),
        (
            {"protocol": "pooling", "served_model": "rm"},
            {"data": [{"index": 1, "data": [[0.1], [0.7]]}, {"index": 0, "data": [0.2]}]},
            [0.2, 0.7],
            "input",
        ),
        (
            {"protocol": "classify", "label": 1, "output": "probability"},
            {"data": [{"index": 0, "probs": [0.25, 0.75]}, {"index": 1, "probs": [0.5, 0.5]}]},
            [0.75, 0.5],
            "input",
        ),
        (
            {"protocol": "classify", "label": 1, "output": "logprob"},
            {"data": [{"index": 0, "probs": [0.0, 1.0]}, {"index": 1, "probs": [0.5, 0.5]}]},
            [0.0, -0.6931472],
            "input",
        ),
        ({"protocol": "score"}, {"data": [{"index": 0, "score": 0.1}, {"index": 1, "score": -3}]}, [0.1, -3.0], "text_2"),
    ],
)
def test_every_protocol_sends_and_reads_its_own_fields(server, fields, answer, expected, sent) -> None:
    server.reply = lambda body, number: (200, answer)
    assert source(server, **fields).score(["p", "q"], ["a", "b"]).tolist() == pytest.approx(expected)
    assert len(server.bodies[0][sent]) == 2 and server.bodies[0].get("model") == fields.get("served_model")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"rewards": [1.0]}, "the answer has 1 scores for 2 completions"),
        ({"rewards": [1.0, None]}, "the answer contains None as a score"),
        ({"rewards": [1.0, "high"]}, "the answer contains 'high' as a score"),
        ({"rewards": [1.0, True]}, "the answer contains True as a score"),
        (b'{"rewards": [1.0, NaN]}', "the answer contains nan as a score"),
        (b'{"rewards": [1.0, Infinity]}', "the answer contains inf as a score"),
        ({"rewards": [1.0, 10**400]}, "the answer contains 1000.* as a score"),
        ({"reward": [1.0, 2.0]}, "the answer does not follow protocol: openrlhf"),
        (b"<html>", "the answer does not follow protocol: openrlhf"),
        ([1.0, 2.0], "the answer does not follow protocol: openrlhf"),
    ],
)
def test_invalid_score_is_requested_again_and_then_ends_the_run(server, answer, message) -> None:
    server.reply = lambda body, number: (200, answer)
    with pytest.raises(TrainingError, match=f"reward 'far': .* gave no score for 2 of 2 completions: {message}"):
        source(server).score(["p", "q"], ["a", "b"])
    assert len(server.bodies) == 3  # and two retries
    server.reply = lambda body, number: (200, answer if number == 4 else {"rewards": lengths(body)})
    assert source(server).score(["p", "q"], ["a", "bb"]).tolist() == [1.0, 2.0]


def test_errors_of_the_server_are_retried_or_end_the_run(server) -> None:
    waits: list[float] = []
    server.reply = lambda body, number: (503, {}) if number < 3 else (200, {"rewards": lengths(body)})
    assert source(server, sleep=waits.append, backoff_seconds=1.0).score(["p"], ["abc"]).tolist() == [3.0]
    assert 1.0 <= waits[0] <= 1.5 and 2.0 <= waits[1] <= 3.0 and waits[1] != 2 * waits[0]  # with jitter
    server.reply = lambda body, number: (401, {"error": "the key k-secret-9 is wrong"})
    with pytest.raises(TrainingError, match="status 401.*Check the server, endpoint, protocol and api_key_variable") as caught:
        source(server, key="k-secret-9", on_failure="wait").score(["p"], ["abc"])  # a retry cannot help
    assert "k-secret-9" not in str(caught.value) and len(server.bodies) == 4
    server.server.server_close()
    server.server.shutdown()
    with pytest.raises(TrainingError, match="gave no score for 1 of 1 completions: no connection"):
        source(server).score(["p"], ["abc"])


def test_the_first_failure_of_a_server_is_shown_before_the_wait(server, caplog: pytest.LogCaptureFixture) -> None:
    shown: list[int] = []  # number of warnings at each wait
    server.reply = lambda body, number: (503, {}) if number < 3 else (200, {"rewards": lengths(body)})
    assert source(server, sleep=lambda seconds: shown.append(len(caplog.messages)), backoff_seconds=0.0).score(["p"], ["abc"]).tolist() == [
        3.0
    ]
    assert shown == [1, 1]  # one warning, although two attempts failed
    assert caplog.messages == [f"{server.url}: status 503; waiting 0 s before attempt 2 of 3"]


def test_with_on_failure_wait_the_request_is_repeated_until_it_succeeds(server) -> None:
    waits: list[float] = []
    server.reply = lambda body, number: (500, {}) if number < 8 else (200, {"rewards": lengths(body)})
    far = source(server, on_failure="wait", sleep=waits.append, backoff_seconds=0.0)
    assert far.score(["p"], ["abc"]).tolist() == [3.0]
    assert waits.count(30.0) == 2 and len(server.bodies) == 8  # two rounds of three attempts, then the second attempt of the third round


def test_received_scores_are_stored(server, tmp_path: Path) -> None:
    cache = AnswerCache(tmp_path / "rewards.sqlite3")
    server.reply = lambda body, number: (400, {}) if "bad" in body["completions"] else (200, {"rewards": lengths(body)})
    with pytest.raises(TrainingError, match="gave no score for 1 of 3"):
        source(server, cache=cache, batch_size=1, concurrency=1).score(["p"] * 3, ["a", "bb", "bad"])
    assert source(server, cache=cache).score(["p"] * 4, ["bb", "a", "new", "new"]).tolist() == [2.0, 1.0, 3.0, 3.0]
    # the first score tells whether the server names its model; the others were cached, and equal completions are sent once
    assert [body["completions"] for body in server.bodies[-2:]] == [["bb"], ["new"]]
    source(server, cache=cache).score(["another prompt"], ["a"])
    assert server.bodies[-1]["completions"] == ["a"]


def test_stored_scores_of_another_served_model_are_not_used(server, tmp_path: Path, caplog) -> None:
    cache = AnswerCache(tmp_path / "rewards.sqlite3")
    served = {"digest": "sha256:aaaa", "add": 0.0}

    def reply(body: dict[str, Any], number: int) -> tuple[int, Any]:
        return 200, {"rewards": [score + served["add"] for score in lengths(body)], "digest": served["digest"]}

    server.reply = reply
    assert source(server, cache=cache).score(["p", "p", "p"], ["a", "bb", "ccc"]).tolist() == [1.0, 2.0, 3.0]
    assert source(server, cache=cache).score(["p", "p", "p"], ["a", "bb", "ccc"]).tolist() == [1.0, 2.0, 3.0]
    assert [body["completions"] for body in server.bodies] == [["a", "bb", "ccc"], ["a"]]  # one score tells which model is served
    assert not caplog.records
    served.update(digest="sha256:bbbb", add=10.0)
    far = source(server, cache=cache)
    assert far.score(["p", "p", "p"], ["a", "bb", "ccc"]).tolist() == [11.0, 12.0, 13.0]
    assert [record.message for record in caplog.records] == [
        f"reward 'far': {server.url} serves another model (sha256:bbbb) than when some of these scores were stored (sha256:aaaa); they are "
        "requested again"
    ]
    served.update(digest="sha256:aaaa")
    with pytest.raises(TrainingError, match=r"now serves another model \(sha256:aaaa\) than at the start of this run \(sha256:bbbb\)"):
        far.score(["p"], ["dddd"])
    server.reply = lambda body, number: (500, {})
    with pytest.raises(TrainingError, match="gave no score for 1 of 1 completions: status 500"):
        source(server, cache=cache).score(["p"], ["a"])


def test_stored_scores_are_not_used_if_the_server_no_longer_names_its_model(server, tmp_path: Path, caplog) -> None:
    cache, prompts, completions = AnswerCache(tmp_path / "rewards.sqlite3"), ["p", "p", "p"], ["a", "bb", "ccc"]
    server.reply = lambda body, number: (200, {"rewards": lengths(body), "digest": "sha256:aaaa"})
    source(server, cache=cache).score(prompts, completions)
    server.reply = lambda body, number: (200, {"rewards": [10 + score for score in lengths(body)]})
    assert source(server, cache=cache).score(prompts, completions).tolist() == [11.0, 12.0, 13.0]
    assert [body["completions"] for body in server.bodies[1:]] == [["a"], ["bb", "ccc"]]
    assert "serves another model (without a digest) than when some of these scores were stored (sha256:aaaa)" in caplog.text


def test_stored_scores_are_not_used_if_the_server_now_names_its_model(server, tmp_path: Path, caplog) -> None:
    cache, prompts, completions = AnswerCache(tmp_path / "rewards.sqlite3"), ["p", "p", "p"], ["a", "bb", "ccc"]
    server.reply = lambda body, number: (200, {"rewards": lengths(body)})
    source(server, cache=cache).score(prompts, completions)
    server.reply = lambda body, number: (200, {"rewards": [10 + score for score in lengths(body)], "digest": "sha256:bbbb"})
    assert source(server, cache=cache).score(prompts, completions).tolist() == [11.0, 12.0, 13.0]
    assert [body["completions"] for body in server.bodies[1:]] == [["a"], ["bb", "ccc"]]
    assert "serves another model (sha256:bbbb) than when some of these scores were stored (without a digest)" in caplog.text


def test_stored_scores_of_a_server_without_a_name_are_used_after_it_is_gone(server, tmp_path: Path, caplog) -> None:
    cache = AnswerCache(tmp_path / "rewards.sqlite3")
    server.reply = lambda body, number: (200, {"rewards": lengths(body)})
    source(server, cache=cache).score(["p", "p"], ["a", "bb"])
    server.reply = lambda body, number: (400, {})
    assert source(server, cache=cache).score(["p", "p"], ["a", "bb"]).tolist() == [1.0, 2.0]
    assert not caplog.records


def test_a_server_that_is_gone_is_asked_once_although_it_has_many_stored_scores(server, tmp_path: Path) -> None:
    cache, completions = AnswerCache(tmp_path / "rewards.sqlite3"), ["x" * length for length in range(1, 9)]
    server.reply = lambda body, number: (200, {"rewards": lengths(body), "digest": "sha256:aaaa"})
    source(server, cache=cache).score(["p"] * 8, completions)
    server.reply, before = lambda body, number: (400, {}), len(server.bodies)
    with pytest.raises(TrainingError, match="gave no score for 8 of 8 completions: status 400"):
        source(server, cache=cache, concurrency=1).score(["p"] * 8, completions)
    assert len(server.bodies) - before == 2  # the question which model is served, and the scores


def test_missing_columns_are_refused() -> None:
    row = Row({"prompt": "p", "answers": "x"})
    row.location = "data.jsonl:1"
    columns = columns_asked_for([RewardInput(endpoint="http://h/r", label_column="answer")])
    with pytest.raises(DataError, match="data.jsonl:1: the reward h-r needs the column 'answer', but the row has prompt, answers; did"):
        columns(row)


@pytest.mark.parametrize("fields", [{"function": "a:b"}, {"endpoint": "http://h"}, {"model": "m", "answers": ["a", "b"]}])
def test_saved_settings_can_be_loaded(fields) -> None:
    source = RewardInput.model_validate(fields)
    assert RewardInput.model_validate(source.model_dump()) == source


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"endpoint": "http://user:secret@host/"}, "contains a password"),
        ({"endpoint": "http://h", "function": "a:b"}, "exactly one of"),
        ({"endpoint": "http://h", "protocol": "classify"}, "needs label, the number of the class, and output: probability or logprob"),
        ({"endpoint": "http://h", "label": 1}, "label needs protocol: classify"),
        ({"endpoint": "http://h", "protocol": "pooling", "columns": ["a"]}, "need protocol: openrlhf"),
        ({"function": "a:b", "on_failure": "wait"}, "on_failure needs an endpoint; set endpoint, or remove it"),
        ({"endpoint": "http://h", "level": "token"}, "not a classifier, an endpoint"),
    ],
)
def test_contradictions_are_refused(fields, message) -> None:
    with pytest.raises(ValidationError, match=message):
        RewardInput.model_validate(fields)
