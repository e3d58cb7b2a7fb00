"""The structure of a model: base weights, and adapters on them at any depth. Reads only configs and does not import torch.

A published adapter belongs to the initial model of its step, which may itself be an adapter. An adapter in a folder or on the Hub names its
base in its adapter_config.json.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stages.config import ModelInput
from stages.errors import ModelError
from stages.hub.ids import is_hub_id
from stages.json_types import JsonObject
from stages.registry.ledger import Registry
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
    """Whether the model's folder (or Hub repository) contains an adapter instead of full weights."""
    if model.record is not None:
        return model.record.is_adapter
    if model.kind == "hub":
        from transformers.utils import cached_file

        try:
            path = cached_file(
                model.path,
                ADAPTER_CONFIG,
                revision=model.input.revision,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
                _raise_exceptions_for_gated_repo=False,
            )
        except OSError as error:
            at = f" at revision {model.input.revision!r}" if model.input.revision else ""
            raise ModelError(
                f"the Hub has no model {model.path!r}{at} that this account can read; it was removed or is private. For an adapter on it, "
                "use a copy: `stages models export REF DIR --adapter`, then `stages models import DIR --as NAME --base COPY`"
            ) from error
        return path is not None
    return (Path(model.path) / ADAPTER_CONFIG).exists()


@dataclass(frozen=True)
class Stack:
    """Base weights and the adapters on them, lowest first. A model with full weights has no adapters."""

    base: ResolvedModel
    adapters: tuple[ResolvedModel, ...]


def stack_of(model: ResolvedModel) -> Stack:
    """Determine the base weights and the adapters of ``model``. All code uses this function.

    The base gets the loading options of ``model.input``. Raises ModelError for an unsupported adapter (``check_adapter``), for one that
    does not name its base, and for circular bases.
    """
    adapters: list[ResolvedModel] = []
    below = model
    while is_adapter(below):
        _refuse_circle(below, [adapter.path for adapter in adapters])
        if below.record is None:
            check_adapter(below)
        adapters.append(below)
        below = find_base(below)
    return Stack(below.with_quantization(model.input), tuple(reversed(adapters)))


def check_folder(model: ResolvedModel) -> None:
    """Raise ModelError if a model in a folder is an adapter that cannot be loaded. Checks only folders; makes no requests."""
    seen: list[str] = []
    while model.kind == "folder" and is_adapter(model):
        _refuse_circle(model, seen)
        seen.append(model.path)
        check_adapter(model)
        model = find_base(model)


def _refuse_circle(adapter: ResolvedModel, above: Sequence[str]) -> None:
    """Raise ModelError if the path of an adapter is among those of the adapters ``above`` it."""
    if adapter.path in above:
        raise ModelError(f"the adapter {adapter.ref!r} is its own base; name its base in base_model_name_or_path of {ADAPTER_CONFIG}")


def tokenizer_source(model: ResolvedModel) -> ResolvedModel:
    """The highest model of the stack that has a tokenizer. Many adapters have none."""
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
    """The quantization of the base weights while the adapter ``model`` was trained.

    An adapter on quantized weights keeps lower adapters unmerged. An adapter on full weights has them merged; then the next quantized input
    further down counts.
    """
    below = model
    while is_adapter(below):
        below = find_base(below)
        if below.input.quantization != "none":
            return below.input
    return below.input


UNMERGEABLE = {
    "alora_invocation_tokens": "it acts only after certain tokens (aLoRA)",
    "arrow_config": "it chooses between adapters for each token (Arrow)",
    "layer_replication": "it repeats layers of its base",
    "monteclora_config": "its weights are drawn at random (MonteCLoRA)",
}
"""Fields of peft's LoraConfig for a LoRA that is no fixed update of its base's weights."""
LOST_BASES = ("pissa_niter", "corda", "lora_ga", "loftq")
"""Values of ``init_lora_weights`` that change the base by random numbers or training data, so that loading cannot repeat it."""


