"""Low-rank adapters: attach a fresh one, lay a saved one on a model, choose which act, merge.

Merging a stack (models/stacks.py) from the bottom up gives whole weights. On a quantized base the adapters stay apart: merging would round
them away, and the next step would load another model than the last one trained.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from stages.config import LoraSettings, ModelInput
from stages.errors import ModelError
from stages.models.stacks import read_adapter_config

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig

    from stages.process.runtime import ResolvedModel
    from stages.registry.ledger import ModelRecord, Registry

FRESH = "default"
"""Name of the adapter that a step trains, within its process."""
HEAD_FILE = "head.safetensors"
"""The full-precision scalar head that lies beside a reward or value model's adapter."""


def attach_lora(model: Any, lora: LoraSettings, *, task: str, base: str, name: str = FRESH) -> Any:
    """``model`` inside a PeftModel (if it is not yet in one) with a fresh adapter, an identity at first, on top of those that act.

    ``task`` is a peft task type such as ``CAUSAL_LM``, ``base`` the folder or hub id that the adapter will say it stands on (the registry
    writes its own reference instead). Only the fresh adapter is trainable afterwards; its weights are fp32. Raises ModelError where no
    module matches ``target_modules``.
    """
    from peft import LoraConfig, PeftModel, get_peft_model

    alpha: Any = lora.alpha  # peft says int and divides whatever it gets by r
    # peft trains a classifier's head whole (everything that is called ...classifier or ...score), so the adapter has to stay off it.
    head = r".*(classifier|score)" if task == "SEQ_CLS" and lora.target_modules == "all-linear" else None
    config = LoraConfig(
        r=lora.r, lora_alpha=alpha, lora_dropout=lora.dropout, target_modules=lora.target_modules, exclude_modules=head, task_type=task,
        bias="none",
    )  # fmt: skip
    below = active_adapters(model) if isinstance(model, PeftModel) else ()
    try:
        with _without_future_warnings():
            if isinstance(model, PeftModel):
                model.add_adapter(name, config)
            else:
                model = get_peft_model(model, config, adapter_name=name)
    except ValueError as error:
        linear = sorted({name.rsplit(".")[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)})
        raise ModelError(
            f"no adapter fits target_modules={lora.target_modules!r} on {type(model).__name__}: {error} "
            f"Linear modules here: {', '.join(linear) or 'none'}; or use 'all-linear'"
        ) from error
    model.peft_config[name].base_model_name_or_path = base
    for parameter_name, parameter in model.named_parameters():
        if f".{name}." in parameter_name and parameter.is_floating_point():
            parameter.data = parameter.data.float()
    activate(model, [*below, name], trainable=[name])
    return model


def add_adapter(model: Any, adapter: ResolvedModel, name: str) -> Any:
    """``model`` inside a PeftModel (if it is not yet in one) with the weights of ``adapter``, frozen, on top of those that act.

    The adapter may come from a model with another head than ``model`` has: what it adds to the transformer is the same. Raises ModelError
    where it does not fit.
    """
    from peft import PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
    from peft.utils import load_peft_weights

    below = active_adapters(model) if isinstance(model, PeftModel) else ()
    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    try:
        config = PeftConfig.from_pretrained(adapter.path, revision=adapter.input.revision)
        weights = load_peft_weights(adapter.path, device="cpu", revision=adapter.input.revision)
        weights, config.target_modules = _renamed(weights, config.target_modules, plain)
        config.inference_mode = True
        config.task_type = _task_of(plain, config.task_type)
        with _without_future_warnings():
            if isinstance(model, PeftModel):
                model.add_adapter(name, config)
            else:
                model = get_peft_model(model, config, adapter_name=name)
            report = set_peft_model_state_dict(model, weights, adapter_name=name)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ModelError(f"the adapter {adapter.ref!r} does not fit its base {type(plain).__name__}: {error}") from error
    missing = [key for key in report.missing_keys if f".{name}." in key]
    if missing or report.unexpected_keys:
        wrong = f"{len(missing)} weights missing, {len(report.unexpected_keys)} unexpected, e.g. {[*missing, *report.unexpected_keys][0]}"
        raise ModelError(f"the adapter {adapter.ref!r} does not fit its base {type(plain).__name__}: {wrong}")
    activate(model, [*below, name])
    return model


def _renamed(weights: dict[str, Any], targets: Any, plain: Any) -> tuple[dict[str, Any], Any]:
    """Weights and target modules of an adapter by the names that they have in ``plain``: a model with a head has its transformer under a
    name of its own, a bare transformer has not."""
    body, before = f"{plain.base_model_prefix}.", "base_model.model."
    here = body if plain.base_model_prefix and hasattr(plain, plain.base_model_prefix) else ""
    there = body if all(name.startswith(before + body) for name in weights if "lora_" in name) else ""
    if here == there:
        return weights, targets
    renamed = {name.replace(before + there, before + here, 1): value for name, value in weights.items()}
    if isinstance(targets, str):
        return renamed, targets
    return renamed, {here + name.removeprefix(there) if "." in name else name for name in targets}


def _task_of(plain: Any, given: Any) -> Any:
    """peft's task type of a model; of a bare transformer whatever head the adapter was trained under."""
    prefix = plain.base_model_prefix
    return given if prefix and hasattr(plain, prefix) else "FEATURE_EXTRACTION"


def active_adapters(model: Any) -> tuple[str, ...]:
    """The adapters that act now."""
    layer = next(iter(_adapter_layers(model)))
    return () if layer.disable_adapters else tuple(layer.active_adapters)


def activate(model: Any, names: Sequence[str], *, trainable: Sequence[str] | None = None) -> None:
    """Let exactly ``names`` act from now on, none for the bare base. ``trainable`` (None: as before) says which of all may be trained."""
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for layer in _adapter_layers(model):
        if names:
            layer.enable_adapters(True)
            layer.set_adapter(list(names))
        else:
            layer.enable_adapters(False)
    # peft trains what acts and nothing else; here several roles train, and only one of them acts at a time.
    for name, parameter in model.named_parameters():
        of = next((adapter for adapter in model.peft_config if f".{adapter}." in name), None)
        parameter.requires_grad_(of in trainable if trainable is not None and of is not None else flags[name])


def _adapter_layers(model: Any) -> Iterator[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return (module for module in model.modules() if isinstance(module, BaseTunerLayer))


@contextmanager
def _without_future_warnings() -> Iterator[None]:
    """peft asks transformers by a name that transformers wants to retire; nothing a user could change."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def merge(model: Any) -> Any:
    """The plain model that computes what a PeftModel computes (the adapters that act added into the weights)."""
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


def save_merged(adapter: ResolvedModel, folder: Path) -> None:
    """Write an adapter merged into its base, in fp32, with its tokenizer; reward and value models keep their head and bias."""
    from stages.models import heads, loading

    tokenizer = loading.load_tokenizer(adapter)
    plain = adapter.with_quantization(ModelInput(ref=adapter.ref))
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
    return "classifier" if read_adapter_config(adapter).get("task_type") == "SEQ_CLS" else "language_model"


def export_merged(record: ModelRecord, registry: Registry, folder: Path) -> None:
    """Write the registry's adapter version ``record`` as a whole model that ``from_pretrained`` reads."""
    from stages.process.runtime import ResolvedModel

    adapter = ResolvedModel(
        ref=record.ref, kind="registry", path=str(record.path), digest=record.digest, input=ModelInput(ref=record.ref), record=record
    )
    save_merged(adapter, folder)
