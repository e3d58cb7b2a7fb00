"""Low-rank adapters and quantized backbones: attach, find the base, merge.

An adapter published by a step stands on the model that the step was given, which may be an adapter itself: loading merges from the
bottom up. So with the newest adapter switched off one always has the model that the step began with.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from stages.config import LoraSettings, ModelInput
from stages.errors import ModelError

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig

    from stages.registry import ModelRecord, Registry
    from stages.runtime import ResolvedModel

ADAPTER_CONFIG = "adapter_config.json"
HEAD_FILE = "head.safetensors"
"""The full-precision scalar head that lies beside a reward or value model's adapter."""


def is_adapter(model: ResolvedModel) -> bool:
    """Whether the model's folder (or hub repository) holds an adapter and not whole weights."""
    if model.record is not None:
        return model.record.is_adapter
    if model.kind == "hub":
        from transformers.utils import cached_file

        found = cached_file(
            model.path, ADAPTER_CONFIG, revision=model.input.revision,
            _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
        )
        return found is not None
    return (Path(model.path) / ADAPTER_CONFIG).exists()


def find_base(adapter: ResolvedModel) -> ResolvedModel:
    """The model that an adapter stands on. Raises ModelError where it does not say, RegistryError where the registry lost it."""
    from stages.registry import Registry
    from stages.runtime import ResolvedModel

    record = adapter.record
    if record is None:
        named = _read_adapter_config(adapter).get("base_model_name_or_path")
        if not named:
            raise ModelError(f"the adapter {adapter.ref!r} does not say which model it stands on (base_model_name_or_path is empty)")
        kind = "folder" if Path(named).is_dir() else "hub"
        return ResolvedModel(ref=named, kind=kind, path=named, digest="", input=ModelInput(ref=named))
    base = record.manifest["base"]
    fields = {key: base[key] for key in ("revision", "trust_remote_code") if key in base}
    source = ModelInput(ref=base["ref"], **fields)
    if base["kind"] != "registry":
        return ResolvedModel(ref=base["ref"], kind=base["kind"], path=str(base["path"]), digest=base["digest"], input=source)
    # <root>/models/<name>/<version>, where the name may hold slashes
    registry = Registry(record.folder.parents[record.name.count("/") + 2])
    found = registry.get(base["digest"])
    return ResolvedModel(ref=found.ref, kind="registry", path=str(found.path), digest=found.digest, input=source, record=found)


def _read_adapter_config(adapter: ResolvedModel) -> dict[str, Any]:
    from transformers.utils import cached_file

    path = cached_file(adapter.path, ADAPTER_CONFIG, revision=adapter.input.revision)
    return json.loads(Path(str(path)).read_text(encoding="utf-8"))


def attach_lora(model: Any, lora: LoraSettings, *, task: str, base: str) -> Any:
    """``model`` inside a PeftModel with a fresh adapter (an identity at first); ``task`` is a peft task type such as ``CAUSAL_LM``.

    ``base`` is the folder or hub id that the adapter will say it stands on (the registry writes its own reference instead).

    Only the adapter is trainable afterwards; its weights are fp32. Raises ModelError where no module matches ``target_modules``.
    """
    from peft import LoraConfig, get_peft_model

    alpha: Any = lora.alpha  # peft says int and divides whatever it gets by r
    # peft trains a classifier's head whole (everything that is called ...classifier or ...score), so the adapter has to stay off it.
    head = r".*(classifier|score)" if task == "SEQ_CLS" and lora.target_modules == "all-linear" else None
    config = LoraConfig(
        r=lora.r, lora_alpha=alpha, lora_dropout=lora.dropout, target_modules=lora.target_modules, exclude_modules=head, task_type=task,
        bias="none",
    )  # fmt: skip
    try:
        with _without_future_warnings():
            adapted = get_peft_model(model, config)
    except ValueError as error:
        linear = sorted({name.rsplit(".")[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)})
        raise ModelError(
            f"no adapter fits target_modules={lora.target_modules!r} on {type(model).__name__}: {error} "
            f"Linear modules here: {', '.join(linear) or 'none'}; or use 'all-linear'"
        ) from error
    adapted.peft_config["default"].base_model_name_or_path = base
    return adapted


def apply_adapter(base: Any, adapter: ResolvedModel) -> Any:
    """``base`` inside a PeftModel that holds the adapter's weights, frozen."""
    from peft import PeftModel

    try:
        with _without_future_warnings():
            return PeftModel.from_pretrained(base, adapter.path, revision=adapter.input.revision, is_trainable=False)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ModelError(f"the adapter {adapter.ref!r} does not fit its base {type(base).__name__}: {error}") from error


@contextmanager
def _without_future_warnings() -> Iterator[None]:
    """peft asks transformers by a name that transformers wants to retire; nothing a user could change."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def merge(model: Any) -> Any:
    """The plain model that computes what a PeftModel computes (the adapter added into the weights)."""
    return model.merge_and_unload(safe_merge=True)


def quantization_config(model: ModelInput, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """bitsandbytes settings of a model input (None: not quantized); matmuls run in ``dtype``."""
    if model.quantization == "none":
        return None
    from transformers import BitsAndBytesConfig

    if model.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=model.double_quantization,
    )


@contextmanager
def whole_weights(model: ResolvedModel) -> Iterator[str]:
    """A path with whole (unquantized, merged) weights for ``from_pretrained``: the model's own, or a temporary folder for an adapter.

    Merging before quantizing keeps a chain of adapters exact: adding one into 4-bit weights would round it away.
    """
    if not is_adapter(model):
        yield model.path
        return
    with tempfile.TemporaryDirectory(prefix="merged-") as folder:
        save_merged(model, Path(folder))
        yield folder


def save_merged(adapter: ResolvedModel, folder: Path) -> None:
    """Write an adapter merged into its base, in fp32, with its tokenizer; reward and value models keep their head and bias."""
    from stages.models import heads, loading

    tokenizer = loading.load_tokenizer(adapter)
    plain = adapter.__class__(**{**vars(adapter), "input": adapter.input.model_copy(update={"quantization": "none"})})
    role = adapter.record.role if adapter.record is not None else _guess_role(adapter)
    if role in ("reward_model", "value_model"):
        kind = heads.RewardModel if role == "reward_model" else heads.ValueModel
        kind.from_pretrained(plain, dtype=torch.float32).save(folder, tokenizer)
        return
    load = loading.load_classifier if role == "classifier" else loading.load_language_model
    model = load(plain, dtype=torch.float32, trainable=False, dropout=True)
    loading.save_model(model, tokenizer, folder)


def _guess_role(adapter: ResolvedModel) -> str:
    if (Path(adapter.path) / HEAD_FILE).exists():
        return "reward_model"
    return "classifier" if _read_adapter_config(adapter).get("task_type") == "SEQ_CLS" else "language_model"


def export_merged(record: ModelRecord, registry: Registry, folder: Path) -> None:
    """Write the registry's adapter version ``record`` as a whole model that ``from_pretrained`` reads."""
    from stages.runtime import ResolvedModel

    adapter = ResolvedModel(
        ref=record.ref, kind="registry", path=str(record.path), digest=record.digest, input=ModelInput(ref=record.ref), record=record
    )
    save_merged(adapter, folder)