def check_adapter(adapter: ResolvedModel) -> None:
    """Raise ModelError for an adapter that is not a fixed low-rank update of its base. Reads only its adapter_config.json."""
    config = read_adapter_config(adapter)
    kind = config.get("peft_type")
    if kind is None:
        raise ModelError(
            f"the {ADAPTER_CONFIG} of {adapter.ref!r} names no peft_type, so peft did not write it and cannot read it. Merge the adapter "
            "into its base with the library that wrote it, and use that folder"
        )
    if kind != "LORA":
        raise ModelError(
            f"the adapter {adapter.ref!r} is of peft type {kind}; only LORA can be stacked and merged here. Merge it into its base with "
            "peft if possible, and use that folder"
        )
    for field, reason in UNMERGEABLE.items():
        if config.get(field):
            raise ModelError(
                f"the adapter {adapter.ref!r} cannot be stacked or merged here: {reason}, as {field} in its {ADAPTER_CONFIG} says. Use "
                "another adapter, or a full model"
            )
    initialization = str(config.get("init_lora_weights", True)).lower()
    if initialization.startswith(LOST_BASES):
        raise ModelError(
            f"the adapter {adapter.ref!r} cannot be loaded: init_lora_weights={initialization!r} changed the weights of its base when the "
            "training started, and these cannot be computed again. Convert it with peft in the program that trained it "
            "(save_pretrained with path_initial_model_for_weight_conversion), or save the merged model there"
        )


def find_base(adapter: ResolvedModel) -> ResolvedModel:
    """The model directly below an adapter, at the revision that the adapter names. It may itself be an adapter (see ``stack_of``).

    Raises ModelError if the named base cannot be found, and RegistryError if the registry no longer has it.
    """
    if adapter.base is not None:
        return adapter.base
    record = adapter.record
    if record is None:
        return _named_base(adapter)
    base = record.base
    assert base is not None, "only adapters have a base"
    fields = {key: base[key] for key in ("revision", "trust_remote_code", "quantization", "double_quantization") if key in base}
    source = ModelInput.model_validate({"ref": base["ref"], **fields})
    if base["kind"] != "registry":
        return ResolvedModel(ref=base["ref"], kind=base["kind"], path=str(base["path"]), digest=base["digest"], input=source)
    # <root>/models/<name>/<version>, where the name may contain slashes
    registry = Registry(record.folder.parents[record.name.count("/") + 2])
    known = registry.get(base["digest"])
    return ResolvedModel(ref=known.ref, kind="registry", path=str(known.path), digest=known.digest, input=source, record=known)


def _named_base(adapter: ResolvedModel) -> ResolvedModel:
    """The base in adapter_config.json: a folder (absolute, or relative to the adapter), else a Hub id at its revision."""
    config = read_adapter_config(adapter)
    named = config.get("base_model_name_or_path")
    source_field = f"base_model_name_or_path in the {ADAPTER_CONFIG} of {adapter.ref!r}"
    if not isinstance(named, str) or not named:
        raise ModelError(f"{source_field} is empty; set it to the folder or the Hub id of the model that the adapter was trained on")
    if named.startswith("sha256:"):
        raise ModelError(
            f"{source_field} is a registry digest ({named[:19]}); export the model merged (without --adapter), or set it to the folder or "
            "Hub id of its base"
        )
    trusted = adapter.input.trust_remote_code
    for folder in (Path(named), Path(adapter.path) / named):
        if folder.is_dir():
            source = ModelInput(ref=named, trust_remote_code=trusted)
            return ResolvedModel(ref=named, kind="folder", path=str(folder), digest="", input=source)
    if not is_hub_id(named):
        raise ModelError(f"{source_field} is {named!r}, a folder that does not exist; set it to the folder or the Hub id of its base")
    revision = str(config["revision"]) if config.get("revision") else None
    source = ModelInput(ref=named, revision=revision, trust_remote_code=trusted)
    return ResolvedModel(ref=named, kind="hub", path=named, digest=f"hub:{named}@{revision or 'main'}", input=source)


def read_adapter_config(adapter: ResolvedModel) -> JsonObject:
    """Read the adapter_config.json of an adapter. Raises ModelError if it is unreadable."""
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
        raise ModelError(f"the {ADAPTER_CONFIG} of {adapter.ref!r} is not a JSON object; expected peft's save_pretrained format")
    return config


def weights_of(base: ResolvedModel) -> str:
    """An identifier of the base weights; equal identifiers mean equal weights.

    Outside the registry the path or Hub id identifies the weights, because an adapter records no more about its base.
    """
    if base.kind == "registry":
        return base.digest
    return str(Path(base.path).resolve()) if base.kind == "folder" else f"{base.path}@{base.input.revision or ''}"
