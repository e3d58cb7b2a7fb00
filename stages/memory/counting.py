"""A model's weights, and the memory of a forward and backward pass: counted once per model and kind of pass, and kept in a file.

R rows (sequences), C columns (tokens of a row). A count imports torch (``fake_passes``, ``fake_weights``); a later
plan reads the file and imports nothing.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict
from functools import cache, partial
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import TypedDict, cast, final

from stages.errors import StagesError
from stages.memory.passes import PassKind, PassMemory, Polynomial
from stages.memory.weights import ModelWeights

logger = logging.getLogger(__name__)

_file: ContextVar[Path | None] = ContextVar("file", default=None)  # where counts are kept
_messages: ContextVar[list[str] | None] = ContextVar("messages", default=None)  # what could not be counted


@contextmanager
def kept_in(path: Path) -> Iterator[None]:
    """Context manager in which counts are read from and added to the file at ``path``. It may be deleted at any time."""
    token = _file.set(path)
    try:
        yield
    finally:
        _file.reset(token)


@contextmanager
def uncounted() -> Iterator[list[str]]:
    """Context manager that collects what could not be counted and why, one sentence each, instead of logging it."""
    messages: list[str] = []
    token = _messages.set(messages)
    try:
        yield messages
    finally:
        _messages.reset(token)


def pass_memory(kind: PassKind) -> PassMemory | None:
    """The memory of a pass; None if its layers cannot be counted. The log (or ``uncounted``) then says why, once."""
    if not kind.config:
        return None
    known = _known(_key(kind), partial(_or_reason, partial(_count, kind)))
    if "kept" in known:
        return PassMemory(_polynomial(known["kept"]), _polynomial(known["peak"]))
    if "reason" in known:
        _say(f"the activations of {_family(kind)} are estimated by constants, because its layers cannot be counted: {known['reason']}")
    return None


def model_weights(config: str, vocabulary: int) -> ModelWeights | None:
    """The weights of a model; None if they cannot be counted. The log (or ``uncounted``) then says why, once.

    ``config``: the transformers config as JSON.
    """
    if not config:
        return None
    kind = PassKind(config, vocabulary, "cpu", weights=4, compute=4, trains=False)
    known = _known(f"weights {_key(kind)}", partial(_or_reason, partial(_count_weights, kind)))
    if "linear" in known:
        return ModelWeights(**known)
    if "reason" in known:
        family, reason = _family(kind), known["reason"]
        _say(f"the weights of {family} are computed as those of a plain transformer, because they cannot be counted: {reason}")
    return None


def _family(kind: PassKind) -> str:
    return str(json.loads(kind.config).get("model_type", "this model"))


def has_plain_logits(config: str, vocabulary: int) -> bool:
    """Whether the logits of a causal language model are its last hidden states times its output layer, without a cap or a scale.

    True if that cannot be found out. ``config``: the transformers config as JSON.
    """
    kind = PassKind(config, vocabulary, "cpu", weights=4, compute=4, trains=False)
    if not config:
        return True
    return bool(_known(f"logits {_key(kind)}", partial(_plain_logits, kind)).get("plain", True))


def _known(key: str, count: Callable[[], _Kept]) -> _Kept:
    """What is kept under ``key``; if there is nothing, what ``count`` returns."""
    if key not in _counts:
        _counts.update(_read(_file.get()))
    if key not in _counts:
        _counts[key] = count()
        _write(_file.get(), key)
    return _counts[key]


def _say(message: str) -> None:
    """Add what could not be counted to the list of ``uncounted``, or log it."""
    messages = _messages.get()
    if messages is None:
        _log_once(message)
    elif message not in messages:
        messages.append(message)


@cache
def _log_once(message: str) -> None:
    logger.warning("%s", message)


@final
class _Count(TypedDict):
    """A count in the file: the fields of PassMemory as JSON. In this process the pairs may still be tuples."""

    kept: dict[str, Sequence[float]]
    peak: dict[str, Sequence[float]]


@final
class _NoCount(TypedDict):
    """Why there is no count."""

    reason: str


@final
class _Logits(TypedDict):
    """Whether a model's logits are plain products."""

    plain: bool


@final
class _Weights(TypedDict):
    """The fields of ModelWeights."""

    linear: int
    other: int
    output: int
    adapter: int


_Kept = _Count | _NoCount | _Logits | _Weights
_counts: dict[str, _Kept] = {}  # by ``_key``


def _polynomial(content: dict[str, Sequence[float]]) -> Polynomial:
    return Polynomial(**{name: (pair[0], pair[1]) for name, pair in content.items()})


@cache
def _key(kind: PassKind) -> str:
    """The key of a count: it depends on the pass, the libraries, and the code that counts."""
    content = json.dumps([asdict(kind), _libraries(), _code()], sort_keys=True)
    return sha256(content.encode()).hexdigest()[:32]


@cache
def _libraries() -> list[str]:
    return [version(name) for name in ("torch", "transformers", "peft")]


@cache
def _code() -> list[str]:
    names = ("counting.py", "passes.py", "weights.py", "fake_passes.py", "fake_weights.py")
    return [Path(__file__).with_name(name).read_text(encoding="utf-8") for name in names]


def _read(path: Path | None) -> dict[str, _Kept]:
    if path is None:
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write(path: Path | None, key: str) -> None:
    """Add a count to the file."""
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**_read(path), key: _counts[key]}), encoding="utf-8")
    except OSError as error:
        logger.info("the counts of activations cannot be saved: %s", error)


def _or_reason(count: Callable[[], PassMemory | ModelWeights]) -> _Kept:
    """The fields of a count, or the reason why there is none: any error of a family's own code."""
    with _silent():
        try:
            return cast("_Kept", asdict(count()))
        except Exception as error:
            return {"reason": _reason(error)}


def _count(kind: PassKind) -> PassMemory:
    from stages.memory.fake_passes import count

    return count(kind)


def _count_weights(kind: PassKind) -> ModelWeights:
    from stages.memory.fake_weights import weights_of

    return weights_of(kind)


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())[:200]
    return text if isinstance(error, StagesError) else f"{type(error).__name__}: {text}"


def _plain_logits(kind: PassKind) -> _Logits:
    from stages.memory import fake_passes

    with _silent():
        try:
            return {"plain": fake_passes.has_plain_logits(kind)}
        except Exception as error:
            logger.info("whether the model caps or scales its logits is unknown: %s", error)
            return {"plain": True}


@contextmanager
def _silent() -> Iterator[None]:
    """Without the log of fake tensors: it has tracebacks of errors that are caught."""
    fake = logging.getLogger("torch._subclasses.fake_tensor")
    level = fake.level
    fake.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        fake.setLevel(level)
