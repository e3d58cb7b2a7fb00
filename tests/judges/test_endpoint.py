"""The endpoint judge against a server on this machine: both orders, retries, cache, refusals, time-outs, cost; the key stays secret."""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from stages.errors import ModelError, RecipeError
from stages.judges.config import EndpointJudge
from stages.judges.endpoint import AnswerCache, Comparison, EndpointClient, shown

Reply = tuple[int, Any, dict[str, str]]


class Server:
    """An OpenAI-compatible endpoint. ``reply(body, number)`` gives (status, content, headers); requests are kept."""

    def __init__(self) -> None:
        self.requests: list[tuple[dict[str, str], dict[str, Any]]] = []
        self.reply: Callable[[dict[str, Any], int], Reply] = lambda body, number: (200, said(longer(body)), {})
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.requests.append((dict(self.headers), body))
                status, content, headers = server.reply(body, len(server.requests))
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status if self.path == "/v1/chat/completions" else 404)
                for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                with suppress(BrokenPipeError):  # the client may have closed the connection
                    self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        self.address = f"http://127.0.0.1:{self.http.server_address[1]}/v1"


def said(text: str) -> dict[str, Any]:
    return {"choices": [{"message": {"role": "assistant", "content": text}}], "usage": {"prompt_tokens": 100, "completion_tokens": 2}}


def longer(body: dict[str, Any]) -> str:
    """A judge that prefers the longer response."""
    a, b = (len(text) for text in responses(body))
    return "A" if a > b else "B" if b > a else "tie"


def responses(body: dict[str, Any]) -> tuple[str, str]:
    text = body["messages"][1]["content"]
    return tuple(text.partition(f"<response_{name}>\n")[2].partition(f"\n</response_{name}>")[0] for name in "AB")  # type: ignore[return-value]


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.http.shutdown()
    made.http.server_close()


def judge(server: Server, **fields: Any) -> EndpointJudge:
    return EndpointJudge.model_validate({"endpoint": server.address, "model": "m", "backoff_seconds": 0.5, "retries": 2, **fields})


def client(
    server: Server, *, key: str | None = None, cache: AnswerCache | None = None, pauses: list[float] | None = None, **fields: Any
) -> Any:
    return EndpointClient(judge(server, **fields), key=key, cache=cache, sleep=(pauses if pauses is not None else []).append)


PAIRS = [Comparison("p", "long one", "short"), Comparison("p", "x", "xx"), Comparison("p", "same", "same"), Comparison("q", "ab", "cd")]


def test_both_orders_are_asked_and_averaged(server: Server) -> None:
    with client(server) as asked:
        assert asked.compare(PAIRS) == [1.0, 0.0, 0.5, 0.5]
    # three pairs in two orders; the equal texts cost nothing
    assert len(server.requests) == asked.tally.requests == 6
    orders = {responses(body) for _, body in server.requests}
    assert ("long one", "short") in orders and ("short", "long one") in orders
    assert (asked.tally.identical, asked.tally.consistent, asked.tally.input_tokens) == (1, 3, 600)


def test_judge_that_always_prefers_the_first_gives_ties(server: Server) -> None:
    server.reply = lambda body, number: (200, said("A"), {})
    with client(server) as asked:
        assert asked.compare(PAIRS[:2]) == [0.5, 0.5]
    assert asked.tally.as_json(judge(server))["order_consistency"] == 0


def test_request_follows_the_protocol(server: Server) -> None:
    with client(server, key="k-123", criteria="Which is {funnier}?") as asked:
        asked.compare([Comparison([{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}], "yes", "no")])
    headers, body = server.requests[0]
    assert headers["Authorization"] == "Bearer k-123"
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("m", 0, 16)
    assert "Which is {funnier}?" in body["messages"][0]["content"]
    assert "<prompt>\nsystem: be brief\n\nuser: hi\n</prompt>" in body["messages"][1]["content"]


def test_retries_wait_longer_each_time(server: Server) -> None:
    def reply(body: dict[str, Any], number: int) -> Reply:
        if number <= 2:
            return (429, {"error": "slow down"}, {"Retry-After": "3"}) if number == 1 else (503, {}, {})
        return 200, said("A"), {}

    server.reply = reply
    pauses: list[float] = []
    with client(server, pauses=pauses, concurrency=1) as asked:
        assert asked.compare([PAIRS[0]]) == [0.5]
    assert pauses == [3.0, 1.0]  # the wait that the server requests; then 0.5, doubled
    assert asked.tally.retries == 2 and asked.tally.failed == 0


def test_unreachable_server_stops_the_step_with_the_reason(server: Server) -> None:
    server.reply = lambda body, number: (500, {}, {})
    with client(server, concurrency=1) as asked, pytest.raises(ModelError, match=r"no verdict on 1 of the first 1 of 4 .*status 500 \(1\)"):
        asked.compare(PAIRS)
    # A large share may fail here, but not all of the first eight. The thread that asks must not run far ahead of the one that counts,
    # even if that is slow: the server fails two comparisons (three attempts each) more than are counted, then it waits.
    counted = threading.Semaphore(3 * 2)

    def fail(body: dict[str, Any], number: int) -> Reply:
        counted.acquire(timeout=0.5)
        return 500, {}, {}

    server.reply = fail
    many = [Comparison(f"p{number}", "x", "xx") for number in range(100)]
    with client(server, concurrency=1, max_failed_share=0.5) as asked, pytest.raises(ModelError, match="on 8 of the first 8 of 100"):
        asked.compare(many, lambda: counted.release(3))
    assert asked.tally.failed < 12


