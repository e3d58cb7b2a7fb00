"""Import a model saved by another library into the registry: read, recognise, convert, publish."""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from stages.errors import ModelError
from stages.importing.layouts import HeadConfig, Layout, Role, recognise
from stages.importing.weights import ADAPTER_FILES, read_file, read_head_file, read_weights
from stages.json_types import JsonObject
from stages.models.heads import RewardModel, ScalarModel, ValueModel
from stages.models.loading import as_resolved, load_classifier, load_language_model, load_tokenizer, save_model
from stages.models.quiet import quiet_transformers
from stages.registry.references import ResolvedModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from stages.registry.ledger import Registry
    from stages.registry.record import ModelRecord

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
HEADS: dict[str, type[ScalarModel]] = {"reward_model": RewardModel, "value_model": ValueModel}


@dataclass(frozen=True)
class Imported:
    """The published versions, the library that wrote the source, and notes on what was assumed, changed or dropped."""

    records: list[ModelRecord]
    library: str
    notes: list[str]


def import_model(
    source: str | Path, registry: Registry, name: str, *, role: Role | None = None, allow_pickle: bool = False, base: str | None = None
) -> Imported:
    """Publish the model at ``source`` (a folder, or a .gguf file) as ``name``; a value head next to a policy as ``<name>-value``.

    ``role`` overrides the head's recognised role. ``base`` replaces the base path in an adapter's config. Adapters are merged, so the
    published model has full weights. Raises ModelError for a source that cannot be read or converted.
    """
    path = Path(source)
    with tempfile.TemporaryDirectory(prefix="stages-import-") as scratch:
        folder = Path(scratch) / "model"
        if path.suffix == ".gguf":
            layout = _convert_gguf(path, folder)
        elif path.is_dir():
            layout = _convert_folder(path, folder, allow_pickle, base)
        else:
            raise ModelError(f"{source}: no such folder or .gguf file; download a Hub model first, and use its folder")
        layout = _with_role(layout, role)
        records = _publish(layout, replace(as_resolved(folder), ref=str(source)), registry, name)
    return Imported(records, layout.library, layout.notes)


def _with_role(layout: Layout, role: Role | None) -> Layout:
    if role is None or role == layout.role:
        return layout
    if layout.head is None and role in HEADS and layout.role not in HEADS:
        raise ModelError(f"--role {role}: the model has no scalar head ({layout.library})")
    return replace(layout, role=role, notes=[note for note in layout.notes if "--role" not in note])


# Conversion to a folder for from_pretrained


def _convert_gguf(path: Path, folder: Path) -> Layout:
    """Dequantize a GGUF file with transformers' reader."""
    if not path.is_file():
        raise ModelError(f"{path}: no such file")
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
            model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
                str(path.parent), gguf_file=path.name, dtype=torch.float32, **_unpacked()
            )
            # The weights are dequantized, but still marked as quantized.
            if (quantizer := getattr(model, "hf_quantizer", None)) is not None:
                quantizer.remove_quantization_config(model)
    except ImportError as error:
        raise ModelError(f"{path}: reading GGUF needs the package gguf; install it with: pip install 'tristage[gguf]'") from error
    except (OSError, ValueError, KeyError, NotImplementedError, RuntimeError) as error:
        raise ModelError(f"{path}: transformers cannot read this GGUF file ({type(error).__name__}: {error})") from error
    save_model(model, tokenizer, folder)
    notes = ["the weights were quantized in the file; they are published dequantized, in fp32"]
    return Layout("GGUF (llama.cpp)", {}, role="language_model", has_policy=True, notes=notes)


def _unpacked() -> JsonObject:
    """The option that makes newer transformers releases dequantize a GGUF file."""
    return {"quantization_config": transformers.GgufConfig(dequantize=True)} if hasattr(transformers, "GgufConfig") else {}


