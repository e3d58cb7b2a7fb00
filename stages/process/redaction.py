"""Keep secrets out of files and output. A recipe with a secret is refused, because recipes are stored in manifests, summaries and trackers.
Secrets in printed text, including errors and tracebacks, are redacted.

A secret is the value of an environment variable whose name ends in key, token, secret, password or credentials. So is any text in the form
of a well-known token, and a URL with a password.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TextIO

SECRET_NAME = re.compile(r"(?i)(^|[_-])(api_?key|access_?key|private_?key|secret_?key|key|token|secret|passw(or)?d|credentials?)$")
KINDS = {
    "a Hugging Face token": r"\bhf_[A-Za-z0-9]{20,}",
    "an API key": r"\bsk-[A-Za-z0-9_-]{16,}",
    "a GitHub token": r"\b(gh[opsu]_[A-Za-z0-9]{30,}|github_pat_\w{30,})",
    "an AWS access key": r"\bA(K|S)IA[0-9A-Z]{16}\b",
    "a Google API key": r"\bAIza[0-9A-Za-z_-]{30,}",
    "a Slack token": r"\bxox[abprs]-[0-9A-Za-z-]{10,}",
    "a JSON web token": r"\beyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]{8,}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "a password in a URL": r"(?<=://)[^/\s:@]*:[^/\s@]+(?=@)",
}
LOOKS = re.compile("|".join(f"(?:{pattern})" for pattern in KINDS.values()))
SHORTEST = 8  # shorter values would match ordinary texts
BLOT = "[secret]"

_values: set[str] = set()


def protect(environment: Mapping[str, str]) -> None:
    """Redact the values of secret variables in all further output."""
    _values.update(value.strip() for name, value in environment.items() if SECRET_NAME.search(name) and len(value.strip()) >= SHORTEST)


def without_secrets(text: str) -> str:
    """``text`` with every secret redacted."""
    for value in sorted(_values, key=len, reverse=True):  # a secret may be a prefix of another
        text = text.replace(value, BLOT)
    return LOOKS.sub(BLOT, text)


def find_secret(texts: Iterable[str]) -> str | None:
    """The kind of secret in the first of ``texts`` that contains one; None if there is none. Does not return the secret itself."""
    for text in texts:
        for kind, pattern in KINDS.items():
            if re.search(pattern, text):
                return kind
        if any(value in text for value in _values):
            return "the value of a secret variable of the environment"
    return None


class Blotted:
    """A text stream that redacts secrets in what is written to it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return int(self._stream.write(without_secrets(text)))

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)
