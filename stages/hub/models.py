"""Check whether a Hub model can be loaded, from its file list and small files. Weights are not downloaded."""

from __future__ import annotations

import json
from pathlib import Path

from stages.errors import HubError, some_of
from stages.hub.repositories import Repository, fetch

CONFIG, ADAPTER_CONFIG, INDEX = "config.json", "adapter_config.json", "model.safetensors.index.json"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
READ = (".json", ".safetensors", ".txt", ".model", ".jinja", ".py")
OTHERS = (".gguf", ".h5", ".msgpack", ".onnx", ".tflite")


def check_model(repository: Repository) -> None:
    """Raise HubError unless the repository contains a loadable model. Downloads its configuration."""
    names = [name for name in repository.files if "/" not in name]
    config = next((name for name in (ADAPTER_CONFIG, CONFIG) if name in names), None)
    if config is None:
        raise HubError(
            f"the model {repository.id!r} has neither {CONFIG} nor {ADAPTER_CONFIG} among its files; expected a transformers model or a "
            "peft adapter"
        )
    fetch(repository, config)
    base = adapter_base(repository)
    if base is not None and base[0].startswith("sha256:"):
        raise HubError(
            f"the model {repository.id!r} is an adapter that `stages models push` wrote, with its base in the folder bases/. Add both to "
            f"the registry with `stages models pull {repository.id}`, and use the name that it prints"
        )
    _check_weights(repository, names)
    if repository.is_cached and INDEX in names:
        index = json.loads(fetch(repository, INDEX).read_text(encoding="utf-8"))
        for shard in sorted(set(index["weight_map"].values())):
            fetch(repository, shard)


def _check_weights(repository: Repository, names: list[str]) -> None:
    if any(name.endswith(".safetensors") for name in names):
        return
    pickled = [name for name in names if name.endswith(PICKLED) and name != "training_args.bin"]
    if pickled:
        raise HubError(
            f"the model {repository.id!r} has its weights only as {some_of(pickled, 3)}: pickle files can run code when they are read, so "
            f"they are not loaded. Look for a pull request with safetensors at {repository.page}/discussions and use it "
            "({ref: ..., revision: refs/pr/N}), or convert the weights if you trust them and use that folder"
        )
    if repository.is_cached:
        fetch(repository, "model.safetensors")  # raises: offline, and the cache has only the small files
    others = [name for name in names if name.endswith(OTHERS)]
    formats = f"only {some_of(others, 3)}" if others else "none"
    raise HubError(f"the model {repository.id!r} has no *.safetensors (weights found: {formats}); choose a repository that has them")


def is_read(name: str) -> bool:
    """Whether loading a model may read the file ``name`` of its repository."""
    return name.endswith(READ) and ("/" not in name or name.startswith("additional_chat_templates/"))


def download(repository: Repository) -> Path:
    """The folder with a model's files for from_pretrained. Files missing in the cache are downloaded."""
    for name in filter(is_read, repository.files):
        fetch(repository, name)
    return fetch(repository, CONFIG if CONFIG in repository.files else ADAPTER_CONFIG).parent


def adapter_base(repository: Repository) -> tuple[str, str | None] | None:
    """Name and revision of an adapter's base model, as the adapter records them; None if the model is not an adapter."""
    if ADAPTER_CONFIG not in repository.files:
        return None
    config: dict[str, str | None] = json.loads(fetch(repository, ADAPTER_CONFIG).read_text(encoding="utf-8"))
    base = config.get("base_model_name_or_path")
    return (str(base), config.get("revision")) if base else None
