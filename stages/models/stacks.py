"""What a model consists of: whole weights, and the adapters on them, at any depth. Reads configs alone, and imports no torch.

A published adapter belongs to the model that its step started from, which may be an adapter itself. An adapter in a folder or on the hub
names its base in its adapter_config.json.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.config import ModelInput
from stages.errors import ModelError

if TYPE_CHECKING:
    from stages.registry.references import ResolvedModel

ADAPTER_CONFIG = "adapter_config.json"
TOKENIZER_FILES = (
    "tokenizer_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)


def is_adapter(model: ResolvedModel) -> bool:
    """Whether the model's folder (or hub repository) holds an adapter and not whole weights."""
    if model.record is not None:
        return model.record.is_adapter
    if model.kind == "hub":
        from transformers.utils import cached_file

        found = cached_file(
            model.path,
            ADAPTER_CONFIG,
            revision=model.input.revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
        )
        return found is not None
    return (Path(model.path) / ADAPTER_CONFIG).exists()


@dataclass(frozen=True)
class Stack:
    """Whole weights and the adapters on them, the lowest first. A model with whole weights has no adapters."""

    base: ResolvedModel
    adapters: tuple[ResolvedModel, ...]


def stack_of(model: ResolvedModel) -> Stack:
    """The whole weights and the adapters that ``model`` consists of, at any depth. Every part of the project asks this function.

    The base is to be loaded as ``model.input`` says, quantized or not. Raises ModelError for an adapter that this project cannot compute
    (``check_adapter``), for one that does not name its base, and for bases that form a circle.
    """
    adapters: list[ResolvedModel] = []
    below = model
    while is_adapter(below):
        if below.path in [adapter.path for adapter in adapters]:
            raise ModelError(f"the adapter {below.ref!r} is its own base; name its base in base_model_name_or_path of {ADAPTER_CONFIG}")
        if below.record is None:
            check_adapter(below)
        adapters.append(below)
        below = find_base(below)
    return Stack(below.with_quantization(model.input), tuple(reversed(adapters)))


def check_folder(model: ResolvedModel) -> None:
    """Raise ModelError where a model in a folder is an adapter that cannot be loaded, as far as folders tell; asks no hub."""
    seen: set[str] = set()
    while model.kind == "folder" and is_adapter(model):
        if model.path in seen:
            raise ModelError(f"the adapter {model.ref!r} is its own base; name its base in base_model_name_or_path of {ADAPTER_CONFIG}")
        seen.add(model.path)
        check_adapter(model)
        model = find_base(model)


def tokenizer_source(model: ResolvedModel) -> ResolvedModel:
    """The highest model of the stack that comes with a tokenizer; many adapters come without."""
    below = model
    while is_adapter(below) and not _has_tokenizer(below):
        below = find_base(below)
    return below


def _has_tokenizer(model: ResolvedModel) -> bool:
    if model.kind != "hub":
        return any((Path(model.path) / name).exists() for name in TOKENIZER_FILES)
    from transformers.utils import cached_file

    options = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    return any(cached_file(model.path, name, revision=model.input.revision, **options) is not None for name in TOKENIZER_FILES[:2])


def trained_on(model: ResolvedModel) -> ModelInput:
    """How the whole weights below the adapter ``model`` are quantized in what it was trained on.

    An adapter on quantized weights keeps the adapters below it apart. One on whole weights has them merged, and then the next quantized
    input further down decides.
    """
    below = model
    while is_adapter(below):
        below = find_base(below)
        if below.input.quantization != "none":
            return below.input
    return below.input


def check_adapter(adapter: ResolvedModel) -> None:
    """Raise ModelError for an adapter from outside of the registry that is no LoRA; reads its adapter_config.json alone."""
    kind = str(read_adapter_config(adapter).get("peft_type", "LORA")).upper()
    if kind != "LORA":
        raise ModelError(
            f"the adapter {adapter.ref!r} is of peft type {kind}; only LORA can be stacked and merged here. Merge it into its base with "
            "peft, where peft can, and name that folder"
        )


