"""Adapters as saved by peft: read from a folder or the Hub, and converted to the names of the target model.

An adapter may have been trained with a different head, inside a wrapper that prefixes names, or with a target pattern. The modules that it
changes are therefore determined from the names of its weights.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from transformers.utils import cached_file

from stages.errors import ModelError
from stages.models.adapters.stacks import ADAPTER_CONFIG, read_adapter_config
from stages.models.adapters.variants import STARTS
from stages.models.quantizing import quantization_of
from stages.sampling.support import weight_of

if TYPE_CHECKING:
    from peft import LoraConfig, PeftConfig
    from transformers import PreTrainedModel

    from stages.registry.references import ResolvedModel

logger = logging.getLogger(__name__)
HEAD_FILE = "head.safetensors"
"""File of a reward or value model's fp32 scalar head, next to its adapter."""
BEFORE = "base_model.model."
"""peft's prefix of every weight name."""
TOKENS = ".token_adapter.trainable_tokens_delta"
WRAPPERS = ("_fsdp_wrapped_module.", "_orig_mod.", "_checkpoint_wrapped_module.", "module.")
"""Prefixes that FSDP, torch.compile, checkpointing and DDP leave in the names of saved weights."""


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter's config (peft's LoraConfig), and its weights by name: ``base_model.model.<module>...``.

    ``changes_base``: names of base weights that the adapter replaces, e.g. trained biases, a fully saved embedding, or the weights without
    the part with which KaSA starts. ``start``: ``init_lora_weights`` of an adapter that starts from a part of the weights
    (variants.STARTS); ``config`` then has another value.
    """

    ref: str
    config: LoraConfig
    weights: dict[str, Tensor]
    changes_base: tuple[str, ...] = ()
    start: str | None = None

    def names(self) -> list[str]:
        """The weight names in the model that was trained."""
        return [name.removeprefix(BEFORE) for name in self.weights]

    def embedding_rows(self, embedding: str) -> int | None:
        """The number of rows that the embedding with this dotted name must have; None if any number fits."""
        short = embedding.rpartition(".")[2]
        for name, value in self.weights.items():
            if module_of(name).rpartition(".")[2] != short or name.endswith(TOKENS):
                continue
            if "lora_embedding_A" in name:
                return value.shape[1]
            if name.endswith(".weight") and "lora_" not in name:
                return value.shape[0]
        return None


def read_adapter(adapter: ResolvedModel) -> SavedAdapter:
    """Read the adapter's config and weights. Raises ModelError if they are unreadable, or exist only as a pickle file."""
    from peft import PeftConfig

    def cached(name: str) -> str | None:
        return cached_file(adapter.path, name, revision=adapter.input.revision, _raise_exceptions_for_missing_entries=False)

    try:
        config = PeftConfig.from_pretrained(adapter.path, revision=adapter.input.revision)
        file = cached("adapter_model.safetensors")
        if file is None:
            pickled = cached("adapter_model.bin") is not None
            reason = "its weights are in adapter_model.bin, a pickle file that can run code" if pickled else "it has no weights"
            raise ModelError(f"cannot read the adapter {adapter.ref!r}: {reason}; save it again with peft, which writes safetensors")
        weights = load_file(file)
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise ModelError(f"cannot read the adapter {adapter.ref!r}: {str(error).strip().splitlines()[0][:300]}") from error
    _judge_unknown_fields(adapter, config)
    return SavedAdapter(adapter.ref, config, {_plain_name(name): value for name, value in weights.items()})


def _judge_unknown_fields(adapter: ResolvedModel, config: PeftConfig) -> None:
    """Raise ModelError if the adapter's config switches on something that the installed peft does not know and would ignore.

    A warning names unknown fields with a number or a text, because these may be the settings of something that is off.
    """
    known = {field.name for field in fields(config)} | {"peft_version"}
    unknown = {name: value for name, value in read_adapter_config(adapter).items() if name not in known and value}
    described = ", ".join(f"{name}={value!r}"[:80] for name, value in unknown.items())
    if any(value is True or isinstance(value, dict | list) for value in unknown.values()):
        raise ModelError(
            f"the adapter {adapter.ref!r} needs a newer peft: its {ADAPTER_CONFIG} has {described}, which the installed version does not "
            "know and would ignore, so the adapter would compute something else. Update peft, or use an adapter without this"
        )
    if unknown:
        told = "the adapter %s: the installed peft does not know %s and ignores it; a newer peft may compute another model"
        logger.warning(told, adapter.ref, described)


