"""What the manifest of a new version records: its files, the models that it was made from, and the installed packages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

from stages.errors import RegistryError
from stages.registry.contents import UNSAFE_SUFFIXES, file_sha256, files_of, normalise_folder
from stages.registry.licence import stated_licence
from stages.registry.record import FileEntry, ModelDescription
from stages.registry.references import ResolvedModel

RECORDED_PACKAGES = (
    "tristage",
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "peft",
    "accelerate",
    "datasets",
    "bitsandbytes",
    "trl",
)


def installed_packages() -> dict[str, str]:
    """Versions of the packages that influence results, without importing them."""
    versions = {}
    for package in RECORDED_PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def filled(model: Path, fill: Callable[[Path], None], name: str, base: ResolvedModel | None) -> tuple[list[FileEntry], bool]:
    """Let ``fill`` write the new folder ``model``, check and normalise it. Returns (its files, whether it contains an adapter)."""
    model.mkdir()
    fill(model)
    check_allowed(model, name)
    is_adapter = (model / "adapter_config.json").exists()
    if is_adapter and base is None:
        raise RegistryError(f"{name!r} contains an adapter, but its base model is unknown; pass base= to publish")
    if is_adapter:
        (model / "README.md").unlink(missing_ok=True)  # peft's model card, which contains only the local path of the base
    normalise_folder(model, _portable_base(base))
    return [{"path": path, "size": file.stat().st_size, "sha256": file_sha256(file)} for path, file in files_of(model)], is_adapter


def check_allowed(model: Path, name: str) -> None:
    """Raise RegistryError if ``model`` holds nothing, pickle files or symbolic links."""
    paths = dict(files_of(model))
    if not paths:
        raise RegistryError(f"nothing was saved for {name!r}; a model needs at least its config.json and *.safetensors")
    unsafe = [path for path in paths if path.endswith(UNSAFE_SUFFIXES)]
    if unsafe:
        raise RegistryError(
            f"{name!r} contains {', '.join(unsafe)}: pickle-based weights are refused because reading them can run code. "
            "Save as safetensors (save_pretrained does) and leave trainer state in the checkpoint folder"
        )
    links = [path for path, file in paths.items() if file.is_symlink()]
    if links:
        raise RegistryError(f"{name!r} contains symbolic links ({', '.join(links)}); a version must contain its files")


def described(model: ResolvedModel) -> ModelDescription:
    """A parent or base as recorded in a manifest: kind, reference (with version), digest, and the path of an external model."""
    ref = model.record.ref if model.record is not None else model.ref
    options = model.input
    described: ModelDescription = {"kind": model.kind, "ref": ref, "digest": model.digest}
    if model.record is None:
        described["path"] = model.path
    if options.revision:
        described["revision"] = options.revision
    if options.quantization != "none":
        described["quantization"] = options.quantization
    if options.trust_remote_code:
        described["trust_remote_code"] = options.trust_remote_code
    if options.template_arguments:
        described["template_arguments"] = {**options.template_arguments}
    if options.quantization == "nf4":
        described["double_quantization"] = options.double_quantization
    return described


def _with_licence(described: ModelDescription) -> ModelDescription:
    """``described`` with the licence in the model card of a model from outside of the registry, if it is known."""
    if described["kind"] != "registry":
        licence = stated_licence(described["kind"], described["path"], described.get("revision"))
        if licence is not None:
            described["licence"] = licence
    return described


def described_parents(models: Sequence[ResolvedModel]) -> list[ModelDescription]:
    """The models that a version was made from, each once, with its licence if it is known."""
    items = [_with_licence(described(model)) for model in models]
    return [item for index, item in enumerate(items) if item not in items[:index]]


def _portable_base(base: ResolvedModel | None) -> str | None:
    """The base name for an adapter's config: a Hub id, which can be loaded anywhere, else the digest."""
    if base is None:
        return None
    return base.path if base.kind == "hub" else base.digest
