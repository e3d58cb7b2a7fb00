"""Low-rank adapters: attach a fresh one, lay a saved one on a model, choose which act, merge.

Merging a stack (models/stacks.py) from the bottom up gives whole weights. On a quantized base the adapters stay apart: merging would round
them away, and the next step would load another model than the last one trained.

Beside its low-rank updates an adapter may hold whole modules (``modules_to_save``) and rows of the embedding (``new_rows``): copies that
take the place of the base's own while the adapter acts.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from stages.config import LoraSettings, ModelInput
from stages.errors import ModelError
from stages.models.families import state_space_products
from stages.models.saved_adapters import SavedAdapter, base_of, fitted, read_adapter

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig

    from stages.registry.references import ResolvedModel

FRESH = "default"
"""Name of the adapter that a step trains, within its process."""
HEAD_FILE = "head.safetensors"
"""The full-precision scalar head that lies beside a reward or value model's adapter."""


# Adding adapters


def attach_lora(
    model: Any,
    lora: LoraSettings,
    *,
    task: str,
    base: str,
    name: str = FRESH,
    new_rows: Collection[int] = (),
    source: ResolvedModel | None = None,
) -> Any:
    """``model`` inside a PeftModel (if it is not yet in one) with a fresh adapter, an identity at first, on top of those that act.

    ``task`` is a peft task type such as ``CAUSAL_LM``, ``base`` the folder or hub id that the adapter will say it belongs to (the registry
    writes its own reference instead), ``source`` the model that it begins as, for the check of what is published. ``new_rows`` are token
    ids whose rows of the embedding and of the output layer train, too. Only the fresh adapter is trainable afterwards; its weights are
    fp32. Raises ModelError where ``lora`` does not fit the model.
    """
    from peft import LoraConfig, PeftModel, get_peft_model

    plain = plain_model(model)
    _check_names(lora, plain, task)
    alpha: Any = lora.alpha  # peft says int and divides whatever it gets by r
    # peft trains the whole head of a classifier: every module whose name ends in classifier or score. No adapter goes into it.
    head = [r".*(classifier|score)(\..*)?"] if task == "SEQ_CLS" else []
    excluded = "|".join([*head, *map(re.escape, state_space_products(plain))]) if lora.target_modules == "all-linear" else None
    config = LoraConfig(
        r=lora.r,
        lora_alpha=alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        exclude_modules=excluded or None,
        task_type=task,
        bias="none",
        modules_to_save=list(lora.modules_to_save) or None,
        trainable_token_indices=_rows_to_train(plain, lora, new_rows),
    )
    below = active_adapters(model)
    _refuse_clash(plain, "a fresh adapter", config)
    try:
        with _quiet_peft():
            if isinstance(model, PeftModel):
                model.add_adapter(name, config)
            else:
                model = get_peft_model(model, config, adapter_name=name)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ModelError(
            f"no adapter with target_modules={lora.target_modules!r} and modules_to_save={lora.modules_to_save!r} fits "
            f"{type(plain).__name__}: {error} {_linear_modules(plain)}"
        ) from error
    model.peft_config[name].base_model_name_or_path = base
    _preparewrappers_of(model, name)
    model._stages_sources = {**getattr(model, "_stages_sources", {}), name: source}
    _start_from_what_acts(model, name)
    for parameter_name, parameter in model.named_parameters():
        if is_part_of(parameter_name, name) and parameter.is_floating_point():
            parameter.data = parameter.data.float()
    activate(model, [*below, name], trainable=[name])
    return model