def test_time_out_is_counted_as_an_exclusion(server: Server) -> None:
    def reply(body: dict[str, Any], number: int) -> Reply:
        if "slow" in body["messages"][1]["content"]:
            time.sleep(1.5)
        return 200, said(longer(body)), {}

    server.reply = reply
    pairs = [*PAIRS, Comparison("slow", "1", "22")]
    with client(server, timeout_seconds=0.4, retries=1, max_failed_share=0.25) as asked:
        assert asked.compare(pairs) == [1.0, 0.0, 0.5, 0.5, None]
    tally = asked.tally.as_json(judge(server))
    assert (tally["failed"], tally["retries"]) == (1, 1)
    assert tally["reasons"] == {"no reply within 0.4 s": 1}


def test_refusals_are_counted(server: Server) -> None:
    server.reply = lambda body, number: (200, said("As a language model I cannot judge this."), {})
    with client(server, max_failed_share=1.0) as asked:
        assert asked.compare(PAIRS[:2]) == [None, None]
    assert asked.tally.refused == 2


def test_missing_server_is_an_error(server: Server) -> None:
    server.http.shutdown()
    server.http.server_close()
    with client(server, retries=1) as asked, pytest.raises(ModelError, match=r"no connection \(ConnectError\)"):
        asked.compare(PAIRS[:1])
    assert asked.tally.retries == 1


def test_refused_key_stops_immediately_and_is_not_printed(server: Server) -> None:
    server.reply = lambda body, number: (401, {"error": "Incorrect API key provided: k-secret-9"}, {})
    with client(server, key="k-secret-9") as asked, pytest.raises(ModelError) as caught:
        asked.compare(PAIRS[:1])
    assert "status 401" in str(caught.value) and "api_key_variable" in str(caught.value)
    assert "k-secret-9" not in str(caught.value)
    assert asked.tally.retries == 0


@pytest.mark.parametrize("content", [b"not json", {"choices": []}, {"choices": [{"message": {"content": 5}}]}, [1]])
def test_reply_that_is_not_a_chat_completion_is_refused(server: Server, content: Any) -> None:
    server.reply = lambda body, number: (200, content, {})
    with client(server, max_failed_share=1.0) as asked:
        assert asked.compare(PAIRS[:1]) == [None]
    assert asked.tally.reasons == {"the reply is not a chat completion": 1}


def test_no_question_is_sent_twice(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "cache" / "judgements.sqlite3"
    with client(server, key="k-123", cache=AnswerCache(path)) as asked:
        first = asked.compare(PAIRS)
    with client(server, key="k-123", cache=AnswerCache(path)) as again:
        assert again.compare(PAIRS) == first
    assert again.tally.requests == 0 and again.tally.from_cache == 6 and again.tally.input_tokens == 0
    with client(server, cache=AnswerCache(path), criteria="Which is shorter?") as other:
        other.compare(PAIRS[:1])
    assert other.tally.requests == 2  # another question
    assert b"k-123" not in path.read_bytes()


@pytest.mark.parametrize(("unreadable", "reason"), [("", "the reply is empty"), ("I cannot judge this.", "the reply contains no verdict")])
def test_a_reply_without_a_verdict_is_asked_for_again(server: Server, tmp_path: Path, unreadable: str, reason: str) -> None:
    path = tmp_path / "judgements.sqlite3"
    server.reply = lambda body, number: (200, said(unreadable), {})
    with client(server, cache=AnswerCache(path), max_failed_share=1.0) as asked:
        assert asked.compare(PAIRS[:1]) == [None]
    assert asked.tally.refused == 1 and asked.tally.reasons == {reason: 1}
    server.reply = lambda body, number: (200, said(longer(body)), {})
    with client(server, cache=AnswerCache(path)) as again:
        assert again.compare(PAIRS[:1]) == [1.0]
    assert (again.tally.requests, again.tally.from_cache) == (2, 0)


def test_an_unreadable_reply_of_an_older_cache_is_asked_for_again(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "judgements.sqlite3"
    with client(server, cache=AnswerCache(path)) as asked:
        asked.compare(PAIRS[:1])
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE replies SET reply = ''")
    with client(server, cache=AnswerCache(path)) as again:
        assert again.compare(PAIRS[:1]) == [1.0]
    assert (again.tally.requests, again.tally.from_cache) == (2, 0)


def test_broken_cache_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "judgements.sqlite3"
    path.write_text("not a data base, but long enough to be taken for one " * 4)
    with pytest.raises(ModelError, match="the cache of judgements .* cannot be used"):
        AnswerCache(path)


def test_cost_follows_from_tokens_and_prices(server: Server) -> None:
    with client(server) as asked:
        asked.compare(PAIRS[:2])
    # 4 requests of 100 and 2 tokens: 400 at 3 and 8 at 15 a million
    priced = judge(server, price_per_million_input=3.0, price_per_million_output=15.0)
    assert asked.tally.as_json(priced)["cost"] == pytest.approx(400 * 3e-6 + 8 * 15e-6)
    assert asked.tally.as_json(judge(server))["cost"] is None


def test_the_judge_reads_prompt_and_both_responses_in_order() -> None:
    text = shown("why?", "because", "don't know")
    assert text.index("why?") < text.index("because") < text.index("don't know")


def test_a_password_in_the_address_is_refused(server: Server) -> None:
    with pytest.raises(ValidationError, match="contains a password"):
        judge(server, endpoint="http://user:pass@host/v1")


def test_the_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    from stages.process.environment import secret

    monkeypatch.setenv("A_KEY_FOR_TESTS", "k")
    assert secret("A_KEY_FOR_TESTS") == "k"
    monkeypatch.delenv("A_KEY_FOR_TESTS")
    with pytest.raises(RecipeError, match="A_KEY_FOR_TESTS is not set"):
        secret("A_KEY_FOR_TESTS")
