"""Attach low-rank adapters to a model: a new one to train, or a saved one.

Besides low-rank updates, an adapter can contain full copies of modules (``modules_to_save``) and rows of the embedding (``new_rows``). They
replace those of the base while the adapter is active.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from stages.config import LoraSettings
from stages.errors import ModelError, is_out_of_memory
from stages.models.adapters.activation import (
    NEW_ADAPTER,
    activate,
    active_adapters,
    is_adapter_layer,
    is_part_of,
    lora_config,
    quiet_peft,
)
from stages.models.adapters.checks import (
    check_names,
    check_patterns,
    excluded_names,
    linear_modules,
    refuse_clash,
    refuse_int8_dora,
    refuse_parameters,
    refuse_quantized_copies,
)
from stages.models.adapters.copies import copy_active_modules, drop_other_copies, names_for_peft, prepare_wrappers, rows_to_train
from stages.models.adapters.saved import SavedAdapter, fitted, read_adapter
from stages.models.adapters.variants import OWN_STARTS, use_weights_below
from stages.models.families import unfit_products
from stages.models.layers.replacing import use_folded_adapters
from stages.models.quantizing import QUANTIZED_LAYERS
from stages.sampling.support import plain_model

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from torch.nn.modules.module import _IncompatibleKeys
    from transformers import PreTrainedModel

    from stages.model_types import TransformersModel
    from stages.registry.references import ResolvedModel


logger = logging.getLogger(__name__)
_warned: set[str] = set()
SOURCES = "_stages_sources"
"""Attribute of a PeftModel: the initial model of each adapter."""
NEW_MODULES = "_stages_new_modules"
"""Attribute of a loaded model: the names of the modules with random weights, such as a new classification head."""


def attach_lora(
    model: TransformersModel,
    lora: LoraSettings,
    *,
    task: str,
    base: str,
    name: str = NEW_ADAPTER,
    new_rows: Collection[int] = (),
    source: ResolvedModel | None = None,
) -> PeftModel:
    """Add a new adapter on top of the active ones. Wraps ``model`` in a PeftModel if necessary. The new adapter starts as the identity.

    ``task`` is a peft task type such as ``CAUSAL_LM``. ``base`` is the folder or Hub id to record as the adapter's base (the registry
    replaces it by its own reference). ``source`` is the initial model, for the check before publishing. ``new_rows`` are token ids whose
    rows of embedding and output layer are also trained. Afterwards only the new adapter is trainable; its weights are fp32. Raises
    ModelError if ``lora`` does not fit the model.
    """
    from peft import PeftModel, get_peft_model

    plain = plain_model(model)
    check_names(lora, plain, task)
    config = _new_config(plain, lora, task, new_rows)
    refuse_quantized_copies(plain, "the new adapter", lora.modules_to_save)
    if lora.use_dora:
        refuse_int8_dora(plain, "lora.use_dora adds")
    below = active_adapters(model)
    refuse_clash(plain, "the new adapter", config)
    try:
        with quiet_peft():
            if isinstance(model, PeftModel):
                model.add_adapter(name, config)
            else:
                model = get_peft_model(model, config, adapter_name=name)
            use_weights_below(model, name, below, lora.init_lora_weights if lora.init_lora_weights in OWN_STARTS else None)
    except (ValueError, TypeError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        settings = lora.model_dump(exclude_defaults=True, exclude={"r", "alpha", "dropout"})
        chosen = ", ".join(f"{field}={value!r}" for field, value in settings.items())
        raise ModelError(
            f"no adapter{f' with {chosen}' if chosen else ''} fits {type(plain).__name__}: {error} {linear_modules(plain)}{_advice(below)}"
        ) from error
    check_patterns(model, lora, name)
    refuse_parameters(model, lora, name)
    _report_left_out(plain, lora)
    lora_config(model, name).base_model_name_or_path = base
    prepare_wrappers(model, name)
    setattr(model, SOURCES, {**getattr(model, SOURCES, {}), name: source})
    copy_active_modules(model, name)
    for parameter_name, parameter in model.named_parameters():
        if is_part_of(parameter_name, name) and parameter.is_floating_point():
            parameter.data = parameter.data.float()
    activate(model, [*below, name], trainable=[name])
    use_folded_adapters(model)
    return model


def _report_left_out(plain: PreTrainedModel, lora: LoraSettings) -> None:
    """Warn if peft put a new adapter on tensors of experts instead of other modules of the same names (shared experts)."""
    from peft.tuners.lora.layer import ParamWrapper

    if not any(isinstance(module, ParamWrapper) for module in plain.modules()):
        return
    output, skipped = plain.get_output_embeddings(), set(unfit_products(plain))
    wanted, excluded = lora.target_modules, excluded_names(lora.exclude_modules)
    named = ".*" if wanted == "all-linear" else wanted if isinstance(wanted, str) else rf"(?:.*\.)?(?:{'|'.join(map(re.escape, wanted))})"
    left = [
        own
        for own, module in plain.named_modules()
        if type(module).__name__ in ("Linear", *QUANTIZED_LAYERS) and not is_adapter_layer(module) and module is not output
        if re.fullmatch(named, own)
        and own not in skipped
        and not re.fullmatch(excluded, own)
        and ".lora_" not in own
        and not own.endswith(".base_layer")
    ]
    if left and (message := f"{len(left)} {left[0]} {type(plain).__name__}") not in _warned:
        _warned.add(message)
        logger.warning(
            "lora.target_modules=%r: peft adapts the experts of %s, and leaves %d linear modules with the same names without an "
            "adapter, e.g. %s",
            wanted,
            type(plain).__name__,
            len(left),
            left[0],
        )


def _new_config(plain: PreTrainedModel, lora: LoraSettings, task: str, new_rows: Collection[int]) -> LoraConfig:
    """The config of a new adapter on ``plain``. Arguments as in ``attach_lora``."""
    from peft import LoraConfig

    # peft trains the full head of a classifier: every module whose name ends in classifier or score. It gets no adapter. Other modules with
    # random weights (the pooler of DeBERTa, the head of XLNet or BART) are trained and saved in the same way.
    head = [r".*(classifier|score)(\..*)?"] if task == "SEQ_CLS" else []
    new = [name for name in getattr(plain, NEW_MODULES, ()) if task == "SEQ_CLS" and not re.fullmatch(head[0], name)]
    modules_to_save = list(dict.fromkeys([*names_for_peft(lora.modules_to_save, plain), *new]))
    never = [*head, *map(re.escape, [*new, *unfit_products(plain)])] if lora.target_modules == "all-linear" else []
    if lora.exclude_modules:
        never.append(excluded_names(lora.exclude_modules))
    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # peft's annotation is int, but it accepts floats
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        exclude_modules="|".join(never) or None,
        rank_pattern=dict(lora.rank_pattern),
        alpha_pattern=dict(lora.alpha_pattern),
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        init_lora_weights=True if lora.init_lora_weights in OWN_STARTS else lora.init_lora_weights,
        task_type=task,
        bias="none",
        modules_to_save=modules_to_save or None,
        trainable_token_indices=rows_to_train(plain, lora, new_rows),
    )


def add_adapter(
    model: TransformersModel, adapter: ResolvedModel | SavedAdapter, name: str, *, is_shared: bool = False
) -> TransformersModel:
    """Load ``adapter`` frozen on top of the active ones. Wraps ``model`` in a PeftModel if necessary.

    The adapter may come from a model with a different head, because its effect on the transformer is the same. Weights for a head that
    ``model`` lacks are ignored. ``is_shared``: other roles use the same base, so an adapter that changes base weights (trained biases, a
    full embedding) is refused. Raises ModelError if the adapter does not fit.
    """
    from peft import PeftModel, get_peft_model, set_peft_model_state_dict

    plain, below = plain_model(model), active_adapters(model)
    saved = fitted(adapter if isinstance(adapter, SavedAdapter) else read_adapter(adapter), plain)
    if saved.config.use_dora:
        refuse_int8_dora(plain, f"the adapter {saved.ref!r} is")
    if is_shared and saved.changes_base:
        raise ModelError(
            f"the adapter {saved.ref!r} changes weights of its base ({saved.changes_base[0]}), but other roles use that base; "
            "export the model merged and use that folder"
        )
    if not saved.weights:
        return model
    refuse_quantized_copies(plain, f"the adapter {saved.ref!r}", saved.config.modules_to_save or ())
    refuse_clash(plain, f"the adapter {saved.ref!r}", saved.config)
    try:
        with quiet_peft():
            if isinstance(model, PeftModel):
                model.add_adapter(name, saved.config)
            else:
                model = get_peft_model(model, saved.config, adapter_name=name)
            use_weights_below(model, name, below, saved.start)
            drop_other_copies(model, name, saved)
            prepare_wrappers(model, name)
            with _names_unconverted(when=_has_names(model, name, saved.weights)):
                # peft's own annotation is the function namedtuple, which is no type.
                report = cast("_IncompatibleKeys", set_peft_model_state_dict(model, saved.weights, adapter_name=name))
    except (OSError, ValueError, TypeError, RuntimeError, KeyError, AttributeError) as error:
        if is_out_of_memory(error):
            raise
        problem = f"{str(error).rstrip('.')}{_advice(below)}"
        raise ModelError(f"the adapter {saved.ref!r} does not fit its base {type(plain).__name__}: {problem}") from error
    own = {key for key, _ in model.named_parameters()}  # tied rows have two names; named_parameters() yields the first
    missing = [key for key in report.missing_keys if is_part_of(key, name) and key in own]
    if missing or report.unexpected_keys:
        wrong = f"{len(missing)} weights missing, {len(report.unexpected_keys)} unexpected, e.g. {[*missing, *report.unexpected_keys][0]}"
        raise ModelError(f"the adapter {saved.ref!r} does not fit its base {type(plain).__name__}: {wrong}")
    activate(model, [*below, name])
    use_folded_adapters(model)
    return model


def _has_names(model: PeftModel, name: str, weights: Iterable[str]) -> bool:
    """Whether the low-rank ``weights`` of a saved adapter have the names of the adapter ``name`` of ``model``."""
    own = {".".join(part for part in key.split(".") if part != name) for key, _ in model.named_parameters() if is_part_of(key, name)}
    return all(key in own for key in weights if ".lora_" in key)


@contextmanager
def _names_unconverted(*, when: bool) -> Iterator[None]:
    """Context manager in which peft takes the names of saved weights as they are.

    peft converts them from the names in older versions of transformers. Some current names do not survive it, such as those of Laguna's
    shared experts.
    """
    from peft.utils import transformers_weight_conversion as conversion

    own = conversion.convert_peft_adapter_state_dict_for_transformers

    def unconverted(*, adapter_state_dict: dict[str, torch.Tensor], **_: object) -> dict[str, torch.Tensor]:
        return adapter_state_dict

    if when:
        conversion.convert_peft_adapter_state_dict_for_transformers = unconverted  # type: ignore[assignment]  # called with keywords only
    try:
        yield
    finally:
        conversion.convert_peft_adapter_state_dict_for_transformers = own


def source_of(model: TransformersModel, name: str) -> ResolvedModel | None:
    """The initial model of the PeftModel's adapter ``name``; None if ``attach_lora`` did not get it."""
    return getattr(model, SOURCES, {}).get(name)


def _advice(below: Collection[str]) -> str:
    """What to do if peft cannot add an adapter, which may be because of those ``below``."""
    return ". If the adapters below prevent it, export that model merged (stages models export), and use that folder" if below else ""


def train_in_fp32(model: nn.Module) -> None:
    """Convert the trained weights back to fp32. TRL converts a quantized model's adapter to bf16, which would lose small updates."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype.itemsize < 4:
            parameter.data = parameter.data.float()