def add_adapter(model: Any, adapter: ResolvedModel | SavedAdapter, name: str, *, is_shared: bool = False) -> Any:
    """``model`` inside a PeftModel (if it is not yet in one) with the weights of ``adapter``, frozen, on top of those that act.

    The adapter may come from a model with another head than ``model`` has: what it adds to the transformer is the same. Of a head that
    ``model`` lacks nothing is added. ``is_shared``: other roles compute with the same base, so an adapter that changes it (trained biases,
    a whole embedding) is refused. Raises ModelError where the adapter does not fit.
    """
    from peft import PeftModel, get_peft_model, set_peft_model_state_dict

    plain, below = plain_model(model), active_adapters(model)
    saved = fitted(adapter if isinstance(adapter, SavedAdapter) else read_adapter(adapter), plain)
    if saved.config.use_dora and below:
        raise ModelError(
            f"the adapter {saved.ref!r} is a DoRA adapter on another adapter that is not merged: its magnitudes belong to the merged "
            "weights. Load the model without quantization, or export it merged and use that folder"
        )
    if is_shared and saved.changes_base:
        raise ModelError(
            f"the adapter {saved.ref!r} changes weights of its base ({saved.changes_base[0]}), and other roles compute with that base; "
            "export the model merged and use that folder"
        )
    if not saved.weights:
        return model
    _refuse_clash(plain, f"the adapter {saved.ref!r}", saved.config)
    try:
        with _quiet_peft():
            if isinstance(model, PeftModel):
                model.add_adapter(name, saved.config)
            else:
                model = get_peft_model(model, saved.config, adapter_name=name)
            _preparewrappers_of(model, name)
            report = set_peft_model_state_dict(model, saved.weights, adapter_name=name)
    except (OSError, ValueError, TypeError, RuntimeError, KeyError, AttributeError) as error:
        raise ModelError(f"the adapter {saved.ref!r} does not fit its base {type(plain).__name__}: {error}") from error
    own = {key for key, _ in model.named_parameters()}  # tied rows have two names, of which this has the first
    missing = [key for key in report.missing_keys if is_part_of(key, name) and key in own]
    if missing or report.unexpected_keys:
        wrong = f"{len(missing)} weights missing, {len(report.unexpected_keys)} unexpected, e.g. {[*missing, *report.unexpected_keys][0]}"
        raise ModelError(f"the adapter {saved.ref!r} does not fit its base {type(plain).__name__}: {wrong}")
    activate(model, [*below, name])
    return model


def source_of(model: Any, name: str) -> ResolvedModel | None:
    """The model that the adapter ``name`` of a PeftModel began as; None where ``attach_lora`` was not told."""
    return getattr(model, "_stages_sources", {}).get(name)


def _refuse_clash(plain: Any, who: str, config: Any) -> None:
    """Raise ModelError where an adapter changes a module in another way (update, whole copy, rows) than another adapter does.

    peft cannot compute two of them in one module. A stack of its own has the lower ones merged; roles that share a backbone have not.
    """
    from peft.utils.other import AuxiliaryTrainingWrapper, TrainableTokensWrapper

    def is_named(module: str, names: Any) -> bool:
        if isinstance(names, str):
            return names != "all-linear" and re.fullmatch(names, module) is not None
        return any(module == name or module.endswith(f".{name}") for name in names or ())

    whole, rows = config.modules_to_save, config.trainable_token_indices
    for name, module in plain.named_modules():
        updates = next(adapter_layers_of(module), None) is not None
        holds_rows = isinstance(module, TrainableTokensWrapper)
        holds_copy = isinstance(module, AuxiliaryTrainingWrapper) and not holds_rows
        if (
            ((holds_rows or holds_copy) and is_named(name, config.target_modules))
            or ((updates or holds_rows) and is_named(name, whole))
            or ((updates or holds_copy) and is_named(name, rows))
        ):
            raise ModelError(
                f"{who} and another adapter on the same weights both change {name}, in two ways (update, whole copy, rows) that cannot be "
                "computed together. Export the model below merged (stages models export), and name that folder"
            )


def plain_model(model: Any) -> Any:
    """The transformers model inside a PeftModel; a model without adapters as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def is_part_of(parameter: str, adapter: str) -> bool:
    """Whether the parameter of this name belongs to the adapter."""
    return adapter in parameter.split(".")


def has_output_adapter(model: Any) -> bool:
    """Whether a low-rank adapter changes the output layer of ``model``."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(plain_model(model).get_output_embeddings(), BaseTunerLayer)


def refuse_output_adapter(model: Any, lora: LoraSettings | None) -> None:
    """Raise ModelError for a low-rank adapter on the output layer, where the trainer reads that layer's own weight alone."""
    if lora is not None and has_output_adapter(model):
        name = module_name(plain_model(model), plain_model(model).get_output_embeddings()).rpartition(".")[2]
        raise ModelError(
            f"lora.target_modules={lora.target_modules!r} names the output layer {name}, whose adapter this stage cannot train (TRL reads "
            f"the layer's own weight). Leave it out, or train the layer whole: lora.modules_to_save: [{name}]"
        )


