"""The HTTP interface: permissions, visible content, escaped model text, and no loss of acknowledged answers."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from starlette.testclient import TestClient

from stages.corpora.labels import read_answers
from stages.errors import DataError, LaunchError
from stages.labelling.access import Access
from stages.labelling.command import open_folder, serve
from stages.labelling.config import People
from stages.labelling.markdown import render
from stages.labelling.publishing import publish_settings
from stages.labelling.server import LabelServer, listen
from stages.labelling.store import Store


class Page:
    """A client with a link."""

    def __init__(self, store: Store, access: Access) -> None:
        self.store, self.access = store, access
        self.client = TestClient(LabelServer(store, access).app(), base_url="http://127.0.0.1")

    def ask(self, path: str, annotator: str | None = "anna", token: str | None = None, body: Any = None, **params: Any) -> Any:
        token = token or (self.access.lead_token if annotator is None else self.access.token(annotator))
        query = {**params, **({"annotator": annotator} if annotator else {})}
        headers = {"authorization": f"Bearer {token}"}
        if body is None:
            return self.client.get(path, params=query, headers=headers)
        return self.client.post(path, params=query, headers=headers, content=body if isinstance(body, bytes) else json.dumps(body))


@pytest.fixture
def page(make_folder) -> Iterator[Page]:
    store = Store(make_folder(instructions="# How\n<script>evil()</script> [x](javascript:evil())", overlap=1.0))
    yield Page(store, Access.of(store.folder))
    store.close()


def test_task_is_blind_and_in_the_recorded_order(page, answer) -> None:
    shown = page.ask("/api/task").json()["task"]
    task = page.store.tasks[shown["id"]]
    assert shown["completions"] == [task.completions[index] for index in shown["order"]]
    assert "model-" not in json.dumps(shown) and "sha256" not in json.dumps(shown)
    sent = answer(page.store, "anna", task.id, [0, 1, 2])
    assert page.ask("/api/answer", body=sent).json()["counts"] == {"mine": 1, "ranked": 1, "target": 4, "tasks": 4}
    again = page.ask("/api/task", id=task.id).json()
    assert again["answer"]["ranks"] == [0, 1, 2] and "model-" not in json.dumps(again) and "sha256" not in json.dumps(again)
    (line,) = page.ask("/api/answers").json()["answers"]
    assert line["task"] == task.id and line["state"] == "ranked"
    assert page.ask("/api/task", annotator="ben", id=task.id).status_code == 404  # the answer belongs to anna


def test_changed_settings_apply_without_a_restart(page, answer) -> None:
    said: list[str] = []
    page.client = TestClient(LabelServer(page.store, page.access, say=said.append).app(), base_url="http://127.0.0.1")
    before = page.ask("/api/session").json()
    held = page.ask("/api/task").json()["task"]["id"]
    sent = answer(page.store, "anna", held, [0, 1, 2])
    assert page.ask("/api/progress", annotator=None).json()["notice"] == ""
    questions = page.store.folder.parent / "rated.yaml"
    questions.write_text("ratings: [{name: quality, text: Quality, lowest: 1, highest: 7}]")
    people = People.model_validate({"questions": str(questions), "target": 2, "overlap": 1.0, "annotators": 3})
    publish_settings(page.store.folder, "recipe/step", 0, people)  # as `stages run` does while the server runs
    refused = page.ask("/api/answer", body=sent)
    assert refused.status_code == 400 and "Quality" in refused.json()["error"] and refused.json()["version"] != before["version"]
    assert len(said) == 1 and "these settings changed and now apply: questions, instructions, annotators, target" in said[0]
    assert page.ask("/api/progress", annotator=None).json()["notice"] == said[0]
    after = page.ask("/api/session").json()
    assert after["version"] == refused.json()["version"] and after["questions"]["ratings"][0]["name"] == "quality"
    assert after["counts"]["target"] == 2 and page.ask("/api/task").json()["task"]["id"] == held  # still reserved for anna
    assert page.ask("/api/answer", body={**sent, "ratings": {"quality": [7, 1, 2]}}).status_code == 200
    assert page.store.num_begun() == 1  # two more people rank this task
    publish_settings(page.store.folder, "recipe/step", 0, people)  # written again without a change
    page.ask("/api/session")
    (page.store.folder / "labelling.json").write_text("{")
    assert page.ask("/api/session").json()["counts"]["mine"] == 1  # the old settings still apply
    assert len(said) == 2 and "the changed settings cannot be read" in said[1]


def test_links_are_personal(page) -> None:
    anna, ben = page.access.token("anna"), page.access.token("ben")
    assert anna != ben
    assert page.ask("/api/session").status_code == 200
    for token in (ben, "", "x" * 32, page.access.lead_token):
        assert page.ask("/api/task", token=token or "none").status_code == 403
    assert page.ask("/api/progress", annotator="anna").status_code == 403
    assert page.ask("/api/progress", annotator=None).status_code == 200
    made = page.ask("/api/invite", annotator=None, body={"annotator": "dave"}).json()
    assert made["link"] == f"http://127.0.0.1/?annotator=dave&token={page.access.token('dave')}"
    assert page.ask("/api/invite", annotator=None, body={"annotator": "a/b"}).status_code == 400
    assert Access.of(page.store.folder).token("anna") == anna  # a restarted server has the same links
    assert (page.store.folder / "access.json").stat().st_mode & 0o077 == 0


def test_bad_requests_get_a_message(page, answer) -> None:
    for body, status in ((b"{", 400), (b"[]", 400), (b'{"id": NaN}', 400), (b"[" * 100_000, 400), (b" " * 300_000, 413)):
        response = page.ask("/api/answer", body=body)
        assert response.status_code == status and response.json()["error"], body[:10]
    sent = answer(page.store, "anna", next(iter(page.store.tasks)), [0, 1])
    assert "expected 3 ranks" in page.ask("/api/answer", body=sent).json()["error"]
    assert page.client.get("/static/../store.py").status_code == 404 and page.client.get("/static/%2e%2e%2fstore.py").status_code == 404


def test_full_disk_is_reported_and_the_answer_can_be_sent_again(page, answer, monkeypatch) -> None:
    sent = answer(page.store, "anna", page.store.next_task("anna").id, [0, 1, 2])

    def full(*_: Any) -> int:
        raise OSError(28, "no space left on device")

    monkeypatch.setattr(os, "write", full)
    response = page.ask("/api/answer", body=sent)
    monkeypatch.undo()
    assert response.status_code == 503 and "no space is left" in response.json()["error"]
    assert page.ask("/api/answer", body=sent).status_code == 200


def test_headers_forbid_foreign_scripts_and_frames(page) -> None:
    for path in ("/", "/progress", "/static/label.js", "/api/session"):
        headers = page.client.get(path).headers
        assert "script-src 'self'" in headers["content-security-policy"] and "default-src 'none'" in headers["content-security-policy"]
        assert "frame-ancestors 'none'" in headers["content-security-policy"] and headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"  # the address contains a token


def test_instructions_are_markdown_without_html_or_scripts(page) -> None:
    made = page.ask("/api/session").json()["instructions"]
    assert made.startswith("<h3>How</h3>") and "<script" not in made and 'href="javascript' not in made
    table = render("| a |\n|---|\n| <img src=x onerror=evil()> |\n\n![pic](http://example.com/a.png) [good](https://example.com)")
    assert "<table>" in table and "<img" not in table and 'rel="noopener noreferrer"' in table


def test_password_is_needed_and_a_wrong_one_is_slowed_down(make_folder) -> None:
    store = Store(make_folder())
    page = Page(store, Access.of(store.folder, "correct horse"))
    assert page.ask("/api/session").json()["needs"] == "password"
    assert page.ask("/api/login", body={"password": "wrong horse"}).status_code == 401
    login = page.ask("/api/login", body={"password": "correct horse"})
    cookie = login.headers["set-cookie"].lower()
    assert login.status_code == 200 and "httponly" in cookie and "samesite=strict" in cookie
    assert page.ask("/api/session").status_code == 200  # the client keeps the cookie
    for _ in range(12):
        last = page.ask("/api/login", body={"password": "guess"})
    assert last.status_code == 429
    store.close()
    with pytest.raises(DataError, match="has 5 characters; expected at least 8"):
        Access.of(store.folder, "short")


def test_other_machines_need_a_password(make_folder) -> None:
    from rich.console import Console

    with pytest.raises(
        LaunchError, match="--host 0.0.0.0 lets other machines connect, but no password is set. Export STAGES_LABEL_PASSWORD"
    ):
        serve(make_folder(), ["anna"], host="0.0.0.0", port=0, password=None, console=Console(quiet=True))


def test_port_in_use_is_reported_and_a_free_one_is_chosen() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(LaunchError, match=f"port {port}.*--port"):
            listen("127.0.0.1", port)
    first, second = listen("127.0.0.1", None), listen("127.0.0.1", None)
    assert first.getsockname()[1] != second.getsockname()[1]
    first.close()
    second.close()


# The real server, killed


def test_kill_storm_loses_no_acknowledged_answer(make_folder, start_server) -> None:
    """Two annotators answer without a pause while the server is killed repeatedly. Each answer is sent until it is acknowledged."""
    folder = make_folder(number=600, overlap=0.5)
    server = start_server(folder, "anna", "ben")
    acknowledged: dict[str, list[int]] = {}
    stop = threading.Event()

    def work(name: str) -> None:
        address, _, query = server.links[name].partition("/?")
        token = query.partition("token=")[2]
        client = httpx2.Client(
            base_url=address, params={"annotator": name}, headers={"authorization": f"Bearer {token}"}, timeout=5, trust_env=False
        )

        def ask(method: str, path: str, **content: Any) -> Any:
            while True:
                try:
                    response = client.request(method, path, **content)
                    assert response.status_code == 200, response.text
                    return response.json()
                except httpx2.TransportError:
                    time.sleep(0.02)

        number = 0
        while not stop.is_set() and (task := ask("GET", "/api/task")["task"]) is not None:
            number += 1
            ranks = [(index + number) % 3 for index in range(3)]
            sent = {"id": uuid.uuid4().hex, "task": task["id"], "order": task["order"], "seconds": 1, "ranks": ranks}
            ask("POST", "/api/answer", json=sent)
            acknowledged[sent["id"]] = ranks
        client.close()

    threads = [threading.Thread(target=work, args=(name,)) for name in ("anna", "ben")]
    for thread in threads:
        thread.start()
    for number in range(1, 4):
        until = time.monotonic() + 60
        while len(acknowledged) < 12 * number and time.monotonic() < until:
            time.sleep(0.005)
        server = server.killed_and_started_again()
    stop.set()
    for thread in threads:
        thread.join(timeout=30)
    server.kill()
    kept = {item.id: item.ranks for _, item in read_answers(folder / "answers.jsonl")}
    assert len(acknowledged) >= 36
    assert acknowledged.items() <= kept.items()
    assert len(kept) == len(read_answers(folder / "answers.jsonl"))  # sent again, and kept once
    assert len(kept) - len(acknowledged) <= 2  # answers that were being sent at the end


# The command


def test_options_of_a_file_change_only_what_they_name(tmp_path, answer) -> None:
    path, home = tmp_path / "tasks.jsonl", tmp_path / "home"
    path.write_text("".join(json.dumps({"prompt": f"p {n}", "completions": ["a", "b"]}) + "\n" for n in range(3)))
    (tmp_path / "q.yaml").write_text("title: Mine\n")
    folder = open_folder(str(path), home, {"questions": str(tmp_path / "q.yaml"), "target": 2})
    store = Store(folder)
    store.record("anna", answer(store, "anna", store.next_task("anna").id, [0, 1]))
    store.close()
    assert open_folder(str(path), home, {}) == folder  # the same command without its options
    open_folder(str(path), home, {"annotators": 3})
    again = Store(folder)
    assert (again.settings.questions.title, again.settings.target, again.settings.annotators) == ("Mine", 2, 3)
    assert again.num_ranked() == 1
    again.close()


def test_command_without_a_match_lists_known_steps(make_folder, tmp_path) -> None:
    with pytest.raises(DataError, match="'recipe/none' is neither a step that waits for people, nor a labelling folder, nor a file"):
        open_folder("recipe/none", tmp_path, {})
    with pytest.raises(DataError, match="the recipe defines the questions of these tasks"):
        open_folder(str(make_folder()), tmp_path, {"target": 1})


def test_ctrl_c_ends_the_server_cleanly(make_folder, start_server) -> None:
    server = start_server(make_folder(), "anna")
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(timeout=20) == 130
    assert "Traceback" not in server.process.stdout.read()
