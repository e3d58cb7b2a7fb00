"""Access control of the labelling pages: a token per person in the URL, and a password if other machines can reach the server.

The tokens are derived from a secret in the folder (access.json, readable only by its owner). So links stay valid after a server restart.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import secrets
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from stages.errors import DataError

ACCESS = "access.json"
NAME = re.compile(r"[\w.@+-]{1,64}")
SHORTEST_PASSWORD = 8
LEAD = "lead"


def check_annotator(name: str) -> str:
    """Return ``name`` if it is a valid annotator name. Raises DataError otherwise."""
    if not NAME.fullmatch(name):
        raise DataError(f"annotator {name!r}: expected 1 to 64 letters, digits or any of . _ @ + -")
    return name


@dataclass
class Access:
    """The tokens of the pages, and the password if there is one."""

    secret: bytes
    password: str | None = None
    _failures: list[float] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def of(cls, folder: Path, password: str | None = None) -> Access:
        """The access rules of a folder. Creates the secret on first use. Raises DataError if the password is too short."""
        if password is not None and len(password) < SHORTEST_PASSWORD:
            raise DataError(f"the password has {len(password)} characters; expected at least {SHORTEST_PASSWORD}")
        path = folder / ACCESS
        if not path.exists():
            partial = folder / f".{ACCESS}.{secrets.token_hex(4)}"
            with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
                json.dump({"secret": secrets.token_hex(32)}, file)
            os.replace(partial, path)
        return cls(bytes.fromhex(json.loads(path.read_text(encoding="utf-8"))["secret"]), password)

    def _mac(self, text: str) -> str:
        return hmac.new(self.secret, text.encode(), hashlib.sha256).hexdigest()[:32]

    def token(self, annotator: str) -> str:
        """The token in an annotator's link."""
        return self._mac(f"annotator {annotator}")

    @property
    def lead_token(self) -> str:
        """The token in the link of the leader's progress page."""
        return self._mac(LEAD)

    def is_annotator(self, annotator: str, token: str) -> bool:
        """Whether ``token`` is the token of ``annotator``."""
        return NAME.fullmatch(annotator) is not None and hmac.compare_digest(self.token(annotator).encode(), token.encode())

    def is_lead(self, token: str) -> bool:
        """Whether ``token`` is the leader's token."""
        return hmac.compare_digest(self.lead_token.encode(), token.encode())

    # The password

    @property
    def session(self) -> str:
        """The cookie of a user who gave the password. A new password makes old cookies invalid."""
        return self._mac(f"session {self.password}")

    def has_session(self, cookie: str) -> bool:
        """Whether the user with this cookie gave the password. Always true if no password is set."""
        return self.password is None or hmac.compare_digest(self.session.encode(), cookie.encode())

    def gives_password(self, text: str) -> bool | None:
        """Whether ``text`` is the password. None after ten wrong passwords within one minute."""
        with self._lock:
            now = time.monotonic()
            self._failures = [moment for moment in self._failures if now - moment < 60]
            if len(self._failures) >= 10:
                return None
            is_right = self.password is not None and hmac.compare_digest(self.password.encode(), text.encode())
            if not is_right:
                self._failures.append(now)
            return is_right


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address ``host``."""
    return host in ("localhost", "::1") or host.startswith("127.")


def link(base: str, access: Access, annotator: str | None) -> str:
    """The URL of an annotator's page, or of the leader's progress page if ``annotator`` is None."""
    if annotator is None:
        return f"{base}/progress?token={access.lead_token}"

    return f"{base}/?annotator={quote(annotator, safe='')}&token={access.token(annotator)}"
