"""Requests to JSON servers: cases that the tests of rewards, judges and vLLM do not cover."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from stages.process.remote import GaveUp, JsonClient


def asked(client: JsonClient, listening: socket.socket) -> tuple[threading.Thread, list[GaveUp]]:
    """Start a thread that posts to the listening socket. Returns the thread and a list for the error of the request."""
    raised: list[GaveUp] = []

    def ask() -> None:
        try:
            client.post(f"http://127.0.0.1:{listening.getsockname()[1]}/", {}, lambda answer: answer)
        except GaveUp as error:
            raised.append(error)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    return asking, raised


def test_stop_request_ends_a_waiting_http_request() -> None:
    """The server accepts the connection and never answers. Without the stop the client would wait for 60 s, and then try again."""
    listening = socket.create_server(("127.0.0.1", 0))
    client = JsonClient(key=None, timeout=60.0, retries=3, backoff_seconds=10.0)
    asking, raised = asked(client, listening)
    connection, _ = listening.accept()
    assert connection.recv(10_000)
    time.sleep(0.1)  # now the client waits for the answer
    client.stop()
    asking.join(10)
    assert not asking.is_alive() and "no connection" in str(raised[0])
    client.close()
    with pytest.raises(GaveUp, match="closed"):  # a thread that starts after the stop
        client.get("http://127.0.0.1:1/", lambda answer: answer)
    listening.close()


def test_stop_ends_a_request_whose_connection_was_just_made(monkeypatch) -> None:
    """``stop`` comes between the connection and its registration. The server never answers, and there is no limit of time."""
    listening = socket.create_server(("127.0.0.1", 0))
    client = JsonClient(key=None, timeout=None, retries=3, backoff_seconds=10.0)
    remember = client._remember_socket

    def stopped_before(event: str, details: dict) -> None:
        if event == "connection.connect_tcp.complete":
            client.stop()
        remember(event, details)

    monkeypatch.setattr(client, "_remember_socket", stopped_before)
    asking, raised = asked(client, listening)
    asking.join(10)
    assert not asking.is_alive() and "no connection" in str(raised[0])
    client.close()
    listening.close()