def _check_names(lora: LoraSettings, plain: Any, task: str) -> None:
    """Raise ModelError for a name of ``lora`` that no module has: it would be passed over in silence.

    A bare transformer has no output layer, so a name that only the language model has is allowed there.
    """
    names = [name for name, _ in plain.named_modules()]
    if not isinstance(lora.target_modules, str):
        ends = tuple(f".{own}" for own in lora.target_modules)
        if passed := [one for one in state_space_products(plain) if f".{one}".endswith(ends)]:
            raise ModelError(
                f"lora.target_modules reaches {passed[0]} of {type(plain).__name__}: a state-space mixer reads that weight past its layer, "
                "so an adapter on it does nothing. Use 'all-linear', which leaves it out, or name in_proj"
            )
    is_bare = task == "FEATURE_EXTRACTION"
    for field, wanted in (("target_modules", lora.target_modules), ("modules_to_save", lora.modules_to_save)):
        if isinstance(wanted, str):
            continue
        absent = [one for one in wanted if not any(name == one or name.endswith(f".{one}") for name in names)]
        heads = ("lm_head", "embed_out", "output_layer")
        if is_bare and len(absent) < len(wanted) + (field == "modules_to_save"):
            absent = [one for one in absent if one.rpartition(".")[2] not in heads]
        if absent:
            kind = type(plain).__name__
            raise ModelError(f"lora.{field} names {', '.join(absent)}, which {kind} does not have. {_linear_modules(plain)}")


def _linear_modules(plain: Any) -> str:
    from transformers.pytorch_utils import Conv1D

    adapted = {name: module for name, module in plain.named_modules() if next(adapter_layers_of(module), None) is not None}
    outside = {name: module for name, module in plain.named_modules() if not any(name.startswith(f"{layer}.") for layer in adapted)}
    linear = sorted({name.rpartition(".")[2] for name, module in outside.items() if isinstance(base_of(module), nn.Linear | Conv1D)})
    return f"Linear modules here: {', '.join(linear) or 'none'}; or use 'all-linear'"


# Rows of new tokens, and whole modules


def module_name(model: Any, wanted: Any) -> str:
    """The dotted name of a module of ``model``."""
    return next(name for name, module in model.named_modules() if module is wanted)


def is_tied(model: Any) -> bool:
    """Whether the output layer of a transformers model computes with the weights of its embedding."""
    output = model.get_output_embeddings()
    return output is not None and base_of(output).weight is base_of(model.get_input_embeddings()).weight


def _rows_to_train(plain: Any, lora: LoraSettings, new_rows: Collection[int]) -> dict[str, list[int]] | None:
    """peft's ``trainable_token_indices``: the rows by the name of their module; None where no row is to train.

    Tied weights need the embedding alone: peft lets the output layer follow it. Raises ModelError where the rows cannot be trained.
    """
    if not new_rows:
        return None
    embedding, output = plain.get_input_embeddings(), plain.get_output_embeddings()
    matrices = [embedding] if output is None or is_tied(plain) else [embedding, output]
    names = [module_name(plain, matrix) for matrix in matrices]
    saved = [name for name in names if any(name == one or name.endswith(f".{one}") for one in lora.modules_to_save)]
    advice = f"name both in lora.modules_to_save: [{', '.join(name.rpartition('.')[2] for name in names)}]"
    if saved == names and (len(names) > 1 or output is None):
        return None  # they train whole
    if output is not None and is_tied(plain):
        advice = f"leave {names[0].rpartition('.')[2]} out of lora.modules_to_save, or train without lora"
    problem = ""
    if saved:
        problem = f"{saved[0]} trains whole, and the output layer's rows would not follow it"
    elif _has_adapter(plain, embedding, lora) or (output is not None and _has_adapter(plain, output, lora)):
        problem, advice = "lora.target_modules puts an adapter on their matrix", "leave the embedding and the output layer out of it"
    elif output is not None and getattr(output, "bias", None) is not None:
        problem = "the output layer has a bias, which peft drops"
    if problem:
        raise ModelError(
            f"the tokenizer has {len(new_rows)} tokens that the model has no rows for, and with lora they cannot train: {problem}. "
            f"Next: {advice}"
        )
    return dict.fromkeys(names, sorted(new_rows))


def _has_adapter(plain: Any, module: Any, lora: LoraSettings) -> bool:
    """Whether ``lora.target_modules`` names this module."""
    name = module_name(plain, module)
    if isinstance(lora.target_modules, str):
        return lora.target_modules != "all-linear" and re.fullmatch(lora.target_modules, name) is not None
    return any(name == one or name.endswith(f".{one}") for one in lora.target_modules)


def _start_from_what_acts(model: Any, name: str) -> None:
    """Let copies in the fresh adapter ``name`` begin as what acts below it; peft copies the base's own modules."""
    for wrapper in wrappers_of(model):
        modules = getattr(wrapper, "modules_to_save", None)
        active = [other for other in wrapper.active_adapters if other != name]
        if modules is not None and name in modules and active and active[-1] in modules:
            modules[name].load_state_dict(modules[active[-1]].state_dict())