def _plain_name(name: str) -> str:
    """The weight's name without the parts added by wrappers and adapter names."""
    name = name.removeprefix(BEFORE)
    for wrapper in WRAPPERS:
        name = re.sub(rf"(^|\.){re.escape(wrapper)}", r"\1", name)
    name = re.sub(r"\.(lora_[A-Za-z_]+)\.(?!weight$|bias$)[^.]+(\.weight|\.bias)?$", r".\1\2", name)
    return BEFORE + name


def module_of(name: str) -> str:
    """The dotted name of the module that a weight belongs to."""
    name = name.removeprefix(BEFORE)
    if ".lora_" in name:
        return name.partition(".lora_")[0]
    return name.removesuffix(TOKENS) if name.endswith(TOKENS) else name.rpartition(".")[0].removesuffix(".base_layer")


def fitted(saved: SavedAdapter, plain: PreTrainedModel) -> SavedAdapter:
    """``saved`` with the names of ``plain``, a transformers model; frozen and without dropout.

    A model with a head has a prefix for its transformer; a bare transformer has none. Weights of a head that ``plain`` lacks are dropped.
    Raises ModelError for an adapter that is not LoRA.
    """
    if (kind := str(getattr(saved.config.peft_type, "value", saved.config.peft_type))) != "LORA":
        raise ModelError(f"the adapter {saved.ref!r} is of peft type {kind}; only LORA can be stacked and merged here")
    body = f"{plain.base_model_prefix}." if plain.base_model_prefix else ""
    task = str(saved.config.task_type or "")
    beside = _beside_transformer(plain)
    here = body if body and hasattr(plain, plain.base_model_prefix) else ""
    there = body if body and any(name.startswith(body) for name in saved.names()) else ""

    def renamed(name: str) -> str:
        if here == there or name.partition(".")[0] in beside:
            return name
        return here + name if here else name.removeprefix(there)

    modules, trained = modules_of(plain), {}
    had_head = bool(there) or task.endswith("CAUSAL_LM")
    same_head = task.endswith("CAUSAL_LM") and plain.get_output_embeddings() is not None
    weights = {}
    for name, value in saved.weights.items():
        old = name.removeprefix(BEFORE)
        if had_head and not (there and old.startswith(there)) and not same_head and module_of(old) not in modules:
            continue
        new = old if there and not old.startswith(there) else renamed(old)
        weights[BEFORE + new] = value
        if ".lora_" in old:
            trained[module_of(new)] = module_of(old)
    config = _fitted_config(saved.config, weights, plain, renamed, modules)
    for field in ("rank_pattern", "alpha_pattern"):
        setattr(config, field, {**by_module(getattr(saved.config, field), trained), **getattr(config, field)})
    start = str(config.init_lora_weights).lower()
    if start in STARTS and all(quantization_of(module)[0] == "none" for module in plain.modules()):
        # On quantized weights peft would quantize again what the start leaves over.
        config.init_lora_weights = True
        saved = replace(saved, start=start)
    return _with_changes(replace(saved, config=config, weights=weights), plain)


def by_module(pattern: dict[str, float], trained: dict[str, str]) -> dict[str, float]:
    """The numbers of rank_pattern or alpha_pattern by full names. ``trained``: module names and those that the pattern was written for."""
    from peft.utils.other import get_pattern_key

    keys = {module: get_pattern_key(list(pattern), name) for module, name in trained.items()}
    return {f"^{re.escape(module)}": pattern[key] for module, key in keys.items() if key in pattern}


def _beside_transformer(plain: PreTrainedModel) -> set[str]:
    """The names of the parts of a model with a head besides its transformer, such as lm_head. A bare transformer has none."""
    body = getattr(plain, plain.base_model_prefix, None) if plain.base_model_prefix else None
    if not isinstance(body, nn.Module):
        return set()
    return {name for name, _ in plain.named_children()} - {plain.base_model_prefix} - {name for name, _ in body.named_children()}


def modules_of(plain: PreTrainedModel) -> dict[str, nn.Module]:
    """The modules of a transformers model by their names before peft wrapped them."""
    modules: dict[str, nn.Module] = {}
    for name, module in plain.named_modules():
        modules.setdefault(re.sub(r"\.(original_module|base_layer)(?=\.|$)", "", name), module)
    return modules


