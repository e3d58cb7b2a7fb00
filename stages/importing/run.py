"""Import a model saved by another library into the registry: read, recognise, convert, publish."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor

from stages.errors import ModelError
from stages.hub.ids import is_hub_id
from stages.importing.gguf import convert_gguf
from stages.importing.layouts import Head, Layout, Role, assumed_reward, heads_of_adapter, not_kept, recognise
from stages.importing.notes import on_precision, on_tokenizer, unused, value_folder
from stages.importing.source import WEIGHT_SUFFIXES, find_source, no_weights, read_json
from stages.importing.weights import ADAPTER_FILES, read_file, read_head_file, read_weights, unquantized, unread_files
from stages.json_types import JsonObject
from stages.models.adapters.saved import HEAD_FILE
from stages.models.adapters.stacks import check_adapter
from stages.models.heads import RewardModel, ScalarModel, ValueModel, read_head
from stages.models.loading import as_resolved, load_classifier, load_language_model, load_tokenizer
from stages.models.saving import save_model
from stages.registry.licence import stated_licence
from stages.registry.names import check_name
from stages.registry.references import ResolvedModel

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedTokenizerBase

    from stages.registry.ledger import Registry
    from stages.registry.record import Licence, ModelRecord

HEADS: dict[str, type[ScalarModel]] = {"reward_model": RewardModel, "value_model": ValueModel}


@dataclass(frozen=True)
class Imported:
    """The versions, the library that wrote the source, its head (empty without one), and what was assumed, changed or dropped.

    ``present``: references of the versions that an earlier import of the same files had published.
    """

    records: list[ModelRecord]
    present: list[str]
    library: str
    head: str
    notes: list[str]


@dataclass(frozen=True)
class _Made:
    """A converted model: its name and role in the registry, and the function that saves it in a folder."""

    name: str
    role: Role
    save: Callable[[Path], None]


def import_model(
    source: str | Path, registry: Registry, name: str, *, role: Role | None = None, allow_pickle: bool = False, base: str | None = None
) -> Imported:
    """Publish the model at ``source`` (a folder, or a .gguf file) as ``name``; a value head next to a policy as ``<name>-value``.

    A model that a version of its name already has, with the same files, is not published again.

    ``role`` overrides the head's recognised role. ``base`` replaces the base path in an adapter's config. Adapters are merged, so the
    published model has full weights. Raises ModelError for a source that cannot be read or converted; then nothing is published.
    """
    check_name(name)
    path = find_source(source)
    with tempfile.TemporaryDirectory(prefix="stages-import-") as scratch:
        folder = Path(scratch) / "model"
        with _named(folder, path):
            layout = convert_gguf(path, folder) if path.is_file() else _convert_folder(path, folder, allow_pickle, base)
            layout = _with_role(layout, role)
            model = replace(as_resolved(folder), ref=str(source))
            tokenizer = load_tokenizer(model)
            layout = replace(layout, notes=[*layout.notes, *unused(layout, folder), *on_tokenizer(folder, tokenizer)])
            made = _models(layout, model, tokenizer, name)
            earlier = {record.ref for model in made for record in registry.versions(model.name)}
            records = _publish(layout, made, registry, _licence(path, layout, base), earlier)
    return Imported(records, [record.ref for record in records if record.ref in earlier], layout.library, layout.head_name, layout.notes)


@contextmanager
def _named(scratch: Path, source: Path) -> Iterator[None]:
    """Messages name ``source``, because ``scratch`` is removed at the end."""
    try:
        yield
    except ModelError as error:
        raise ModelError(str(error).replace(str(scratch), str(source))) from error


def _with_role(layout: Layout, role: Role | None) -> Layout:
    """``layout`` with the role that the user asks for. Raises ModelError if its head cannot have it."""
    if role is None or role == (layout.role or "language_model"):
        return layout
    if role in HEADS and layout.head is None and layout.role not in HEADS:
        if layout.role == "classifier":
            raise ModelError(
                f"--role {role}: the head is that of a classifier ({layout.head_name}); a {role} needs score.weight [1, d]. Import it "
                "without --role, and name a label in the recipe: reward: [{model: NAME, label: LABEL}]"
            )
        raise ModelError(
            f"--role {role}: the model has no scalar head ({layout.library}). Leave --role out, to import it as a language model"
        )
    if role == "classifier" and (layout.head is not None or layout.role not in HEADS):
        raise ModelError(
            f"--role classifier: the model has no classification head ({layout.head_name or layout.library}). Leave --role out"
        )
    notes = [note for note in layout.notes if "--role" not in note]
    if role == "language_model" and layout.head_name and not layout.body:
        notes.append(not_kept([layout.head_name]))
    elif role == "language_model" and layout.head is not None:
        notes.append(not_kept([layout.head.name]))
    return replace(layout, role=role, notes=notes)


# Conversion to a folder for from_pretrained


def _convert_folder(source: Path, folder: Path, allow_pickle: bool, base: str | None) -> Layout:
    folder.mkdir()
    for file in sorted(source.iterdir()):  # config and tokenizer; weights are converted separately, subfolders are skipped
        if file.is_file() and not file.name.endswith((*WEIGHT_SUFFIXES, ".index.json")):
            shutil.copyfile(file, folder / file.name)
    config = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    weights, head_file = read_weights(source, allow_pickle=allow_pickle), read_head_file(source, allow_pickle=allow_pickle)
    if (source / "adapter_config.json").exists():
        return _convert_adapter(source, folder, allow_pickle, base, weights, head_file)
    if base is not None:
        raise ModelError(f"--base is for adapters, and {source} has no adapter_config.json; leave --base out")
    if not weights:
        raise no_weights(source)
    layout = recognise(weights, head_file, config)
    if not layout.body:
        head = layout.head_name or ", ".join(sorted(weights)[:4])
        raise ModelError(f"{source} contains only a head ({head}) and no transformer; copy the weights of the complete model there")
    if not (folder / "config.json").exists():
        raise ModelError(f"{source} has no config.json; copy there the config.json of the model that was trained")
    quantization = unquantized(config, weights, source)
    if layout.value_body:
        shutil.copytree(folder, value_folder(folder))
        _write(layout.value_body, config, value_folder(folder))
    _write(layout.body, config, folder, keep_architecture=layout.library == "transformers")
    notes = [f"not read, because there are safetensors, too: {', '.join(others)}"] if (others := unread_files(source)) else []
    return replace(layout, notes=[*layout.notes, *notes, *quantization, *on_precision(weights)])


def _write(tensors: dict[str, Tensor], config: JsonObject, folder: Path, *, keep_architecture: bool = False) -> None:
    save_file(_alone(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    kept = {name: value for name, value in config.items() if keep_architecture or name != "architectures"}
    (folder / "config.json").write_text(json.dumps(kept), encoding="utf-8")


def _alone(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies that share no memory, as safetensors needs them."""
    return {name: value.contiguous().clone() for name, value in tensors.items()}


