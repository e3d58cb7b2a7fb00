"""SIGTERM and Ctrl-C stop immediately if nothing is lost, else at the next safe point, and immediately after a second request."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
import weakref

import pytest

from stages.errors import Stopped
from stages.process.stopping import StopRequest


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stop_request_raises_immediately_outside_of_deferred_blocks(number: signal.Signals) -> None:
    stop = StopRequest()
    before = signal.getsignal(number)
    with pytest.raises(Stopped) as caught, stop.installed():
        os.kill(os.getpid(), number)
        time.sleep(5)
    assert caught.value.name == number.name and caught.value.exit_status == 128 + number
    assert signal.getsignal(number) is before


def test_deferred_stop_request_waits_for_the_end_or_a_check() -> None:
    stop, passed = StopRequest(), []
    with stop.installed():
        with pytest.raises(Stopped), stop.deferred():
            os.kill(os.getpid(), signal.SIGTERM)
            passed.append("still here")
        with pytest.raises(Stopped), stop.deferred():
            stop.check()
            passed.append("not reached")
    assert passed == ["still here"]


def test_interruptible_part_of_a_deferred_block_can_be_stopped() -> None:
    stop, reached = StopRequest(), []
    with stop.installed(), pytest.raises(Stopped), stop.deferred():
        try:
            with stop.allowed():
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(5)
        finally:
            reached.append(stop._deferred)
    assert reached == [1]  # the rest of the block is protected again


def test_earlier_stop_request_ends_the_interruptible_part_at_its_beginning() -> None:
    stop = StopRequest()
    with pytest.raises(Stopped), stop.deferred():
        stop.ask(signal.SIGTERM)
        with stop.allowed():
            raise AssertionError("not reached")


def test_second_stop_request_after_a_while_ends_the_process_immediately() -> None:
    script = """
        import os, signal, time
        from stages.process import stopping
        stopping.PATIENCE_SECONDS = 0.2
        stop = stopping.StopRequest()
        with stop.installed(), stop.deferred():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)  # the same wish, sent twice
            time.sleep(0.3)
            print("alive", flush=True)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
            print("not reached", flush=True)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (130, "alive\n")


def test_process_ends_when_its_launcher_ends() -> None:
    child = "import os, time, stages.process.stopping as s\ns.end_with_launcher()\nprint(os.getpid(), flush=True)\ntime.sleep(60)"
    parent = f"import subprocess, sys, time\nsubprocess.Popen([sys.executable, '-c', {child!r}])\ntime.sleep(60)"
    launcher = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    assert launcher.stdout is not None
    pid = int(launcher.stdout.readline())
    launcher.kill()
    launcher.wait()
    until = time.monotonic() + 10
    while time.monotonic() < until:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    raise AssertionError(f"process {pid} outlived its launcher")


@pytest.mark.parametrize("kind", ["__del__", "weak reference", "weak set"])
def test_stop_request_inside_a_finalizer_is_repeated_later(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Python prints the traceback of an exception in a finalizer and continues."""
    printed: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", printed.append)
    monkeypatch.setattr("stages.process.stopping.REMINDER_SECONDS", 0.1)

    def ask() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)

    class Finalized:
        def __del__(self) -> None:
            if kind == "__del__":
                ask()

    class Key:
        def __hash__(self) -> int:
            return 1

    class Asking(dict):  # type: ignore[type-arg]
        def __delitem__(self, key: object) -> None:
            ask()
            super().__delitem__(key)

    class AskingSet(set):  # type: ignore[type-arg]
        def discard(self, item: object) -> None:
            ask()
            super().discard(item)

    stop = StopRequest()
    with pytest.raises(Stopped), stop.installed():
        if kind == "__del__":
            Finalized()
        elif kind == "weak set":
            members: weakref.WeakSet[Key] = weakref.WeakSet()
            members.data = AskingSet()
            members.add(Key())
        else:
            table: weakref.WeakKeyDictionary[Key, int] = weakref.WeakKeyDictionary()
            table.data = Asking()
            table[Key()] = 1
        time.sleep(5)
    assert printed == []
