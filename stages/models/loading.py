"""Load tokenizers and models: safetensors only, a pad token that differs from the end token, no random weights without notice."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import torch
from accelerate import PartialState
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import cached_file

from stages.config import LoraSettings, ModelInput
from stages.errors import ModelError, some_of
from stages.models.adapters.applying import dequantized, merged_stack, unmerged_stack
from stages.models.adapters.attaching import NEW_MODULES, attach_lora
from stages.models.adapters.saved import SavedAdapter, head_size, read_adapter
from stages.models.adapters.stacks import Stack, is_adapter, stack_of, tokenizer_source, trained_on
from stages.models.causality import require_causal
from stages.models.classifiers.classes import order_classes
from stages.models.classifiers.inputs import allow_end_tokens
from stages.models.embeddings import resize_embedding, vocabulary_size
from stages.models.failures import explained
from stages.models.families import refuse_quantization, refuse_scalar_head, refuse_unfit, text_part, unquantized_modules
from stages.models.layers.attention import attention_of
from stages.models.layers.dropout import disable_dropout
from stages.models.layers.longrope import choose_frequencies_by_sequence
from stages.models.layers.replacing import leave_autocast, use_own_layers
from stages.models.parts import moved_to
from stages.models.quantizing import keep_4bit_layout, quantization_config, refuse_unquantized, weights_quantized_as_stored
from stages.models.quiet import quiet_transformers
from stages.models.verification import outputs_of, rows_for
from stages.registry.references import ResolvedModel
from stages.sampling.support import PASS_FAILURES, plain_model
from stages.tokens.template_arguments import set_arguments

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from stages.model_types import AutoClass, TransformersModel


logger = logging.getLogger(__name__)
OPTIONAL = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
"""Options of ``cached_file`` for a file that a model may lack."""
RARE_TEXT = "龘ⵣ"
"""Characters that a vocabulary lacks, unless it has bytes."""
_warned: set[str] = set()
ROUTER_SETTING = "own_router_setting"  # attribute of a model: ``output_router_logits`` of its config before ``leave_out_router_loss``


def as_resolved(model: ResolvedModel | str | Path) -> ResolvedModel:
    """Convert a bare folder or Hub id to a ``ResolvedModel``. A resolved model is returned unchanged."""
    if isinstance(model, ResolvedModel):
        return model
    kind = "folder" if Path(model).is_dir() else "hub"
    return ResolvedModel(ref=str(model), kind=kind, path=str(model), digest="", input=ModelInput(ref=str(model)))


# Tokenizers


def load_tokenizer(model: ResolvedModel | str | Path) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer, with a pad token that differs from its end token. The padding side is not changed.

    An adapter without a tokenizer uses the tokenizer of the model below it. The model's ``template_arguments`` become the defaults of its
    chat template. Raises ModelError if there is no tokenizer, and for arguments that the template does not use.
    """
    asked = as_resolved(model)
    model = tokenizer_source(asked)
    with explained(model, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(
            model.path,
            revision=model.input.revision,
            trust_remote_code=model.input.trust_remote_code,
            mistral_format=False,  # the tokenizer of mistral-common encodes no special tokens in texts, so none of a chat template
        )
        tokenizer(RARE_TEXT)  # raises an error without an unknown token; later a row of the data would
        if tokenizer.chat_template is None:
            tokenizer.chat_template = _processor_template(model)
    _refuse_empty_vocabulary(tokenizer, model.ref)
    ensure_pad_token(tokenizer, model.ref)
    set_arguments(tokenizer, asked.input.template_arguments, asked.ref)
    return tokenizer


def _processor_template(model: ResolvedModel) -> str | None:
    """The chat template that a model for text and images has only in the files of its processor, as older ones do; None if it has none."""
    for name in ("processor_config.json", "chat_template.json"):
        file = cached_file(model.path, name, revision=model.input.revision, **OPTIONAL)
        template: str | None = json.loads(Path(file).read_text(encoding="utf-8")).get("chat_template") if file is not None else None
        if template:
            return template
    return None


def _refuse_empty_vocabulary(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Raise ModelError for a tokenizer of special tokens only. For many families, transformers makes one if the files are missing."""
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens) - set(tokenizer.get_added_vocab()):
        raise ModelError(
            f"{name!r} has no tokenizer: its files contain no vocabulary. Copy the tokenizer's files (tokenizer.json) there from the model "
            "that was trained"
        )


def ensure_pad_token(tokenizer: PreTrainedTokenizerBase, name: str = "the tokenizer") -> None:
    """If ``tokenizer`` has no pad token, or uses its end token, set it to the unknown token or to a new ``[PAD]``.

    If the end token were the pad token, the loss would ignore real ends of texts. Logs a warning once per tokenizer.
    """
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    if pad is not None and pad != eos:
        return
    reason = "has no pad token" if pad is None else f"pads with its end token {tokenizer.eos_token!r}"
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id not in (eos, tokenizer.bos_token_id):
        tokenizer.pad_token = tokenizer.unk_token
    else:
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    if name not in _warned:
        _warned.add(name)
        logger.warning("the tokenizer of %s %s; using %r as its pad token", name, reason, tokenizer.pad_token)


# Models


def config_of(model: ResolvedModel | str | Path) -> PretrainedConfig:
    """The config of the base weights below a model's adapters. Raises ModelError if it cannot be read."""
    base = stack_of(as_resolved(model)).base
    with explained(base, "model"):
        return AutoConfig.from_pretrained(base.path, revision=base.input.revision, trust_remote_code=base.input.trust_remote_code)


def load_language_model(
    model: ResolvedModel | str | Path,
    *,
    dtype: torch.dtype,
    lora: LoraSettings | None = None,
    trainable: bool = True,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dropout: bool = False,
) -> TransformersModel:
    """Load a causal language model (``PreTrainedModel``, or ``PeftModel`` if ``lora`` is given) with weights of ``dtype``.

    If the model is an adapter, it is first merged into its base, or stays unmerged on a quantized base. ``lora`` then adds a new adapter.
    ``tokenizer``: grow the embedding if the tokenizer has more tokens than the embedding has rows; with ``lora`` the new rows are trained.
    ``trainable=False`` freezes all weights and sets evaluation mode. ``dropout=False`` disables dropout, because PPO needs
    log-probabilities that are equal in every forward pass.

    Raises ModelError for a version of the registry that predicts scores: its weights would load, but it was not trained to write texts.
    """
    model = as_resolved(model)
    if model.record is not None and model.record.role in ("reward_model", "value_model", "classifier"):
        role = model.record.role.replace("_", " ")
        raise ModelError(f"{model.ref!r} is a {role}, which predicts scores; expected a language model")
    loaded, new_rows = _load(AutoModelForCausalLM, model, dtype, tokenizer, trainable, lora)
    require_causal(loaded, model.ref)
    return _finish(loaded, new_rows, model, lora, "CAUSAL_LM", trainable, dropout)


def load_backbone(
    model: ResolvedModel | str | Path,
    *,
    dtype: torch.dtype,
    lora: LoraSettings | None = None,
    trainable: bool = True,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dropout: bool = False,
) -> TransformersModel:
    """Load the transformer of a causal language model without its head (``AutoModel``). Arguments as in ``load_language_model``."""
    model = as_resolved(model)
    loaded, new_rows = _load(AutoModel, model, dtype, tokenizer, trainable, lora)
    require_causal(loaded, model.ref)
    return _finish(loaded, new_rows, model, lora, "FEATURE_EXTRACTION", trainable, dropout)


def load_classifier(
    model: ResolvedModel | str | Path,
    *,
    dtype: torch.dtype,
    labels: Sequence[str] | None = None,
    require_head: bool = True,
    lora: LoraSettings | None = None,
    trainable: bool = True,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dropout: bool = False,
) -> TransformersModel:
    """Load an ``AutoModelForSequenceClassification`` with weights of ``dtype``.

    ``labels`` names the classes (default: the checkpoint's). If the checkpoint has the same names in another order, its head is reordered;
    other names and other numbers of classes are logged. ``require_head=True`` raises ModelError if the checkpoint has no head weights or a
    different number of classes. ``False`` creates a new head, for training. A family that cannot compute in ``dtype`` gets fp32
    weights, and a warning.
    """
    model = as_resolved(model)
    options: dict[str, object] = {}
    if labels is not None:
        options["num_labels"] = len(labels)
        options["id2label"] = dict(enumerate(labels))
        options["label2id"] = {label: index for index, label in enumerate(labels)}
    auto = AutoModelForSequenceClassification
    for used in dict.fromkeys((dtype, torch.float32)):
        loaded, rows = _load(auto, model, used, tokenizer, trainable, lora, require_head=require_head, options=options)
        if (reason := _failure(loaded)) is None:
            break
        if used != torch.float32:
            dtype_name = str(used).removeprefix("torch.")
            logger.warning("%s uses fp32: %s cannot compute in %s (%s)", model.ref, type(loaded).__name__, dtype_name, reason)
    else:
        raise ModelError(f"{model.ref!r} cannot compute the classes of a text: {reason}. Correct its config.json, or use another model")
    allow_end_tokens(plain_model(loaded))
    if labels is not None:
        order_classes(loaded, classes_of(model), labels, model.ref)
    return _finish(loaded, rows, model, lora, "SEQ_CLS", trainable, dropout)


def _failure(classifier: TransformersModel) -> str | None:
    """Why the classifier cannot compute a short text; None if it can. FNet and XLNet mix dtypes, and XMOD needs a language."""
    try:
        outputs_of(classifier, rows_for(classifier, None))
    except PASS_FAILURES as error:
        return " ".join(str(error).split())[:200]
    return None


def classes_of(model: ResolvedModel) -> list[str] | None:
    """The names of a checkpoint's classes by index: those of its highest adapter with a config, else of its base. None without a head."""
    stack = stack_of(model)
    if (names := _class_names(AutoModelForSequenceClassification, stack, []).get("id2label")) is None:
        config = config_of(model)
        if not any(name.endswith("ForSequenceClassification") for name in config.architectures or ()):
            return None
        names = config.id2label
    assert isinstance(names, dict)
    return [str(names[index]) for index in sorted(names)]


def _load(
    auto: AutoClass,
    model: ResolvedModel,
    dtype: torch.dtype,
    tokenizer: PreTrainedTokenizerBase | None,
    trainable: bool,
    lora: LoraSettings | None,
    *,
    require_head: bool = True,
    options: Mapping[str, object] | None = None,
) -> tuple[TransformersModel, Collection[int]]:
    """Return (the model in the class that ``auto`` selects, adapters merged, quantized if requested; the embedding rows added to it)."""
    quantized = model.input.quantization != "none"
    if quantized and trainable and lora is None:
        raise ModelError(
            f"{model.ref!r} is loaded in {model.input.quantization}, but quantized weights cannot be trained; "
            "add `lora: {}` to the step, or set quantization: none"
        )
    if is_adapter(model):
        loaded = _stack(auto, model, dtype, require_head, options or {})
    else:
        loaded = _from_pretrained(auto, model, dtype, require_head, options or {})
    return loaded, _resized(plain_model(loaded), tokenizer, model) if tokenizer is not None else range(0)


def _resized(loaded: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, model: ResolvedModel) -> Collection[int]:
    """Resize the embedding; returns the new rows that need training. Logs a warning about them, once per model."""
    new_rows = resize_embedding(loaded, tokenizer)
    if new_rows and (told := f"the embedding of {model.ref}") not in _warned:
        _warned.add(told)
        logger.warning(
            "%s has too few rows for its tokenizer; %d were added, each the mean of the others. If no tokens were added to this model, its "
            "tokenizer is that of another one",
            told,
            len(new_rows),
        )
    return new_rows


def _stack(
    auto: AutoClass, model: ResolvedModel, dtype: torch.dtype, require_head: bool, options: Mapping[str, object]
) -> TransformersModel:
    """Load an adapter and all models below it in the class that ``auto`` selects: merged in fp32, or unmerged on quantized weights."""
    stack = stack_of(model)
    saved = [read_adapter(adapter) for adapter in stack.adapters]
    sizes = [vocabulary_size(load_tokenizer(adapter)) for adapter in stack.adapters]
    loaded = _base(auto, model, stack, dtype, require_head, options or _class_names(auto, stack, saved), saved)
    if model.input.quantization != "none":
        return unmerged_stack(loaded, saved, sizes)
    return moved_to(merged_stack(loaded, saved, sizes), dtype)


def _base(
    auto: AutoClass,
    model: ResolvedModel,
    stack: Stack,
    dtype: torch.dtype,
    require_head: bool,
    options: Mapping[str, object],
    saved: Sequence[SavedAdapter],
) -> PreTrainedModel:
    """Load the base weights of ``model``'s stack: quantized if ``model`` requests it, or in fp32 for merging.

    Adapters trained on quantized weights are merged into the dequantized weights, not into the original ones. For nf4 these equal the
    weights used in training; for int8 they differ only by the rounding of activations, which full-precision weights do not have.
    """
    supplied = [name for adapter in saved for name in adapter.names()]
    if model.input.quantization != "none":
        return _from_pretrained(auto, stack.base, dtype, require_head, options, supplied)
    origin = trained_on(model).model_copy(update={"attention": model.input.attention})
    loaded = _from_pretrained(auto, stack.base.with_quantization(origin), torch.float32, require_head, options, supplied)
    return dequantized(loaded) if origin.quantization != "none" else loaded


def load_base(model: ResolvedModel, *, dtype: torch.dtype, tokenizer: PreTrainedTokenizerBase) -> tuple[TransformersModel, Collection[int]]:
    """Return (the base weights of ``model``'s stack as a frozen causal language model, the embedding rows that no adapter has trained).

    ``tokenizer`` is ``model``'s tokenizer; the embedding grows to fit it. Used for roles that share one backbone.
    """
    stack = stack_of(model)
    loaded = _base(AutoModelForCausalLM, model, stack, dtype, True, {}, []) if stack.adapters else None
    if loaded is None:
        loaded = _from_pretrained(AutoModelForCausalLM, stack.base, dtype, True, {})
    elif model.input.quantization == "none":
        loaded = moved_to(loaded, dtype)
    new_rows: Collection[int] = ()
    if stack.adapters:  # which have trained the new rows
        resize_embedding(loaded, tokenizer)
    else:
        new_rows = _resized(loaded, tokenizer, model)
    return _finish(loaded, (), model, None, "CAUSAL_LM", False, False), new_rows


def _class_names(auto: AutoClass, stack: Stack, saved: Sequence[SavedAdapter]) -> Mapping[str, object]:
    """Options for a classifier with the classes of the highest adapter that has a head; empty for other models.

    Without ``saved`` (the contents of the adapters), only adapters with a config.json count.
    """
    if auto is not AutoModelForSequenceClassification:
        return {}
    contents: Sequence[SavedAdapter | None] = saved or [None] * len(stack.adapters)
    for adapter, content in reversed(list(zip(stack.adapters, contents, strict=True))):
        version = {"revision": adapter.input.revision}
        if cached_file(adapter.path, "config.json", **version, _raise_exceptions_for_missing_entries=False) is not None:
            config = AutoConfig.from_pretrained(adapter.path, **version, trust_remote_code=adapter.input.trust_remote_code)
            return {"num_labels": config.num_labels, "id2label": config.id2label, "label2id": config.label2id}
        if content is not None and (size := head_size(content)) is not None:
            return {"num_labels": size}
    return {}


def _from_pretrained(
    auto: AutoClass,
    model: ResolvedModel,
    dtype: torch.dtype,
    require_head: bool,
    options: Mapping[str, object],
    supplied: Collection[str] = (),
) -> PreTrainedModel:
    """Load full weights from a folder or the Hub. ``supplied``: names of weights that an adapter will provide, e.g. a classifier head."""
    quantization = quantization_config(model.input, dtype)
    if quantization is not None:
        options = {**options, "quantization_config": quantization, "device_map": {"": _own_device()}}
    path = model.path
    _refuse_pickle(model, path)
    code = {"revision": model.input.revision, "trust_remote_code": model.input.trust_remote_code}
    with explained(model, "model"), quiet_transformers(), weights_quantized_as_stored():
        config = AutoConfig.from_pretrained(path, **code)
        if auto is not AutoModelForSequenceClassification:
            refuse_unfit(config, model.ref)
        if auto is AutoModel:
            refuse_scalar_head(config, model.ref)
        if getattr(config, "attention_type", None) == "block_sparse":
            logger.warning("%s computes with full attention: BigBird itself changes to it for good at the first short text", model.ref)
            options = {**options, "attention_type": "original_full"}
        if quantization is not None:
            refuse_quantization(config, model.input.quantization, model.ref)
            quantization.llm_int8_skip_modules = unquantized_modules(auto, config)
        loaded, report = auto.from_pretrained(
            path,
            dtype=dtype,
            use_safetensors=True,
            attn_implementation=attention_of(auto, config, model.input, dtype),
            **code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # mismatches raise an error with their names below
            **options,
        )
    if quantization is not None:
        refuse_unquantized(loaded, model)
        keep_4bit_layout(loaded, dtype)
    new = _refuse_missing(loaded, report, model, require_head, supplied, by_config="num_labels" not in options)
    if auto is AutoModelForSequenceClassification:
        leave_autocast(loaded)
    elif text_part(config) is not None:
        _say_text_only(loaded, model)
    setattr(loaded, NEW_MODULES, sorted({name.rpartition(".")[0] for name in new}))
    return loaded


def _say_text_only(loaded: PreTrainedModel, model: ResolvedModel) -> None:
    """Log that only the text part of a model for several inputs is loaded."""
    kind = type(loaded).__name__
    if not kind.endswith("ForCausalLM"):
        return  # all of it is loaded
    logger.warning("%s: only its text part is loaded (%s). What is trained and published has no images, sound or video", model.ref, kind)


def _own_device() -> torch.device:
    """The device for this process's quantized weights: its GPU, or the CPU."""
    return PartialState().device


def _finish(
    model: TransformersModel,
    new_rows: Collection[int],
    source: ResolvedModel,
    lora: LoraSettings | None,
    task: str,
    trainable: bool,
    dropout: bool,
) -> TransformersModel:
    _check_finite(model, source)
    model.requires_grad_(trainable and lora is None)  # merging an adapter leaves the base frozen
    if lora is not None:
        model = attach_lora(model, lora, task=task, base=source.path, new_rows=new_rows, source=source)
    if not dropout:
        disable_dropout(model)
    use_own_layers(model)
    choose_frequencies_by_sequence(model)
    leave_out_router_loss(model)
    return model.train(trainable)


def leave_out_router_loss(model: TransformersModel) -> None:
    """Disable router logits, and the load-balancing loss computed from them, in a mixture-of-experts model.

    Forward passes here need neither, and that loss does not support 4-dimensional attention masks. TRL's SFT and DPO enable it for their
    own training, with the config's coefficient. ``own_router_setting`` restores the setting for saving.
    """
    plain = plain_model(model)
    text = plain.config.get_text_config()
    if not hasattr(text, "output_router_logits"):
        return
    setattr(plain, ROUTER_SETTING, text.output_router_logits)
    text.output_router_logits = False
    if not hasattr(text, "num_experts") and hasattr(text, "num_local_experts"):
        # TRL reads num_experts from every config. GraniteMoe's config only has num_local_experts and no alias.
        type(text).attribute_map = {**type(text).attribute_map, "num_experts": "num_local_experts"}


@contextmanager
def own_router_setting(model: TransformersModel) -> Iterator[None]:
    """Context manager in which the config of ``model`` has the ``output_router_logits`` of the model that was loaded."""
    plain = plain_model(model)
    text, own = plain.config.get_text_config(), getattr(plain, ROUTER_SETTING, None)
    if own is None:
        yield
        return
    used, text.output_router_logits = text.output_router_logits, own
    try:
        yield
    finally:
        text.output_router_logits = used


def _check_finite(model: nn.Module, source: ResolvedModel) -> None:
    """Raise ModelError if a weight is NaN or infinite. Otherwise all results would be NaN, and sampling would fail far from the cause."""
    for name, parameter in model.named_parameters():
        if parameter.dtype in (torch.float32, torch.bfloat16, torch.float16) and not bool(torch.isfinite(parameter).all()):
            raise ModelError(
                f"the weight {name} of {source.ref!r} contains NaN or infinity; use an earlier version of it, or train it again "
                "with a lower learning rate"
            )


# Refused models


class LoadReport(TypedDict, total=False):
    """The report of ``from_pretrained`` about the weights with ``output_loading_info``."""

    missing_keys: Collection[str]
    mismatched_keys: Collection[str | tuple[str, torch.Size, torch.Size]]


def _refuse_pickle(model: ResolvedModel, path: str) -> None:
    folder = Path(path)
    if not folder.is_dir():
        return
    if not any(folder.glob("*.safetensors")):
        pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
        if pickled:
            raise ModelError(
                f"{model.ref!r} has its weights only as {', '.join(pickled)}: pickle files can run code when they are read. "
                "Save the model again with save_pretrained, which writes safetensors"
            )
        raise ModelError(f"{model.ref!r} ({path}) contains no *.safetensors; expected a folder written by save_pretrained")


def _refuse_missing(
    loaded: PreTrainedModel,
    report: LoadReport,
    model: ResolvedModel,
    require_head: bool,
    supplied: Collection[str] = (),
    *,
    by_config: bool = True,
) -> list[str]:
    """Raise ModelError if the checkpoint lacks weights that transformers then initialized randomly.

    ``by_config``: whether the number of classes is that of the model's config. Returns the names of the random weights of a head that may
    be new (``require_head=False``). A pooler belongs to the head: checkpoints
    of masked language models have none.
    """
    missing = sorted(set(report["missing_keys"]))
    shapes = {item[0]: item[1:] for item in report.get("mismatched_keys", ()) if isinstance(item, tuple)}
    wrong = sorted({*shapes, *(item for item in report.get("mismatched_keys", ()) if isinstance(item, str))})
    prefix = f"{loaded.base_model_prefix}."
    names = {name for name, _ in loaded.named_parameters()}
    has_prefix = any(name.startswith(prefix) for name in names)
    # Buffers are computed, and nothing reads a pooler of a transformer without a head.
    missing = [name for name in missing if name in names and (has_prefix or "pooler" not in name.split("."))]
    body = [name for name in [*missing, *wrong] if not has_prefix or (name.startswith(prefix) and "pooler" not in name.split("."))]
    if body:
        raise ModelError(
            f"{model.ref!r} lacks weights of {type(loaded).__name__} ({some_of(body)} missing or of another shape); the folder is "
            "incomplete"
        )
    head = [name for name in [*missing, *wrong] if name not in supplied]  # the transformer is complete, so these belong to the head
    if head and require_head and loaded.get_output_embeddings() is not None:
        saved = ", ".join(loaded.config.architectures or ()) or "another class"
        raise ModelError(
            f"{model.ref!r} was saved as {saved}, without the output layer of a language model ({some_of(head)} missing or with a "
            "different shape). Use a language model"
        )
    if require_head and by_config and any(name in shapes for name in head):
        name = next(name for name in head if name in shapes)
        stored, expected = (list(shape) for shape in shapes[name])
        raise ModelError(
            f"the head of {model.ref!r} does not fit its config: {name} has shape {stored}, but {expected} with the number of classes in "
            "config.json. Correct id2label there, with one name for each class"
        )
    if head and require_head:
        raise ModelError(
            f"{model.ref!r} has no trained head for {type(loaded).__name__} ({some_of(head)} missing or with a different shape); "
            "a random head would give meaningless scores. Train one with a step of this recipe, or use a model that has one"
        )
    return head
