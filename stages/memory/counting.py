"""What is counted on models without memory: weights, adapters, passes and decoding. A count is made once, and kept in a file.

R rows (sequences), C columns (tokens of a row). A count imports torch (``fake_passes``, ``fake_weights``, ``fake_decoding``); a later
plan reads the file and imports nothing.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, replace
from functools import cache, partial
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

from stages.errors import ModelError, StagesError
from stages.memory.decoding import DecodingMemory, LayerStates
from stages.memory.passes import PassKind, PassMemory, Polynomial, Task
from stages.memory.weights import AdapterWeights, ModelWeights, Quantizable
from stages.process.storage import read_json, write_json

logger = logging.getLogger(__name__)

_file: ContextVar[Path | None] = ContextVar("file", default=None)  # where counts are kept
_messages: ContextVar[list[str] | None] = ContextVar("messages", default=None)  # what could not be counted
Fields = dict[str, Any]
"""The fields of a count as JSON, or its ``reason`` if it is impossible."""
_counts: dict[str, Fields] = {}  # by ``_key``


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

    def count() -> PassMemory:
        from stages.memory.fake_passes import count

        return count(kind)

    otherwise = f"the activations of {_family(kind)} are estimated by constants, because its layers cannot be counted"
    fields = _counted(_key(kind), kind, count, otherwise)
    return None if fields is None else PassMemory(_polynomial(fields["kept"]), _polynomial(fields["peak"]))


def model_weights(config: str, vocabulary: int, task: Task = "CAUSAL_LM") -> ModelWeights | None:
    """The weights of a model; None if they cannot be counted. The log (or ``uncounted``) then says why, once.

    ``config``: the transformers config as JSON. ``task``: the class of the model.
    """
    kind = replace(_plain_kind(config, vocabulary), task=task)

    def count() -> ModelWeights:
        from stages.memory.fake_weights import weights_of

        return weights_of(kind)

    otherwise = f"the weights of {_family(kind)} are computed as those of a plain transformer, because they cannot be counted"
    fields = _counted(f"weights {_key(kind)}", kind, count, otherwise)
    return None if fields is None else ModelWeights(**{**fields, "quantizable": Quantizable(**fields["quantizable"])})


def adapter_weights(kind: PassKind) -> AdapterWeights | None:
    """The weights of the adapter of ``kind``; None if they cannot be counted. The log (or ``uncounted``) then says why, once.

    Raises ModelError if the settings of the adapter do not fit the model.
    """

    def count() -> AdapterWeights:
        from stages.memory.fake_weights import adapter_of

        return adapter_of(kind)

    otherwise = f"the adapter of {_family(kind)} is computed as one on a plain transformer, because it cannot be counted"
    fields = _counted(f"adapter {_key(kind)}", kind, count, otherwise)
    if fields is None:
        return None
    counted = AdapterWeights(**fields)
    if counted.unfit:
        raise ModelError(counted.unfit)
    return counted


def refuse_unfit_stacks(kind: PassKind, changed: tuple[int, ...]) -> None:
    """Raise ModelError if the adapters of ``kind.stacks`` cannot be on its model together.

    ``changed``: when the folders in it were changed. An error of a family's own code is ignored, because the step itself will show it.
    """

    def tried() -> Fields:
        from stages.memory.fake_weights import stacks_of

        return stacks_of(kind)

    if kind.config and (unfit := _known(f"stacks {_key(kind)} {changed}", partial(_or_reason, tried)).get("unfit")):
        raise ModelError(unfit)


def decoding_memory(kind: PassKind) -> DecodingMemory | None:
    """What a model keeps while it decodes; None if it cannot be counted. The log (or ``uncounted``) then says why, once."""

    def count() -> DecodingMemory:
        from stages.memory.fake_decoding import count

        return count(kind)

    otherwise = f"the KV cache of {_family(kind)} is computed as that of a plain transformer, because it cannot be counted"
    fields = _counted(f"decoding {_key(kind)}", kind, count, otherwise)
    if fields is None:
        return None
    layers = tuple(LayerStates(**layer) for layer in fields["layers"])
    pairs = {name: (fields[name][0], fields[name][1]) for name in ("step", "slot_step")}
    return DecodingMemory(**{**fields, **pairs, "layers": layers})


def has_plain_logits(config: str, vocabulary: int) -> bool:
    """Whether the logits of a causal language model are its last hidden states times its output layer, without a cap or a scale.

    True if that cannot be found out. ``config``: the transformers config as JSON.
    """
    kind = _plain_kind(config, vocabulary)

    def count() -> Fields:
        from stages.memory.fake_passes import has_plain_logits

        return {"plain": has_plain_logits(kind)}

    if not config:
        return True
    return bool(_known(f"logits {_key(kind)}", partial(_or_reason, count)).get("plain", True))


def text_sizes(config: str) -> Fields | None:
    """The fields of the part for text of a transformers config, with the defaults of its class; None if transformers does not have it.

    ``config``: the transformers config as JSON.
    """
    kind = _plain_kind(config, 0)

    def read() -> Fields:
        from stages.memory.fake_passes import text_config_of

        return {"fields": json.loads(json.dumps(text_config_of(kind).to_dict(), default=str))}

    fields: Fields | None = _known(f"sizes {_key(kind)}", partial(_or_reason, read)).get("fields")
    return fields


def _plain_kind(config: str, vocabulary: int) -> PassKind:
    return PassKind(config, vocabulary, "cpu", weights=4, compute=4, trains=False)


def _family(kind: PassKind) -> str:
    return str(json.loads(kind.config or "{}").get("model_type", "this model"))


def _counted(key: str, kind: PassKind, count: Callable[[], object], otherwise: str) -> Fields | None:
    """The fields of a count; None if it is impossible. ``otherwise``: what the plan then does, which is said once, with the reason."""
    if not kind.config:
        return None
    fields = _known(key, partial(_or_reason, count))
    if "reason" not in fields:
        return fields
    _say(f"{otherwise}: {fields['reason']}")
    return None


def _known(key: str, count: Callable[[], Fields]) -> Fields:
    """What is kept under ``key``; if there is nothing, what ``count`` returns."""
    path = _file.get()
    if key not in _counts and path is not None:
        _counts.update(read_json(path))
    if key not in _counts:
        _counts[key] = count()
        if path is not None:
            _write(path, key)
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


def _polynomial(content: Fields) -> Polynomial:
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
    own = ("counting", "passes", "weights", "decoding", "fake_passes", "fake_weights", "fake_decoding")
    models = (
        "adapters/activation",
        "adapters/attaching",
        "adapters/folding",
        "adapters/saved",
        "adapters/variants",
        "families",
        "layers/lean",
    )
    counted = (*(f"models/{name}" for name in models), "kernels/lean", "kernels/low_rank", "sampling/cache", "sampling/support")
    folder = Path(__file__).parent
    paths = [*(folder / name for name in own), *(folder.parent / name for name in counted)]
    return [path.with_suffix(".py").read_text(encoding="utf-8") for path in paths]


def _write(path: Path, key: str) -> None:
    """Add a count to the file."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {**read_json(path), key: _counts[key]})
    except OSError as error:
        logger.info("the counts of activations cannot be saved: %s", error)


def _or_reason(count: Callable[[], object]) -> Fields:
    """The fields of a count, or the reason why there is none: any error of a family's own code."""
    with _silent():
        try:
            made = count()
        except Exception as error:
            return {"reason": _reason(error)}
    return made if isinstance(made, dict) else asdict(made)  # type: ignore[call-overload]


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())[:200]
    return text if isinstance(error, StagesError) else f"{type(error).__name__}: {text}"


@contextmanager
def _silent() -> Iterator[None]:
    """Without the logs of fake tensors (they have tracebacks of errors that are caught) and transformers, and without warnings of peft."""
    loggers = [logging.getLogger(name) for name in ("torch._subclasses.fake_tensor", "transformers")]
    levels = [one.level for one in loggers]
    for one in loggers:
        one.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for one, level in zip(loggers, levels, strict=True):
            one.setLevel(level)