def find_base(adapter: ResolvedModel) -> ResolvedModel:
    """The model right below an adapter, at the revision that the adapter names; it may be an adapter itself (``stack_of`` goes on).

    Raises ModelError where the adapter names no base that can be found, RegistryError where the registry no longer has it.
    """
    from stages.registry.ledger import Registry
    from stages.registry.references import ResolvedModel

    if adapter.base is not None:
        return adapter.base
    record = adapter.record
    if record is None:
        return _named_base(adapter)
    base = record.manifest["base"]
    fields = {key: base[key] for key in ("revision", "trust_remote_code", "quantization", "double_quantization") if key in base}
    source = ModelInput(ref=base["ref"], **fields)
    if base["kind"] != "registry":
        return ResolvedModel(ref=base["ref"], kind=base["kind"], path=str(base["path"]), digest=base["digest"], input=source)
    # <root>/models/<name>/<version>, where the name may hold slashes
    registry = Registry(record.folder.parents[record.name.count("/") + 2])
    found = registry.get(base["digest"])
    return ResolvedModel(ref=found.ref, kind="registry", path=str(found.path), digest=found.digest, input=source, record=found)


def _named_base(adapter: ResolvedModel) -> ResolvedModel:
    """The base that adapter_config.json names: a folder (also one beside the adapter's own), else a hub id at its revision."""
    from stages.registry.references import ResolvedModel

    config = read_adapter_config(adapter)
    named = config.get("base_model_name_or_path")
    place = f"base_model_name_or_path in the {ADAPTER_CONFIG} of {adapter.ref!r}"
    if not named:
        raise ModelError(f"{place} is empty; write the folder or the hub id of the model that it was trained on there")
    if str(named).startswith("sha256:"):
        raise ModelError(
            f"{place} is a digest of a registry ({named[:19]}); export the model merged (without --adapter), or write the folder or the "
            "hub id of its base there"
        )
    trusted = adapter.input.trust_remote_code
    for folder in (Path(named), Path(adapter.path) / named):
        if folder.is_dir():
            source = ModelInput(ref=named, trust_remote_code=trusted)
            return ResolvedModel(ref=named, kind="folder", path=str(folder), digest="", input=source)
    if named.startswith((".", "/", "~")):
        raise ModelError(f"{place} is {named!r}, a folder that does not exist; write the folder or the hub id of its base there")
    revision = config.get("revision")
    source = ModelInput(ref=named, revision=revision, trust_remote_code=trusted)
    return ResolvedModel(ref=named, kind="hub", path=named, digest=f"hub:{named}@{revision or 'main'}", input=source)


def read_adapter_config(adapter: ResolvedModel) -> dict[str, Any]:
    """The adapter_config.json of an adapter. Raises ModelError where it cannot be read."""
    try:
        if adapter.kind == "hub":
            from transformers.utils import cached_file

            path = cached_file(adapter.path, ADAPTER_CONFIG, revision=adapter.input.revision)
        else:
            path = str(Path(adapter.path) / ADAPTER_CONFIG)
        config = json.loads(Path(str(path)).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read the {ADAPTER_CONFIG} of {adapter.ref!r}: {str(error).splitlines()[0]}") from error
    if not isinstance(config, dict):
        raise ModelError(f"the {ADAPTER_CONFIG} of {adapter.ref!r} holds no object; expected what peft's save_pretrained writes")
    return config


def weights_of(base: ResolvedModel) -> str:
    """A name for the whole weights ``base``: equal for equal weights.

    Outside of the registry the place stands for the weights, because an adapter says no more of its base than that.
    """
    if base.kind == "registry":
        return base.digest
    return str(Path(base.path).resolve()) if base.kind == "folder" else f"{base.path}@{base.input.revision or ''}"
