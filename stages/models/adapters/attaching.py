"""Attach low-rank adapters to a model: a new one to train, or a saved one.

Besides low-rank updates, an adapter can contain full copies of modules (``modules_to_save``) and rows of the embedding (``new_rows``). They
replace those of the base while the adapter is active.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import TYPE_CHECKING, cast

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

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
    wrappers_of,
)
from stages.models.adapters.saved import SavedAdapter, base_of, fitted, is_inside, is_tied, module_of, read_adapter
from stages.models.adapters.variants import OWN_STARTS, adapted_layers, use_weights_below
from stages.models.families import unfit_products
from stages.models.layers.replacing import use_folded_adapters
from stages.models.parts import module_name
from stages.models.quantizing import QUANTIZED_LAYERS, quantization_of
from stages.sampling.support import plain_model

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from peft.utils.other import TrainableTokensWrapper
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
    _check_names(lora, plain, task)
    config = _new_config(plain, lora, task, new_rows)
    _refuse_quantized_copies(plain, "the new adapter", lora.modules_to_save)
    if lora.use_dora:
        _refuse_int8_dora(plain, "lora.use_dora adds")
    below = active_adapters(model)
    _refuse_clash(plain, "the new adapter", config)
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
            f"no adapter{f' with {chosen}' if chosen else ''} fits {type(plain).__name__}: {error} {_linear_modules(plain)}{_advice(below)}"
        ) from error
    _check_patterns(model, lora, name)
    _refuse_parameters(model, lora, name)
    _report_left_out(plain, lora)
    lora_config(model, name).base_model_name_or_path = base
    _prepare_wrappers(model, name)
    setattr(model, SOURCES, {**getattr(model, SOURCES, {}), name: source})
    _copy_active_modules(model, name)
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
    wanted, excluded = lora.target_modules, _excluded(lora.exclude_modules)
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
    modules_to_save = list(dict.fromkeys([*_names_for_peft(lora.modules_to_save, plain), *new]))
    never = [*head, *map(re.escape, [*new, *unfit_products(plain)])] if lora.target_modules == "all-linear" else []
    if lora.exclude_modules:
        never.append(_excluded(lora.exclude_modules))
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
        trainable_token_indices=_rows_to_train(plain, lora, new_rows),
    )


def _excluded(modules: str | list[str]) -> str:
    """A regular expression for the full names of the modules that ``exclude_modules`` contains."""
    if isinstance(modules, str):
        return f"(?:{modules})"
    return rf"(?:.*\.)?(?:{'|'.join(map(re.escape, modules))})" if modules else "(?!)"


def _check_patterns(model: PeftModel, lora: LoraSettings, name: str) -> None:
    """Raise ModelError for a key of rank_pattern or alpha_pattern that names no module with the adapter ``name``; peft ignores it.

    Also if a module has two numbers: peft takes the first one, but saves the keys in another order.
    """
    layers = [path for path, _ in adapted_layers(model, name)]
    for field, pattern in (("rank_pattern", lora.rank_pattern), ("alpha_pattern", lora.alpha_pattern)):
        fitting = {key: [layer for layer in layers if re.match(rf"(.*\.)?({key})$", layer)] for key in pattern}
        for key in pattern:
            if not fitting[key]:
                ends = sorted({layer.rpartition(".")[2] for layer in layers})
                raise ModelError(
                    f"lora.{field} names {key!r}, but no module with an adapter has this name. Modules with an adapter: {', '.join(ends)}"
                )
        for layer in layers:
            keys = [key for key in pattern if layer in fitting[key]]
            if len({pattern[key] for key in keys}) > 1:
                raise ModelError(
                    f"lora.{field} has several numbers for {layer}: {', '.join(f'{key!r}: {pattern[key]:g}' for key in keys)}. Change the "
                    "names such that only one fits, because adapter_config.json does not keep their order"
                )


def _refuse_parameters(model: PeftModel, lora: LoraSettings, name: str) -> None:
    """Raise ModelError for an adapter that peft makes one of a parameter (routers, experts) although that is wrong.

    It does so for excluded modules, too. On a quantized module such an adapter is saved, but cannot be loaded again.
    """
    parameters = tuple(f".{target}" for target in lora_config(model, name).target_parameters or ())
    for path, layer in adapted_layers(model, name):
        is_quantized = f".{path}.weight".endswith(parameters) and quantization_of(base_of(layer))[0] != "none"
        if is_quantized or re.fullmatch(_excluded(lora.exclude_modules), path):
            reason = "but the module is quantized" if is_quantized else "in spite of lora.exclude_modules"
            raise ModelError(
                f"peft makes the adapter of {path} of {type(plain_model(model)).__name__} one of a parameter, {reason}. "
                "Name the modules that get an adapter, without this one: lora.target_modules: [q_proj, v_proj, ...]"
            )


def _names_for_peft(names: Collection[str], plain: PreTrainedModel) -> list[str]:
    """Names for peft's ``modules_to_save``. peft also takes modules whose last part only ends with a name: input_layernorm for norm.

    A name for which it would do so is replaced by the full names of the modules. Raises ModelError if these are not enough.
    """
    modules = [module for module, _ in plain.named_modules()]
    made: list[str] = []
    for name in names:
        meant = [module for module in modules if _is_named(module, name)]
        made += [name] if len(meant) == sum(module.endswith(name) for module in modules) else meant
    if further := [module for module in modules if module.endswith(tuple(made)) and not any(_is_named(module, name) for name in names)]:
        raise ModelError(
            f"lora.modules_to_save={list(names)!r} also reaches {further[0]} of {type(plain).__name__}, because peft compares only the "
            f"ends of names. Name {further[0].rpartition('.')[2]}, too, or remove the name"
        )
    return made


def _is_named(module: str, name: str) -> bool:
    """Whether ``name`` is the module's name or its last parts."""
    return module == name or module.endswith(f".{name}")