def _fitted_config(
    config: LoraConfig, weights: dict[str, Tensor], plain: PreTrainedModel, renamed: Callable[[str], str], modules: dict[str, nn.Module]
) -> LoraConfig:
    config = copy.deepcopy(config)
    config.inference_mode = True
    config.lora_dropout = 0.0  # dropout is only for training
    if not _subtracts(config):
        config.init_lora_weights = True  # the saved weights replace the initial ones, some of which cannot be made on quantized weights
    config.task_type = config.task_type if plain.base_model_prefix and hasattr(plain, plain.base_model_prefix) else "FEATURE_EXTRACTION"
    targets = sorted({module_of(name) for name in weights if ".lora_" in name})
    if not config.target_parameters:
        config.target_modules = set(targets)  # type: ignore[assignment]  # peft makes a set of a list itself; its annotation lacks sets
        config.exclude_modules = None
        config.layers_to_transform = config.layers_pattern = None
    config.fan_in_fan_out = any(isinstance(base_of(modules[name]), Conv1D) for name in targets if name in modules)

    def present(names: Iterable[str]) -> list[str]:
        asked = [renamed(name) if "." in name else name for name in names]
        return [name for name in asked if any(module.endswith(name) for module in modules)]

    stored = [
        module_of(name) for name in weights if ".lora_" not in name
    ]  # an adapter of a bare transformer may name a head without weights
    copies = [name for name in present(config.modules_to_save or ()) if any(is_inside(module, [name]) for module in stored)]
    config.modules_to_save = copies or None
    if isinstance(config.trainable_token_indices, dict):
        rows = {(renamed(name) if "." in name else name): indices for name, indices in config.trainable_token_indices.items()}
        config.trainable_token_indices = {name: rows[name] for name in present(rows)} or None
    for field in ("rank_pattern", "alpha_pattern"):
        setattr(config, field, {_renamed_pattern(key, renamed): value for key, value in getattr(config, field).items()})
    return config


def _subtracts(config: LoraConfig) -> bool:
    """Whether peft subtracts the adapter's initial update from the base, also when it loads the adapter."""
    return config.kasa_config is not None or str(config.init_lora_weights).lower() in STARTS


def _renamed_pattern(pattern: str, renamed: Callable[[str], str]) -> str:
    start = "^" if pattern.startswith("^") else ""
    return start + renamed(pattern.removeprefix("^")) if "." in pattern else pattern


def _with_changes(saved: SavedAdapter, plain: PreTrainedModel) -> SavedAdapter:
    """``saved`` with ``changes_base`` set, and without base weights that equal the base's own."""
    copies, config = saved.config.modules_to_save or [], saved.config
    parameters = dict(plain.named_parameters(remove_duplicate=False))
    kept, changes = {}, []
    if _subtracts(config):
        # peft changes the base when it adds such an adapter, in the same way as before the training
        changes += sorted({f"{module_of(name)}.weight" for name in saved.weights if ".lora_" in name})
    for name, value in saved.weights.items():
        module = module_of(name)
        is_copy = is_inside(module, copies)
        if ".lora_" not in name and not name.endswith(TOKENS) and not is_copy:
            own = parameters.get(f"{module}.{name.rpartition('.')[2]}", parameters.get(f"{module}.base_layer.{name.rpartition('.')[2]}"))
            if own is not None and own.shape == value.shape and _are_equal(own.detach(), value, name):
                continue
            changes.append(name.removeprefix(BEFORE))
        kept[name] = value
    return replace(saved, weights=kept, changes_base=tuple(changes))


def _are_equal(own: Tensor, value: Tensor, name: str) -> bool:
    """Whether a saved value is the base's own. In a plan, where the base has no values, only biases count as changed."""
    return not name.endswith(".bias") if own.is_meta else torch.equal(own.cpu(), value.to(own.dtype))


def is_inside(module: str, names: Collection[str]) -> bool:
    """Whether ``modules_to_save`` names a module or one of its parents. As in peft, names are compared by suffix, without dots."""
    parts = module.split(".")
    return any(".".join(parts[:end]).endswith(name) for end in range(1, len(parts) + 1) for name in names)


def base_of(module: nn.Module) -> nn.Module:
    """The module below all peft wrappers."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    while True:
        if isinstance(module, BaseTunerLayer):
            module = module.get_base_layer()
        elif isinstance(module, AuxiliaryTrainingWrapper):
            module = module.original_module
        else:
            return module


def is_tied(model: PreTrainedModel) -> bool:
    """Whether the output layer of a transformers model shares its weights with the embedding."""
    output = model.get_output_embeddings()
    return output is not None and weight_of(base_of(output)) is weight_of(base_of(model.get_input_embeddings()))


def head_size(saved: SavedAdapter) -> int | None:
    """The number of outputs of the adapter's classification head; None if it has none."""
    for suffix in (
        "score.weight",
        "classifier.weight",
        "classifier.out_proj.weight",
        "classification_head.out_proj.weight",
        "logits_proj.weight",
    ):
        for name, value in saved.weights.items():
            if name.endswith(f".{suffix}") and value.dim() == 2:
                return value.shape[0]
    return None