def _preparewrappers_of(model: Any, name: str) -> None:
    """Mend what peft's wrappers of whole modules and rows cannot do, after the adapter ``name`` was added.

    Whole modules of the adapter compute in the dtype of their own weights, and hand on the base's dtype: they are fp32 while they train,
    and their base may be bf16. Under autocast nothing changes. Logits stay in fp32.
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
def _rows_of_some() -> type[Any]:
    """peft's wrapper of rows, for models in which some adapters have rows and others have none; peft saves and loads rows for all."""
    from peft.utils.other import TrainableTokensWrapper

    class RowsOfSome(TrainableTokensWrapper):
        bias = None  # peft hides the layer's own, and TRL's loss reads it; an output layer that has one is refused

        def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
            return super().adapter_state_dict_load_map(adapter_name) if adapter_name in self._get_available_adapters() else {}

        def adapter_state_dict(self, adapter_name: str, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return super().adapter_state_dict(adapter_name, state_dict) if adapter_name in self._get_available_adapters() else {}

    return RowsOfSome


def _cast_inputs(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    if torch.is_autocast_enabled(next(module.parameters()).device.type):
        return inputs
    dtype = next(module.parameters()).dtype
    return tuple(one.to(dtype) if isinstance(one, torch.Tensor) and one.is_floating_point() else one for one in inputs)


def _cast_output(module: nn.Module, inputs: tuple[Any, ...], output: Any, *, dtype: torch.dtype) -> Any:
    return output.to(dtype) if isinstance(output, torch.Tensor) and output.is_floating_point() else output


# Which adapters act


def active_adapters(model: Any) -> tuple[str, ...]:
    """The adapters that act now, the lowest first; none in a model without adapters."""
    return getattr(model, "_stages_active", ())


def activate(model: Any, names: Sequence[str], *, trainable: Sequence[str] | None = None) -> None:
    """Let exactly ``names`` (the lowest first) act from now on, none for the bare base.

    ``trainable`` (None: as before) says which of all may be trained. Where several hold a copy of one module, the highest one's acts.
    """
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for layer in _adapter_layers(model):
        layer.enable_adapters(bool(names))
        if names:
            layer.set_adapter(list(names))
    for wrapper in wrappers_of(model):
        _activate_copies(wrapper, names)
    model._stages_active = tuple(names)
    # peft trains what acts and nothing else; here several roles train, and only one of them acts at a time.
    for name, parameter in model.named_parameters():
        of = next((adapter for adapter in model.peft_config if is_part_of(name, adapter)), None)
        parameter.requires_grad_(of in trainable if trainable is not None and of is not None else flags[name])


def _activate_copies(wrapper: Any, names: Sequence[str]) -> None:
    """Let a wrapper of whole modules or of rows use the copies of ``names``."""
    own = [name for name in names if name in wrapper._get_available_adapters()]
    if (tokens := getattr(wrapper, "token_adapter", None)) is not None:
        own = [name for place, name in enumerate(own) if not _is_covered(tokens, name, own[place + 1 :])]
    wrapper.set_adapter(own if tokens is not None else own[-1:])
    wrapper.enable_adapters(bool(own))


def _is_covered(tokens: Any, name: str, above: Sequence[str]) -> bool:
    """Whether higher adapters hold all rows that the adapter ``name`` does. Raises ModelError where they hold some of them."""
    rows = set(tokens.token_indices[name])
    others = {row for other in above for row in tokens.token_indices[other]}
    if rows & others and not rows <= others:
        raise ModelError("two adapters of one stack train some of the same rows of the embedding, which peft cannot compute; merge one")
    return bool(rows & others)


def _adapter_layers(model: Any) -> Iterator[Any]:
    """Modules with a low-rank update."""
    from peft.tuners.trainable_tokens import TrainableTokensLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    return (module for module in model.modules() if isinstance(module, BaseTunerLayer) and not isinstance(module, TrainableTokensLayer))


def wrappers_of(model: Any) -> list[Any]:
    """Modules that hold copies: whole modules or rows, by adapter."""
    from peft.utils.other import AuxiliaryTrainingWrapper

    return [module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]


@contextmanager
def as_it_starts(model: Any) -> Iterator[None]:
    """Inside, a model with a fresh adapter computes what it did before the adapter trained: the adapters below act, and it does not."""
    acting = active_adapters(model)
    activate(model, [name for name in acting if name != FRESH])
    try:
        yield
    finally:
        activate(model, acting)


@contextmanager
def without_copies(model: Any) -> Iterator[None]:
    """Takes out the adapters that a library adds to ``model`` inside, and lets those act that did before."""
    known, acting = set(getattr(model, "peft_config", {})), active_adapters(model)
    trainable = [name for name in acting if any(p.requires_grad for key, p in model.named_parameters() if is_part_of(key, name))]
    yield
    added = set(getattr(model, "peft_config", {})) - known
    for name in added:
        remove_adapter(model, name)
    if added:
        activate(model, acting, trainable=trainable)


def remove_adapter(model: Any, name: str) -> None:
    """Take an adapter out of a PeftModel that has others; one of them acts afterwards."""
    activate(model, [other for other in model.peft_config if other != name][-1:])  # peft deletes beside one that acts, not beside several
    model.delete_adapter(name)


@contextmanager
def _quiet_peft() -> Iterator[None]:
    """Silences by name what peft says that a user cannot act on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by a name that transformers wants to retire
        for message in (
            "fan_in_fan_out is set to",  # it sets what the layer needs
            "The PEFT config's `base_model_name_or_path` was renamed",  # the registry names bases by their digest
            "Model with `tie_word_embeddings=True` and",  # `merge` unties them
            "Model has `tie_word_embeddings=True` and",
            "Input and output embeddings are no longer tied",
        ):
            warnings.filterwarnings("ignore", message=f".*{message}")
        yield


# Merging


def merge(model: Any, *, where: Callable[[Any], bool] | None = None) -> Any:
    """The plain model that computes what a PeftModel computes: the adapters that act are added into the weights.

    An embedding that shares its weights with the output layer is untied where an adapter changes one of the two alone. ``where`` (of a base
    layer) merges those layers alone, and the result stays a PeftModel while others have an adapter.
    """
    plain = plain_model(model)
    was_tied = _untie(plain)
    with _quiet_peft():
        merged = model.merge_and_unload(safe_merge=True) if where is None else _merge_some(model, where)
    if was_tied:
        _tie_if_equal(plain_model(merged))
    return merged


def _untie(plain: Any) -> bool:
    """Give the output layer a copy of the weights that it shares with an adapted embedding; returns whether that was done."""
    output, embedding = plain.get_output_embeddings(), plain.get_input_embeddings()
    if output is None or not is_tied(plain) or (base_of(output) is output and base_of(embedding) is embedding):
        return False
    base_of(output).weight = nn.Parameter(base_of(output).weight.detach().clone(), requires_grad=False)
    return True


def _tie_if_equal(plain: Any) -> None:
    """Share the weights of embedding and output layer again where they are equal; else the config says that they are not tied."""
    output, embedding = plain.get_output_embeddings(), plain.get_input_embeddings()
    are_equal = output.weight.shape == embedding.weight.shape and torch.equal(output.weight, embedding.weight)
    for config in (plain.config, plain.config.get_text_config()):
        config.tie_word_embeddings = are_equal  # peft has set it to False on its way
    if are_equal:
        output.weight = embedding.weight
    else:
        plain.all_tied_weights_keys = {}  # what save_pretrained leaves out


def _merge_some(model: Any, where: Callable[[Any], bool]) -> Any:
    """Merge the adapted layers whose base layer ``where`` accepts; whole modules and rows take the place of the base's."""
    from peft.utils.other import AuxiliaryTrainingWrapper

    plain, acting = plain_model(model), active_adapters(model)
    chosen: dict[str, Any] = {}
    for name, module in plain.named_modules():
        if any(name.startswith(f"{outer}.") for outer in chosen):
            continue
        if isinstance(module, AuxiliaryTrainingWrapper):
            chosen[name] = module.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=None)
        elif module in list(adapter_layers_of(module)) and where(module.get_base_layer()):
            module.merge(safe_merge=True)
            chosen[name] = module.get_base_layer()
    for name, module in chosen.items():
        plain.set_submodule(name, module)
    if any(True for _ in _adapter_layers(model)):
        activate(model, acting)
        return model
    if hasattr(plain, "peft_config"):
        del plain.peft_config
    return plain


def adapter_layers_of(module: Any) -> Iterator[Any]:
    """``module`` itself where it carries low-rank updates, else nothing."""
    from peft.tuners.trainable_tokens import TrainableTokensLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    if isinstance(module, BaseTunerLayer) and not isinstance(module, TrainableTokensLayer):
        yield module


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