def _convert_folder(source: Path, folder: Path, allow_pickle: bool, base: str | None) -> Layout:
    folder.mkdir()
    for file in sorted(source.iterdir()):  # config and tokenizer; weights are converted separately, subfolders are skipped
        if file.is_file() and not file.name.endswith((*WEIGHT_SUFFIXES, ".index.json")):
            shutil.copyfile(file, folder / file.name)
    is_adapter = (source / "adapter_config.json").exists()
    if is_adapter:
        _copy_adapter(source, folder, allow_pickle, base)
    config_file = folder / "config.json"
    config: HeadConfig = json.loads(config_file.read_text(encoding="utf-8")) if config_file.exists() else {}
    weights = read_weights(source, allow_pickle=allow_pickle)
    layout = recognise(weights, read_head_file(source, allow_pickle=allow_pickle), config, is_adapter=is_adapter)
    if not layout.body and not is_adapter:
        raise ModelError(f"{source} contains no weights; expected model.safetensors or pytorch_model.bin, and config.json")
    if layout.body and not is_adapter:
        body = {name: value.contiguous().clone() for name, value in layout.body.items()}
        save_file(body, folder / "model.safetensors", metadata={"format": "pt"})
        if layout.library != "transformers":
            config.pop("architectures", None)
            config_file.write_text(json.dumps(config), encoding="utf-8")
    if is_adapter:
        layout = replace(layout, notes=[*layout.notes, "the adapter was merged into its base; the published model has all weights"])
    return layout


def _copy_adapter(source: Path, folder: Path, allow_pickle: bool, base: str | None) -> None:
    """Convert the adapter's weights to safetensors. ``base`` replaces the recorded base path."""
    file = next((source / name for name in ADAPTER_FILES if (source / name).exists()), None)
    if file is None:
        raise ModelError(f"{source} has an adapter_config.json but no {ADAPTER_FILES[0]}; copy the adapter's weights there")
    tensors = {name: value.contiguous().clone() for name, value in read_file(file, allow_pickle).items() if not name.startswith("v_head.")}
    save_file(tensors, folder / ADAPTER_FILES[0], metadata={"format": "pt"})
    if base is not None:
        path = folder / "adapter_config.json"
        config = {**json.loads(path.read_text(encoding="utf-8")), "base_model_name_or_path": base, "revision": None}
        path.write_text(json.dumps(config), encoding="utf-8")
    for name in ("config.json", "model.safetensors"):
        (folder / name).unlink(missing_ok=True)


# Publishing


def _publish(layout: Layout, model: ResolvedModel, registry: Registry, name: str) -> list[ModelRecord]:
    tokenizer = load_tokenizer(model)
    extra: JsonObject = {"imported": {"library": layout.library, "head": layout.head.name if layout.head else None, "notes": layout.notes}}
    records = []
    if layout.has_policy or layout.role in ("language_model", None):
        policy = load_language_model(model, dtype=torch.float32, trainable=False, dropout=True, tokenizer=tokenizer)
        records.append(registry.publish(name, lambda folder: save_model(policy, tokenizer, folder), role="language_model", extra=extra))
    if layout.role == "classifier":
        classifier = load_classifier(model, dtype=torch.float32, trainable=False, dropout=True, tokenizer=tokenizer)
        records.append(registry.publish(name, lambda folder: save_model(classifier, tokenizer, folder), role="classifier", extra=extra))
    if layout.role in HEADS:
        made = _scalar_model(layout, model, HEADS[layout.role])
        own_name = f"{name}-value" if layout.has_policy else name
        records.append(registry.publish(own_name, lambda folder: made.save(folder, tokenizer), role=layout.role, extra=extra))
    return records


def _scalar_model(layout: Layout, model: ResolvedModel, kind: type[ScalarModel]) -> ScalarModel:
    if layout.head is None:  # transformers' own form, which contains score.weight
        return kind.from_pretrained(model, dtype=torch.float32, dropout=True)
    made = ValueModel.from_policy(model, dtype=torch.float32, trainable=False, dropout=True)
    if layout.head.weight.shape != made.score_head.weight.shape:
        expected, actual = list(made.score_head.weight.shape), list(layout.head.weight.shape)
        raise ModelError(f"the head {layout.head.name} has shape {actual}; the transformer's hidden states need {expected}")
    made.set_head(layout.head.weight, layout.head.bias)
    return made
