"""How a process detects that the other processes have ended."""

from __future__ import annotations

import pytest

from stages.process import ending


def test_lost_peers_are_distinguished_from_other_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:3421")
    assert not ending.lost_the_others(closed)  # one process has no others
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert ending.lost_the_others(closed)
    assert not ending.lost_the_others(RuntimeError("a bug")) and not ending.lost_the_others(ValueError())