def _drop_other_copies(model: PeftModel, name: str, saved: SavedAdapter) -> None:
    """Remove the full copies of the adapter ``name`` that peft made only because a module's name ends with that of another.

    The saved adapter has no weights of them. A bare transformer has norm where a language model has model.norm, and input_layernorm.
    """
    from peft.utils.other import ModulesToSaveWrapper

    plain, stored = plain_model(model), [f"{module_of(key)}." for key in saved.weights]
    for path, wrapper in list(plain.named_modules()):
        if not isinstance(wrapper, ModulesToSaveWrapper) or name not in wrapper.modules_to_save:
            continue
        is_meant = any(_is_named(path, one) for one in saved.config.modules_to_save or ())
        if is_meant or any(key.startswith(f"{path}.") for key in stored):
            continue
        wrapper.delete_adapter(name, None)
        if not wrapper.modules_to_save:
            plain.set_submodule(path, wrapper.original_module)


def _refuse_quantized_copies(plain: PreTrainedModel, who: str, names: Collection[str]) -> None:
    """Raise ModelError if one of the modules that ``modules_to_save`` names has quantized weights, which cannot be trained."""
    for name, module in plain.named_modules():
        if quantization_of(module)[0] != "none" and is_inside(name, names):
            raise ModelError(
                f"{who} has full weights of {name} (modules_to_save), which is quantized. Remove the module from modules_to_save, or load "
                "the model with quantization: none"
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
        _refuse_int8_dora(plain, f"the adapter {saved.ref!r} is")
    if is_shared and saved.changes_base:
        raise ModelError(
            f"the adapter {saved.ref!r} changes weights of its base ({saved.changes_base[0]}), but other roles use that base; "
            "export the model merged and use that folder"
        )
    if not saved.weights:
        return model
    _refuse_quantized_copies(plain, f"the adapter {saved.ref!r}", saved.config.modules_to_save or ())
    _refuse_clash(plain, f"the adapter {saved.ref!r}", saved.config)
    try:
        with quiet_peft():
            if isinstance(model, PeftModel):
                model.add_adapter(name, saved.config)
            else:
                model = get_peft_model(model, saved.config, adapter_name=name)
            use_weights_below(model, name, below, saved.start)
            _drop_other_copies(model, name, saved)
            _prepare_wrappers(model, name)
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


def _refuse_int8_dora(plain: PreTrainedModel, who: str) -> None:
    """Raise ModelError for a DoRA adapter on int8 layers on a CPU."""
    if any(quantization_of(module) == ("int8", "cpu") for module in plain.modules()):
        raise ModelError(f"{who} a DoRA adapter, which peft cannot compute on int8 weights on a CPU. Write quantization: nf4 or none")


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


def _refuse_clash(plain: PreTrainedModel, who: str, config: LoraConfig) -> None:
    """Raise ModelError if two adapters change one module in different ways (update, full copy, rows).

    peft cannot compute this combination. In a model's own stack the lower adapters are merged; roles that share a backbone keep them
    unmerged.
    """
    from peft.utils.other import AuxiliaryTrainingWrapper, TrainableTokensWrapper

    def is_named(module: str, names: Iterable[object] | None) -> bool:
        if isinstance(names, str):
            return names != "all-linear" and re.fullmatch(names, module) is not None
        return any(_is_named(module, str(name)) for name in names or ())

    copies, rows = config.modules_to_save, config.trainable_token_indices
    for name, module in plain.named_modules():
        updates = is_adapter_layer(module)
        holds_rows = isinstance(module, TrainableTokensWrapper)
        holds_copy = isinstance(module, AuxiliaryTrainingWrapper) and not holds_rows
        if (
            ((holds_rows or holds_copy) and is_named(name, config.target_modules))
            or ((updates or holds_rows) and is_named(name, copies))
            or ((updates or holds_copy) and is_named(name, rows))
        ):
            raise ModelError(
                f"{who} and another adapter on the same weights change {name} in different ways (update, full copy, rows), which cannot be "
                "combined. Export the lower model merged (stages models export), and use that folder"
            )


def has_output_adapter(model: TransformersModel) -> bool:
    """Whether a low-rank adapter changes the output layer of ``model``."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(plain_model(model).get_output_embeddings(), BaseTunerLayer)


def refuse_output_adapter(model: TransformersModel, lora: LoraSettings | None) -> None:
    """Raise ModelError for a low-rank adapter on the output layer if the trainer reads only that layer's own weight."""
    if lora is not None and has_output_adapter(model):
        name = module_name(plain_model(model), plain_model(model).get_output_embeddings()).rpartition(".")[2]
        raise ModelError(
            f"lora.target_modules={lora.target_modules!r} names the output layer {name}, whose adapter cannot be trained here (TRL reads "
            f"only the layer's own weight). Remove it, or train all its weights: lora.modules_to_save: [{name}]"
        )


def _check_names(lora: LoraSettings, plain: PreTrainedModel, task: str) -> None:
    """Raise ModelError for a module name in ``lora`` that does not exist; peft would ignore it silently.

    A bare transformer has no output layer, so there a name that only the language model has is allowed.
    """
    modules = list(plain.named_modules())
    names = [name for name, _ in modules]
    if not isinstance(lora.target_modules, str):
        ends = tuple(f".{own}" for own in lora.target_modules)
        excluded = _excluded(lora.exclude_modules)
        if passed := [one for one in unfit_products(plain) if f".{one}".endswith(ends) and not re.fullmatch(excluded, one)]:
            raise ModelError(
                f"lora.target_modules reaches {passed[0]} of {type(plain).__name__}: the model does not use this module as a plain linear "
                "layer (it reads the weight itself, or returns more than the product), so an adapter on it cannot work. "
                "Use 'all-linear', which excludes it, or name other modules"
            )
    is_bare, heads = task == "FEATURE_EXTRACTION", ("lm_head", "embed_out", "output_layer")
    for field, wanted in (("target_modules", lora.target_modules), ("modules_to_save", lora.modules_to_save)):
        if isinstance(wanted, str):
            continue
        absent = [one for one in wanted if not any(name == one or name.endswith(f".{one}") for name in names)]
        if is_bare and len(absent) < len(wanted) + (field == "modules_to_save"):
            absent = [one for one in absent if one.rpartition(".")[2] not in heads]
        if absent:
            kind = type(plain).__name__
            raise ModelError(f"lora.{field} names {', '.join(absent)}, which {kind} does not have. {_linear_modules(plain)}")
    adaptable = [name for name, module in modules if isinstance(base_of(module), nn.Linear | Conv1D | nn.Embedding)]
    for one in [lora.exclude_modules] if isinstance(lora.exclude_modules, str) else lora.exclude_modules:
        pattern = _excluded(lora.exclude_modules if isinstance(lora.exclude_modules, str) else [one])
        if not any(re.fullmatch(pattern, name) for name in adaptable) and not (is_bare and one.rpartition(".")[2] in heads):
            raise ModelError(
                f"lora.exclude_modules: {one!r} is no linear module and no embedding of {type(plain).__name__}, so it excludes nothing. "
                f"{_linear_modules(plain)}. To exclude all modules in a module, write a regular expression, e.g. '.*\\.mlp\\..*'"
            )


def _linear_modules(plain: PreTrainedModel) -> str:
    adapted = [name for name, module in plain.named_modules() if is_adapter_layer(module)]
    outside = {name: module for name, module in plain.named_modules() if not any(name.startswith(f"{layer}.") for layer in adapted)}
    linear = sorted({name.rpartition(".")[2] for name, module in outside.items() if isinstance(base_of(module), nn.Linear | Conv1D)})
    return f"Linear modules here: {', '.join(linear) or 'none'}; or use 'all-linear'"


# Rows of new tokens, and full copies of modules


def _rows_to_train(plain: PreTrainedModel, lora: LoraSettings, new_rows: Collection[int]) -> dict[str, list[int]] | None:
    """peft's ``trainable_token_indices``: rows by module name; None if no rows are trained.

    For tied weights the embedding is sufficient, because peft ties the output layer to it. Raises ModelError if the rows cannot be trained.
    """
    if not new_rows:
        return None
    embedding, output = plain.get_input_embeddings(), plain.get_output_embeddings()
    matrices = [embedding] if output is None or is_tied(plain) else [embedding, output]
    names = [module_name(plain, matrix) for matrix in matrices]
    saved = [name for name in names if any(name == one or name.endswith(f".{one}") for one in lora.modules_to_save)]
    advice = f"put both into lora.modules_to_save: [{', '.join(name.rpartition('.')[2] for name in names)}]"
    if saved == names and (len(names) > 1 or output is None):
        return None  # all their rows are trained
    if output is not None and is_tied(plain):
        advice = f"remove {names[0].rpartition('.')[2]} from lora.modules_to_save, or train without lora"
    problem = ""
    if saved:
        problem = f"{saved[0]} is trained as a full copy, which the tied output layer would not share"
    elif _has_adapter(plain, embedding, lora) or (output is not None and _has_adapter(plain, output, lora)):
        problem, advice = "lora.target_modules puts an adapter on their matrix", "remove the embedding and the output layer from it"
    elif output is not None and getattr(output, "bias", None) is not None:
        problem = "the output layer has a bias, which peft drops"
    if problem:
        raise ModelError(
            f"the tokenizer has {len(new_rows)} tokens without embedding rows, which cannot be trained with lora: {problem}. "
            f"To fix: {advice}"
        )
    return dict.fromkeys(names, sorted(new_rows))


def _has_adapter(plain: PreTrainedModel, module: nn.Module, lora: LoraSettings) -> bool:
    """Whether ``lora.target_modules`` includes this module."""
    name = module_name(plain, module)
    if re.fullmatch(_excluded(lora.exclude_modules), name):
        return False
    if isinstance(lora.target_modules, str):
        return lora.target_modules != "all-linear" and re.fullmatch(lora.target_modules, name) is not None
    return any(name == one or name.endswith(f".{one}") for one in lora.target_modules)


def _copy_active_modules(model: TransformersModel, name: str) -> None:
    """Initialize full copies in the new adapter ``name`` from the active adapter below it. peft copies the base's modules instead."""
    for wrapper in wrappers_of(model):
        modules = getattr(wrapper, "modules_to_save", None)
        active = [other for other in wrapper.active_adapters if other != name]
        if modules is not None and name in modules and active and active[-1] in modules:
            modules[name].load_state_dict(modules[active[-1]].state_dict())


def _prepare_wrappers(model: TransformersModel, name: str) -> None:
    """Fix peft's wrappers of full module copies and rows after adding the adapter ``name``.

    Full copies are fp32 while they are trained, but their base may be bf16. Let them compute in their own dtype and return the base's dtype
    (logits stay fp32). Under autocast nothing changes.
    """
    from peft.utils.other import TrainableTokensWrapper

    for wrapper in wrappers_of(model):
        if type(wrapper) is TrainableTokensWrapper:
            wrapper.__class__ = _rows_of_some()
        modules = getattr(wrapper, "modules_to_save", None)
        weight = next(wrapper.original_module.parameters(), None)
        if modules is None or name not in modules or weight is None or weight.dtype not in (torch.bfloat16, torch.float16):
            continue
        modules[name].register_forward_pre_hook(_cast_inputs)
        if not isinstance(modules[name], nn.Linear):
            modules[name].register_forward_hook(partial(_cast_output, dtype=weight.dtype))


@cache
def _rows_of_some() -> type[TrainableTokensWrapper]:
    """peft's row wrapper for models in which only some adapters have rows. peft itself saves and loads rows for all adapters."""
    from peft.utils.other import TrainableTokensWrapper

    class RowsOfSome(TrainableTokensWrapper):
        bias = None  # peft hides the layer's bias, which TRL's loss reads; output layers with a bias are refused

        def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
            return super().adapter_state_dict_load_map(adapter_name) if adapter_name in self._get_available_adapters() else {}

        # peft's base class of wrappers has the method without ``state_dict``
        def adapter_state_dict(self, adapter_name: str, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:  # type: ignore[override]
            return super().adapter_state_dict(adapter_name, state_dict) if adapter_name in self._get_available_adapters() else {}

    return RowsOfSome


def _cast_inputs(module: nn.Module, inputs: tuple[object, ...]) -> tuple[object, ...]:
    if torch.is_autocast_enabled(next(module.parameters()).device.type):
        return inputs
    dtype = next(module.parameters()).dtype
    return tuple(one.to(dtype) if isinstance(one, torch.Tensor) and one.is_floating_point() else one for one in inputs)


def _cast_output(module: nn.Module, inputs: tuple[object, ...], output: object, *, dtype: torch.dtype) -> object:
    return output.to(dtype) if isinstance(output, torch.Tensor) and output.is_floating_point() else output


def train_in_fp32(model: nn.Module) -> None:
    """Convert the trained weights back to fp32. TRL converts a quantized model's adapter to bf16, which would lose small updates."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype.itemsize < 4:
            parameter.data = parameter.data.float()
