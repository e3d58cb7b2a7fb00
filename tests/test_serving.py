"""`stages serve`: scores over HTTP equal those of the model here, every answer has the digest, and a bad request gets a message."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch

from stages.corpora.conversations.messages import prompt_of
from stages.corpora.rows import Row
from stages.errors import LaunchError, ModelError, RecipeError
from stages.models.heads import RewardModel
from stages.process.runtime import Runtime
from stages.registry.ledger import Registry
from stages.rewards.config import RewardInput
from stages.rewards.endpoint import EndpointSource
from stages.serving import Scorer, serve
from stages.terminal import scorer

TEXTS = ["the film was a joy", "dull"]
TURNS = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}, {"role": "user", "content": "a film"}]


TEMPLATE = (
    "{% if tone %}[{{ tone }}] {% endif %}{% for tool in tools or [] %}{{ tool.name }}\n{% endfor %}"
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
Served = dict[str, tuple[str, Scorer]]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, tiny_llama_folder: Path, tiny_tokenizer: Any) -> Iterator[Served]:
    """(address, scorer) of a reward model with a template and a classifier, each on a separate server."""
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    folder = tmp_path_factory.mktemp("served")
    torch.manual_seed(1)
    model = RewardModel.from_language_model(str(tiny_llama_folder), dtype=torch.float32, trainable=False)
    torch.nn.init.normal_(model.score_head.weight)
    model.tokenizer.chat_template = TEMPLATE
    model.save(folder / "rm", model.tokenizer)
    config = DistilBertConfig(
        vocab_size=len(tiny_tokenizer),
        dim=16,
        hidden_dim=32,
        n_layers=1,
        n_heads=2,
        initializer_range=0.5,
        id2label={0: "BAD", 1: "GOOD"},
        label2id={"BAD": 0, "GOOD": 1},
        pad_token_id=tiny_tokenizer.pad_token_id,
    )
    DistilBertForSequenceClassification(config).save_pretrained(folder / "classifier")
    tiny_tokenizer.save_pretrained(folder / "classifier")
    runtime, registry = Runtime(quiet=True), Registry(folder / "registry")
    servers = {}
    for name, label in (("rm", None), ("classifier", "good")):
        made = scorer(str(folder / name), registry, runtime, label=label, output="logit")
        said: list[str] = []
        ready = threading.Event()

        def say(line: str, said: list[str] = said, ready: threading.Event = ready) -> None:
            said.append(line)
            ready.set()

        options = {"host": "127.0.0.1", "port": 0, "key": "k-secret-9" if name == "rm" else None, "say": say}
        threading.Thread(target=serve, args=(made,), kwargs=options, daemon=True).start()
        assert ready.wait(30) and made.signature["digest"] in said[0]
        servers[name] = (said[0].partition(" answers at ")[2].partition("/get_reward")[0], made)
    yield servers


def far(address: str, key: str | None = None, **fields: Any) -> EndpointSource:
    return EndpointSource(RewardInput.model_validate({"endpoint": address, "retries": 3, **fields}), key=key)


def test_served_scores_equal_the_models(served) -> None:
    for name, key in (("rm", "k-secret-9"), ("classifier", None)):
        address, made = served[name]
        prompts = ["about it", TURNS]
        expected = made.source.score(prompts, TEXTS)
        assert len(set(expected.tolist())) == 2
        torch.testing.assert_close(far(f"{address}/get_reward", key).score(prompts, TEXTS), expected)


def test_vllms_protocols_give_the_scores_of_complete_texts(served) -> None:
    address, made = served["rm"]
    tokenizer, model = made.source.tokenizer, made.source.model
    rows = [torch.tensor([[*tokenizer(f"p {text}")["input_ids"], tokenizer.eos_token_id]]) for text in TEXTS]
    alone = [model.score(row, torch.ones_like(row)) for row in rows]
    served_scores = far(f"{address}/pooling", "k-secret-9", protocol="pooling").score(["p", "p"], TEXTS)
    torch.testing.assert_close(served_scores, torch.cat(alone).detach())
    scores = far(f"{address}/score", "k-secret-9", protocol="score").score(["p", "q"], TEXTS)
    torch.testing.assert_close(scores, made.source.score(["p", "q"], TEXTS))
    classifier, made = served["classifier"]
    served_scores = far(f"{classifier}/classify", protocol="classify", label=1, output="probability", reads="completion").score(
        ["p", "p"], TEXTS
    )
    logits = torch.cat([made.source.model(torch.tensor([made.source.tokenizer(text)["input_ids"]])).logits for text in TEXTS]).detach()
    torch.testing.assert_close(served_scores, logits.softmax(dim=-1)[:, 1], rtol=1e-4, atol=1e-5)


def test_requests_in_the_format_of_openrlhf(served) -> None:
    address, made = served["classifier"]
    query, prompts = ["about it the film", "p dull"], ["about it", "p"]
    answer = httpx2.post(f"{address}/get_reward", json={"query": query, "prompts": prompts, "labels": [None, None]}).json()
    expected = made.source.score(prompts, [" the film", " dull"])
    assert answer["rewards"] == answer["scores"] == pytest.approx(expected.tolist(), abs=1e-5)
    assert (answer["model"], answer["digest"]) == (made.signature["model"], made.signature["digest"])
    answer = httpx2.post(f"{address}/get_reward", json={"query": query}).json()  # nothing shows where the prompts end
    assert answer["rewards"] == pytest.approx(made.source.judge_texts(query).scores.tolist(), abs=1e-5)
    address, made = served["rm"]  # with a chat template, which has already been applied to these texts
    prompts = ["user: a film\nassistant: ", "user: p\nassistant: "]
    query = [prompt + text for prompt, text in zip(prompts, TEXTS, strict=True)]
    body, key = {"query": query, "prompts": prompts, "labels": [None, None]}, {"authorization": "Bearer k-secret-9"}
    answer = httpx2.post(f"{address}/get_reward", json=body, headers=key).json()
    plain = [made.source.tokenizer(text)["input_ids"] + [made.source.tokenizer.eos_token_id] for text in query]
    expected = [made.source.model.score(torch.tensor([ids]), torch.ones(1, len(ids))).item() for ids in plain]
    assert answer["rewards"] == pytest.approx(expected, abs=1e-5)


def test_template_arguments_and_tools_of_a_request_reach_the_chat_template(served) -> None:
    address, made = served["rm"]
    key = {"authorization": "Bearer k-secret-9"}

    def scores_of(*prompts: str) -> Any:
        parts = [[made.source.tokenizer(text)["input_ids"] for text in pair] for pair in zip(prompts, ("a\n", "b\n"), strict=True)]
        rows = [torch.tensor([prompt + reply]) for prompt, reply in parts]
        return pytest.approx([made.source.model.score(ids, torch.ones_like(ids)).item() for ids in rows], abs=1e-5)

    def answer(path: str, **body: Any) -> Any:
        return httpx2.post(f"{address}/{path}", json=body, headers=key).json()

    warm, both = {"tone": "warm"}, scores_of("[warm] user: p\nassistant: ", "[warm] user: q\nassistant: ")
    assert answer("get_reward", prompts=["p", "q"], completions=["a", "b"], chat_template_kwargs=warm)["scores"] == both
    turns = [[{"role": "user", "content": text}] for text in "pq"]
    assert answer("get_reward", messages=turns, completions=["a", "b"], chat_template_kwargs=warm)["scores"] == both
    assert [row["score"] for row in answer("score", text_1=["p", "q"], text_2=["a", "b"], chat_template_kwargs=warm)["data"]] == both
    beside = {"chat_template_kwargs": [None, warm], "tools": [[{"name": "search"}], None]}
    each = scores_of("search\nuser: p\nassistant: ", "[warm] user: q\nassistant: ")
    assert answer("get_reward", prompts=["p", "q"], completions=["a", "b"], **beside)["scores"] == each
    rows = [Row({"prompt": "p", "tools": [{"name": "search"}]}), Row({"prompt": "q", "chat_template_kwargs": warm})]
    assert far(f"{address}/get_reward", "k-secret-9").score([prompt_of(row) for row in rows], ["a", "b"]).tolist() == each


@pytest.mark.parametrize(
    ("name", "path", "body", "message"),
    [
        ("rm", "score", {"text_1": "p", "text_2": "a", "chat_template_kwargs": {"tonne": 1}}, "does not use tonne; it uses tone"),
        (
            "rm",
            "score",
            {"text_1": "p", "text_2": "a", "chat_template_kwargs": "tone"},
            "is 'tone'; expected a list with one entry for each",
        ),
        (
            "rm",
            "get_reward",
            {"prompts": ["p"], "completions": ["a"], "chat_template_kwargs": [3]},
            "entry 1: chat_template_kwargs is 3; exp",
        ),
        ("rm", "get_reward", {"prompts": ["p"], "completions": ["a"], "tools": [{"name": "f"}, {}]}, "one entry for each of the 1 prompts"),
        ("rm", "get_reward", {"query": ["p a"], "chat_template_kwargs": {"tone": 1}}, "no chat template is applied to complete texts"),
        ("rm", "pooling", {"input": ["p a"], "chat_template_kwargs": {"tone": 1}}, "no chat template is applied to complete texts"),
        ("classifier", "score", {"text_1": "p", "text_2": "a", "chat_template_kwargs": {"tone": 1}}, "reads plain texts, without a chat"),
    ],
)
def test_template_arguments_that_nothing_would_use_are_refused(served, name: str, path: str, body: Any, message: str) -> None:
    response = httpx2.post(f"{served[name][0]}/{path}", json=body, headers={"authorization": "Bearer k-secret-9"})
    assert response.status_code == 400 and message in response.json()["error"]


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("get_reward", {"query": "ok", "prompts": 5}, "prompts is 5; expected a list of texts"),
        ("get_reward", {"completions": ["a"], "prompts": ["p", "q"]}, "prompts must be a list with one entry for each of the 1"),
        (
            "get_reward",
            {"completions": ["a"], "messages": [[{"content": "x"}]]},
            "entry 1: messages, message 1: {'content': 'x'}; expected a role",
        ),
        ("get_reward", {"completions": ["a"], "messages": [[{"role": "user"}]]}, "expected text content"),
        ("get_reward", {"completions": ["a"], "messages": [[{"role": "user", "content": None}]]}, "expected text content"),
        ("get_reward", {"completions": ["a"], "messages": [[{"role": "user", "content": 5}]]}, "expected text content"),
        ("get_reward", {"completions": ["a"], "messages": [[{"role": "wizard", "content": "x"}]]}, "expected a role"),
        (
            "get_reward",
            {"completions": ["a"], "messages": [TURNS[:2]]},
            "entry 1: messages ends with an assistant turn; send the last reply in",
        ),
        (
            "get_reward",
            {"completions": ["a", "b"], "messages": [TURNS, "x"]},
            "entry 2: messages is str ('x'); expected a list of messages",
        ),
        ("pooling", {"input": [[1, 2]]}, "expected a list of texts"),
        ("score", {"text_1": ["a", "b"], "text_2": ["c"]}, "text_1 has 2 texts and text_2 1"),
        ("pooling", [1], "expected a JSON object"),
    ],
)
def test_bad_requests_get_a_message(served, path, body, message) -> None:
    address, made = served["classifier"]
    response = httpx2.post(f"{address}/{path}", json=body)
    assert response.status_code == 400 and message in response.json()["error"]
    assert response.json()["digest"] == made.signature["digest"]
    assert httpx2.post(f"{address}/{path}", content=b"{").status_code == 400


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"query": ["a\\ud800b"]}', "contains \\ud800, half of a surrogate pair"),
        (b'{"query": ["a\\u0000b"]}', "contains a NUL character"),
        (b'{"query": ["a\xff"]}', "not valid JSON ('utf-8' codec can't decode byte 0xff"),
        (b'{"query": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "not valid JSON (maximum recursion depth exceeded"),
        (iter([b" " * 2**20] * 65), "longer than 67108864 bytes; send smaller batches"),  # in chunks, without a content-length
    ],
)
def test_bodies_that_are_no_texts_get_a_message(served, content, message) -> None:
    response = httpx2.post(f"{served['classifier'][0]}/get_reward", content=content)
    assert response.status_code == 400 and message in response.json()["error"]


def test_texts_in_which_something_was_cut_are_marked(served) -> None:
    address, made = served["rm"]
    key, long = {"authorization": "Bearer k-secret-9"}, "word " * 2 * made.source.max_length
    answer = httpx2.post(f"{address}/get_reward", json={"query": ["a", long]}, headers=key).json()
    assert answer["cut"] == [False, True]
    answer = httpx2.post(f"{address}/get_reward", json={"prompts": [long, "p"], "completions": ["a", "b"]}, headers=key).json()
    assert answer["cut"] == [True, False]
    for path, body in (("pooling", {"input": ["a", long]}), ("score", {"text_1": "a", "text_2": ["b", long]})):
        assert [row["cut"] for row in httpx2.post(f"{address}/{path}", json=body, headers=key).json()["data"]] == [False, True]
    address, made = served["classifier"]
    rows = httpx2.post(f"{address}/classify", json={"input": ["a", "word " * 2 * made.source.max_length]}).json()["data"]
    assert [row["cut"] for row in rows] == [False, True]


def test_requests_of_clients_that_left_are_not_computed(served, monkeypatch) -> None:
    address, made = served["classifier"]
    host, port = address.removeprefix("http://").split(":")
    computed: list[str] = []
    started, finish, original = threading.Event(), threading.Event(), made.source.judge_texts

    def slow(texts: list[str]) -> Any:
        computed.extend(texts)
        started.set()
        assert finish.wait(30)
        return original(texts)

    monkeypatch.setattr(made.source, "judge_texts", slow)
    answers: list[int] = []
    first = threading.Thread(target=lambda: answers.append(httpx2.post(f"{address}/pooling", json={"input": "first"}).status_code))
    first.start()
    assert started.wait(30)
    for content in (b'{"input": "left"}', b'{"input": "half'):  # both close the connection; the second one within its body
        with socket.create_connection((host, int(port))) as client:
            client.sendall(b"POST /pooling HTTP/1.1\r\nHost: x\r\nContent-Length: 17\r\n\r\n" + content)
            time.sleep(0.3)
    finish.set()
    first.join(30)
    assert answers == [200] and httpx2.post(f"{address}/pooling", json={"input": "last"}).status_code == 200
    assert computed == ["first", "last"]


def test_unexpected_error_is_answered_as_json(served, monkeypatch) -> None:
    address, made = served["classifier"]

    def broken(texts: list[str]) -> Any:
        raise RuntimeError("no memory")

    monkeypatch.setattr(made.source, "judge_texts", broken)
    response = httpx2.post(f"{address}/pooling", json={"input": "a"})
    assert response.status_code == 500 and response.json()["error"] == "the server failed (RuntimeError: no memory)"


def test_key_is_required_except_for_health(served) -> None:
    address, made = served["rm"]
    body = {"query": ["a"]}
    assert httpx2.post(f"{address}/get_reward", json=body).status_code == 401
    assert httpx2.get(f"{address}/v1/models", headers={"Authorization": "Bearer wrong"}).status_code == 401
    assert httpx2.get(f"{address}/health").json() == {"status": "ok", **made.signature}
    response = httpx2.post(f"{address}/classify", json={"input": ["a"]}, headers={"Authorization": "Bearer k-secret-9"})
    assert response.status_code == 400 and "a reward model has no classes" in response.json()["error"]


def test_models_that_cannot_be_served_are_refused(served, tiny_llama_folder, tmp_path) -> None:
    _, made = served["rm"]
    with pytest.raises(LaunchError, match="--host 0.0.0.0 lets other machines send requests. .* --api-key-variable"):
        serve(made, host="0.0.0.0", port=0, key=None, say=print)
    port = int(served["rm"][0].rpartition(":")[2])
    with pytest.raises(LaunchError, match="cannot listen on 127.0.0.1:.*choose another --port"):
        serve(made, host="127.0.0.1", port=port, key=None, say=print)
    registry, runtime = Registry(tmp_path / "registry"), Runtime(quiet=True)
    with pytest.raises(ModelError):
        scorer(str(tiny_llama_folder), registry, runtime, label=None, output="logit")
    with pytest.raises(RecipeError, match="serve .*Input should be"):
        scorer(str(tiny_llama_folder), registry, runtime, label="x", output="loud")
