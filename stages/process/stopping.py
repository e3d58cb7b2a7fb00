"""Orderly stop on SIGTERM and Ctrl-C: immediately if nothing is lost, else at the next safe point after a checkpoint."""

from __future__ import annotations

import os
import signal
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from stages.errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT)
PATIENCE_SECONDS = 3.0  # a second signal after this time ends the process immediately; before, it is a repeat of the first
REMINDER_SECONDS = 2.0
WEAK_REFERENCES = {weakref.__file__, weakref.WeakSet.__init__.__code__.co_filename}  # weakref.py and _weakrefset.py


class StopRequest:
    """Whether a stop was requested. Outside ``deferred`` a request raises Stopped immediately."""

    def __init__(self) -> None:
        self.number: int | None = None  # signal number
        self._since = 0.0
        self._deferred = 0
        self._is_installed = self._is_reminder = False

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Receive the signals. Works only in the main thread, because Python allows handlers only there."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        self._is_installed = True
        try:
            yield
        finally:
            self._is_installed = False
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now, is_reminder, self._is_reminder = time.monotonic(), self._is_reminder, False
        if self.number is not None and not is_reminder:
            if now - self._since > PATIENCE_SECONDS:
                os._exit(128 + number)
            return
        if self.number is None:
            self._since = now
            self.ask(number)
        if self._deferred:
            return
        threading.Thread(target=self._remind, args=(number,), name="stop reminder", daemon=True).start()
        # Python prints an exception that leaves a finalizer and continues; the reminder raises it again after the finalizer.
        if not _in_finalizer(frame):
            raise Stopped(number)

    def _remind(self, number: int) -> None:
        """Raise again, in case some code caught the exception and continued."""
        time.sleep(REMINDER_SECONDS)
        if self._is_installed and not self._deferred:
            self._is_reminder = True
            os.kill(os.getpid(), number)

    def ask(self, number: int) -> None:
        """Record the request. Another process may have received the signal."""
        if self.number is None:
            self.number = number

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Context in which a stop waits until the end of the block or the next ``check``."""
        self._deferred += 1
        try:
            yield
        finally:
            self._deferred -= 1
        if not self._deferred:
            self.check()

    @contextmanager
    def allowed(self) -> Iterator[None]:
        """Context inside a ``deferred`` block that may be interrupted at any point."""
        deferred, self._deferred = self._deferred, 0
        try:
            self.check()
            yield
        finally:
            self._deferred = deferred

    def check(self) -> None:
        """Raise Stopped if a stop was requested."""
        if self.number is not None:
            raise Stopped(self.number)


def _in_finalizer(frame: FrameType | None) -> bool:
    """Whether ``frame`` runs inside a ``__del__`` or a weak reference callback."""
    while frame is not None:
        if frame.f_code.co_name == "__del__" or frame.f_code.co_filename in WEAK_REFERENCES:
            return True
        frame = frame.f_back
    return False


def end_with_launcher() -> None:
    """Request a stop when the launcher of this process has ended, because killed launchers leave their processes behind."""
    launcher = os.getppid()

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="launcher watch", daemon=True).start()