def _convert_adapter(
    source: Path, folder: Path, allow_pickle: bool, base: str | None, weights: dict[str, Tensor], head_file: dict[str, Tensor]
) -> Layout:
    """Convert the adapter's weights to safetensors, without its scalar head. ``base`` replaces the recorded base path."""
    config = read_json(folder / "adapter_config.json")
    check_adapter(as_resolved(folder))
    file = next((source / name for name in ADAPTER_FILES if (source / name).exists()), None)
    if file is None:
        raise ModelError(f"{source} has an adapter_config.json but no {ADAPTER_FILES[0]}; copy the adapter's weights there")
    tensors = read_file(file, allow_pickle)
    for name in [name for name in tensors if name.startswith("v_head.")]:  # TRL's head, which is not a part of the adapter
        weights[name] = tensors.pop(name)
    if (source / HEAD_FILE).exists():  # of an adapter from `stages models export --adapter`
        read_file(source / HEAD_FILE, allow_pickle)  # raises ModelError if it is damaged
        weight, bias = read_head(as_resolved(source))
        tensors |= {"base_model.model.score.weight": weight, "base_model.model.score.bias": torch.tensor([bias])}
    layout = recognise(weights, head_file, {}, adapter=tensors)
    if layout.head is not None:
        drop = {name.removesuffix("weight") for name in heads_of_adapter(tensors)}
        tensors = {name: value for name, value in tensors.items() if not name.startswith(tuple(drop))} if drop else tensors
    save_file(_alone(tensors), folder / ADAPTER_FILES[0], metadata={"format": "pt"})
    if base is not None:
        config |= {"base_model_name_or_path": base, "revision": None}
        (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    _check_base(source, config, is_given=base is not None)
    if layout.role is None and config.get("task_type") != "CAUSAL_LM":
        layout = _with_head_of_base(layout, str(config["base_model_name_or_path"]), config.get("task_type") == "SEQ_CLS")
    for name in ("config.json", "model.safetensors"):
        (folder / name).unlink(missing_ok=True)
    named = str(config["base_model_name_or_path"])
    return replace(layout, base=named, notes=[*layout.notes, "the adapter was merged into its base; the published model has all weights"])


def _with_head_of_base(layout: Layout, base: str, is_classifier: bool) -> Layout:
    """``layout`` with the scalar head of the adapter's base, if it has one. Else a classifier's adapter keeps the head of its base."""
    try:
        weight, bias = read_head(as_resolved(base))
    except ModelError:
        return replace(layout, role="classifier", head_name="the classification head of the base") if is_classifier else layout
    name = "score of the base"
    return replace(
        layout,
        head=Head(weight, bias, name),
        role="reward_model",
        head_name=f"{name}, linear from {weight.shape[1]} to 1",
        notes=[*layout.notes, assumed_reward(name)],
    )


def _check_base(source: Path, config: JsonObject, *, is_given: bool) -> None:
    """Raise ModelError if the adapter's base is a path that does not exist on this machine."""
    base = config.get("base_model_name_or_path")
    if not base or not isinstance(base, str):
        raise ModelError(f"{source / 'adapter_config.json'} names no base model; name it with --base FOLDER_OR_HUB_ID")
    if not is_hub_id(base) and not Path(base).is_dir():
        where = "--base" if is_given else f"the base of the adapter {source}"
        raise ModelError(f"{where} is {base!r}, a folder that does not exist here; name the base model with --base FOLDER_OR_HUB_ID")


# Publishing


def _models(layout: Layout, model: ResolvedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> list[_Made]:
    """The models to publish. Everything that can be wrong with them is found here, before the first is published."""
    made: list[_Made] = []
    if layout.has_policy or layout.role in ("language_model", None):
        policy = load_language_model(model, dtype=torch.float32, trainable=False, dropout=True, tokenizer=tokenizer)
        made.append(_Made(name, "language_model", lambda folder: save_model(policy, tokenizer, folder)))
    if layout.role == "classifier":
        classifier = load_classifier(model, dtype=torch.float32, trainable=False, dropout=True, tokenizer=tokenizer)
        made.append(_Made(name, "classifier", lambda folder: save_model(classifier, tokenizer, folder)))
    if layout.role in HEADS:
        scalar = _scalar_model(layout, model, HEADS[layout.role])
        suffix = "" if not layout.has_policy else "-value" if layout.role == "value_model" else "-reward"
        made.append(_Made(name + suffix, layout.role, lambda folder: scalar.save(folder, tokenizer)))
    return made


def _licence(source: Path, layout: Layout, base: str | None) -> Licence | None:
    """The licence in the model card of an imported folder, or of the base that an adapter was merged into."""
    if not layout.base:
        return stated_licence("folder", str(source))
    below = base or layout.base
    return stated_licence("folder" if Path(below).is_dir() else "hub", below)


def _publish(layout: Layout, made: list[_Made], registry: Registry, licence: Licence | None, earlier: set[str]) -> list[ModelRecord]:
    """Publish all models that are new, or none of them. ``earlier``: references of the versions that exist."""
    origin: JsonObject = {"library": layout.library, "head": layout.head_name or None, "notes": layout.notes}
    if layout.base:
        origin["base"] = layout.base
    if licence is not None:
        origin["licence"] = licence
    extra: JsonObject = {"imported": origin}
    records: list[ModelRecord] = []
    try:
        for model in made:
            records.append(registry.publish(model.name, model.save, role=model.role, extra=extra, only_new=True))
    except BaseException:
        for record in (record for record in records if record.ref not in earlier):
            registry.remove(record.ref, force=True)
        raise
    return records


def _scalar_model(layout: Layout, model: ResolvedModel, kind: type[ScalarModel]) -> ScalarModel:
    if layout.head is None:  # transformers' own form, which contains score.weight
        return kind.from_pretrained(model, dtype=torch.float32, dropout=True)
    if layout.value_body:
        model = replace(as_resolved(value_folder(Path(model.path))), ref=model.ref)
    made = ValueModel.from_policy(model, dtype=torch.float32, trainable=False, dropout=True)
    if layout.head.weight.shape != made.score_head.weight.shape:
        expected, actual = list(made.score_head.weight.shape), list(layout.head.weight.shape)
        raise ModelError(f"the head {layout.head.name} has shape {actual}; the transformer's hidden states need {expected}")
    made.set_head(layout.head.weight, layout.head.bias)
    return made
