"""Loading and saving of tokenizers and models: safetensors only, a pad token that is not the end token, no weights made up in silence."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from stages.config import LoraSettings, ModelInput
from stages.errors import ModelError
from stages.models.adapters import FRESH, attach_lora, plain_model, quantization_config
from stages.models.attention import attention_of
from stages.models.causality import require_causal
from stages.models.failures import explained
from stages.models.families import no_linear_layers, refuse_quantization, refuse_unfit, unquantized_modules
from stages.models.own_layers import use_own_layers
from stages.models.published import check_saved_adapter, check_saved_weights, outputs_of, rows_for
from stages.models.saved_adapters import SavedAdapter, head_size, read_adapter
from stages.models.stacking import dequantized, merged_stack, stacked_apart
from stages.models.stacks import Stack, is_adapter, stack_of, tokenizer_source, trained_on
from stages.tokens.turns import turn_end_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from stages.registry.references import ResolvedModel

logger = logging.getLogger(__name__)
_said: set[str] = set()
QUANTIZED_LAYERS = ("Linear4bit", "Linear8bitLt")


def as_resolved(model: ResolvedModel | str | Path) -> ResolvedModel:
    """A bare folder or hub id as a ``ResolvedModel``; what is resolved already stays as it is."""
    from stages.registry.references import ResolvedModel

    if isinstance(model, ResolvedModel):
        return model
    kind = "folder" if Path(model).is_dir() else "hub"
    return ResolvedModel(ref=str(model), kind=kind, path=str(model), digest="", input=ModelInput(ref=str(model)))


# Tokenizers


def load_tokenizer(model: ResolvedModel | str | Path) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a pad token that differs from its end token. The padding side is left as it is.

    An adapter that comes without a tokenizer has that of the model below it. Raises ModelError where there is no tokenizer.
    """
    from transformers import AutoTokenizer

    model = tokenizer_source(as_resolved(model))
    with explained(model, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(
            model.path, revision=model.input.revision, trust_remote_code=model.input.trust_remote_code
        )
    ensure_pad_token(tokenizer, model.ref)
    return tokenizer


def ensure_pad_token(tokenizer: PreTrainedTokenizerBase, name: str = "the tokenizer") -> None:
    """Give ``tokenizer`` a pad token where it has none, or only its end token: the unknown token, else a new ``[PAD]``.

    Padding with the end token hides real ends from the loss; a tokenizer that was saved so is mended, and a warning says it once.
    """
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    if pad is not None and pad != eos:
        return
    reason = "has no pad token" if pad is None else f"pads with its end token {tokenizer.eos_token!r}"
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id not in (eos, tokenizer.bos_token_id):
        tokenizer.pad_token = tokenizer.unk_token
    else:
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    if name not in _said:
        _said.add(name)
        logger.warning("the tokenizer of %s %s; %r pads from here on", name, reason, tokenizer.pad_token)


# Models


def config_of(model: ResolvedModel | str | Path) -> Any:
    """The config of the whole weights below a model's adapters. Raises ModelError where it cannot be read."""
    from transformers import AutoConfig

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
) -> Any:
    """A causal language model (``PreTrainedModel``, or ``PeftModel`` where ``lora`` is given) with weights of ``dtype``.

    A model that is an adapter is merged into its base first (on a quantized base it stays apart); ``lora`` then adds a new adapter on top.
    ``tokenizer``: the embedding grows where the tokenizer has more tokens than rows; with ``lora`` the new rows train, too.
    ``trainable=False`` freezes everything and sets evaluation mode; ``dropout=False`` switches dropout off (PPO needs logprobs that do not
    change from one forward pass to the next).
    """
    from transformers import AutoModelForCausalLM

    model = as_resolved(model)
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
) -> Any:
    """The transformer of a causal language model without its head (``AutoModel``); arguments as in ``load_language_model``."""
    from transformers import AutoModel

    model = as_resolved(model)
    return _finish(*_load(AutoModel, model, dtype, tokenizer, trainable, lora), model, lora, "FEATURE_EXTRACTION", trainable, dropout)


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
) -> Any:
    """An ``AutoModelForSequenceClassification`` with weights of ``dtype``.

    ``labels`` names the classes (default: the checkpoint's own). ``require_head=True`` raises ModelError where the checkpoint lacks the
    head's weights or has another number of classes; ``False`` makes a new head, for a model that is about to be trained.
    """
    from transformers import AutoModelForSequenceClassification

    model = as_resolved(model)
    options: dict[str, Any] = {}
    if labels is not None:
        options["num_labels"] = len(labels)
        options["id2label"] = dict(enumerate(labels))
        options["label2id"] = {label: index for index, label in enumerate(labels)}
    loaded = _load(AutoModelForSequenceClassification, model, dtype, tokenizer, trainable, lora, require_head=require_head, options=options)
    return _finish(*loaded, model, lora, "SEQ_CLS", trainable, dropout)


def _load(
    auto: Any,
    model: ResolvedModel,
    dtype: torch.dtype,
    tokenizer: PreTrainedTokenizerBase | None,
    trainable: bool,
    lora: LoraSettings | None,
    *,
    require_head: bool = True,
    options: dict[str, Any] | None = None,
) -> tuple[Any, Collection[int]]:
    """(``model`` in the class that ``auto`` picks, adapters merged, quantized where asked; rows added for tokens that it had none for)."""
    quantized = model.input.quantization != "none"
    if quantized and trainable and lora is None:
        raise ModelError(
            f"{model.ref!r} is loaded in {model.input.quantization}, and quantized weights cannot be trained; "
            "add `lora: {}` to the step, or set quantization: none"
        )
    if is_adapter(model):
        loaded = _stack(auto, model, dtype, require_head, options or {})
    else:
        loaded = _from_pretrained(auto, model, dtype, require_head, options or {})
    return loaded, resize_embedding(plain_model(loaded), tokenizer) if tokenizer is not None else range(0)


def _stack(auto: Any, model: ResolvedModel, dtype: torch.dtype, require_head: bool, options: dict[str, Any]) -> Any:
    """An adapter and all below it, in the class that ``auto`` picks: merged in fp32, or apart from quantized weights."""
    stack = stack_of(model)
    saved = [read_adapter(adapter) for adapter in stack.adapters]
    sizes = [vocabulary_size(load_tokenizer(adapter)) for adapter in stack.adapters]
    loaded = _base(auto, model, stack, dtype, require_head, options or _class_names(auto, stack, saved), saved)
    if model.input.quantization != "none":
        return stacked_apart(loaded, saved, sizes)
    return merged_stack(loaded, saved, sizes).to(dtype)


def _base(
    auto: Any,
    model: ResolvedModel,
    stack: Stack,
    dtype: torch.dtype,
    require_head: bool,
    options: dict[str, Any],
    saved: Sequence[SavedAdapter],
) -> Any:
    """The whole weights at the bottom of ``model``'s stack: quantized as ``model`` asks, or fp32 to merge into.

    What was trained on quantized weights is merged into those weights and not into the ones they were rounded from: nf4 weights come out
    as they were computed with, int8 ones but for the rounding of activations, which whole weights do not have.
    """
    supplied = [name for adapter in saved for name in adapter.names()]
    if model.input.quantization != "none":
        return _from_pretrained(auto, stack.base, dtype, require_head, options, supplied)
    origin = trained_on(model).model_copy(update={"attention": model.input.attention})
    loaded = _from_pretrained(auto, stack.base.with_quantization(origin), torch.float32, require_head, options, supplied)
    return dequantized(loaded) if origin.quantization != "none" else loaded


def load_base(model: ResolvedModel, *, dtype: torch.dtype, tokenizer: PreTrainedTokenizerBase) -> tuple[Any, Collection[int]]:
    """(the whole weights at the bottom of ``model``'s stack as a frozen causal language model; the rows that no adapter of it has trained).

    ``tokenizer`` is ``model``'s: the embedding grows until it fits. For roles that share one backbone.
    """
    from transformers import AutoModelForCausalLM

    stack = stack_of(model)
    loaded = _base(AutoModelForCausalLM, model, stack, dtype, True, {}, []) if stack.adapters else None
    if loaded is None:
        loaded = _from_pretrained(AutoModelForCausalLM, stack.base, dtype, True, {})
    elif model.input.quantization == "none":
        loaded = loaded.to(dtype)
    new_rows = resize_embedding(loaded, tokenizer)
    return _finish(loaded, (), model, None, "CAUSAL_LM", False, False), () if stack.adapters else new_rows


def _class_names(auto: Any, stack: Stack, saved: Sequence[SavedAdapter]) -> dict[str, Any]:
    """Options that make a classifier with the classes of the highest adapter that has a head; none for other kinds of model."""
    from transformers import AutoConfig, AutoModelForSequenceClassification
    from transformers.utils import cached_file

    if auto is not AutoModelForSequenceClassification:
        return {}
    for adapter, content in reversed(list(zip(stack.adapters, saved, strict=True))):
        place = {"revision": adapter.input.revision}
        if cached_file(adapter.path, "config.json", **place, _raise_exceptions_for_missing_entries=False) is not None:
            config = AutoConfig.from_pretrained(adapter.path, **place, trust_remote_code=adapter.input.trust_remote_code)
            return {"num_labels": config.num_labels, "id2label": config.id2label, "label2id": config.label2id}
        if (size := head_size(content)) is not None:
            return {"num_labels": size}
    return {}


def _from_pretrained(
    auto: Any, model: ResolvedModel, dtype: torch.dtype, require_head: bool, options: dict[str, Any], supplied: Collection[str] = ()
) -> Any:
    """Whole weights from a folder or the hub; ``supplied`` names weights that an adapter will bring, such as a classifier's head."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    quantization = quantization_config(model.input, dtype)
    if quantization is not None:
        options = {**options, "quantization_config": quantization, "device_map": {"": _own_device()}}
    path = model.path
    _refuse_pickle(model, path)
    code = {"revision": model.input.revision, "trust_remote_code": model.input.trust_remote_code}
    with explained(model, "model"), quiet_transformers():
        config = AutoConfig.from_pretrained(path, **code)
        if auto is not AutoModelForSequenceClassification:
            refuse_unfit(config, model.ref)
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
            ignore_mismatched_sizes=True,  # what does not fit is raised by name below
            **options,
        )
    if quantization is not None:
        _refuse_unquantized(loaded, model)
        _keep_4bit_layout(loaded)
    _refuse_missing(loaded, report, model, require_head, supplied)
    return loaded


def _refuse_unquantized(loaded: nn.Module, model: ResolvedModel) -> None:
    """Raise ModelError where bitsandbytes took none of the layers, and warn where it left most weights as they are.

    It takes plain linear layers alone. Falcon's are of a class of its own, and experts are often one tensor for all of them.
    """
    taken = sum(module.in_features * module.out_features for module in loaded.modules() if type(module).__name__ in QUANTIZED_LAYERS)
    if taken == 0:
        raise ModelError(no_linear_layers(type(loaded).__name__, model.input.quantization, model.ref))
    left = sum(parameter.numel() for parameter in loaded.parameters() if parameter.is_floating_point() and parameter.ndim > 2)
    if left > taken:
        logger.warning(
            "quantization: %s reaches %.0f %% of the large weights of %s; its experts are no linear layers and stay whole",
            model.input.quantization,
            100 * taken / (taken + left),
            model.ref,
        )


def _keep_4bit_layout(model: nn.Module) -> None:
    """On a CPU bitsandbytes repacks 4-bit weights at the first evaluation, which fails for widths that are no multiple of 32 and leaves
    weights that training cannot read; keep the layout they were loaded in.
    """
    modules: list[Any] = list(model.modules())
    for module in modules:
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _own_device() -> Any:
    """Where bitsandbytes puts this process's weights: its GPU, or the CPU."""
    from accelerate import PartialState

    return PartialState().device


def _finish(
    model: Any, new_rows: Collection[int], source: ResolvedModel, lora: LoraSettings | None, task: str, trainable: bool, dropout: bool
) -> Any:
    _check_finite(model, source)
    model.requires_grad_(trainable and lora is None)  # a merged adapter leaves its base frozen
    if lora is not None:
        model = attach_lora(model, lora, task=task, base=source.path, new_rows=new_rows, source=source)
    if not dropout:
        disable_dropout(model)
    use_own_layers(model)
    leave_out_router_loss(model)
    return model.train(trainable)


def leave_out_router_loss(model: Any) -> None:
    """Let a mixture of experts return no router logits, and compute no load-balancing loss of them.

    A forward pass here needs neither, and that loss takes no attention mask of four dimensions. TRL's SFT and DPO switch it on for their
    own training, with the coefficient of the config.
    """
    text = plain_model(model).config.get_text_config()
    if not hasattr(text, "output_router_logits"):
        return
    text.output_router_logits = False
    if not hasattr(text, "num_experts") and hasattr(text, "num_local_experts"):
        # TRL asks every config for num_experts; GraniteMoe's has the other name alone, and no alias as its siblings have.
        type(text).attribute_map = {**type(text).attribute_map, "num_experts": "num_local_experts"}


def _check_finite(model: nn.Module, source: ResolvedModel) -> None:
    """Raise ModelError where a weight is NaN or infinite: every result would be NaN, and sampling would fail far from the cause."""
    for name, parameter in model.named_parameters():
        if parameter.dtype in (torch.float32, torch.bfloat16, torch.float16) and not bool(torch.isfinite(parameter).all()):
            raise ModelError(
                f"the weight {name} of {source.ref!r} is NaN or infinite in places; take an earlier version of it, or train it again "
                "with a lower learning rate"
            )


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability in ``model`` to 0. The config keeps its values, so what is saved is as it was."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            # attention modules hand a bare float to scaled_dot_product_attention
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """The number of rows that an embedding needs for ``tokenizer``: one more than its highest token id."""
    return max(len(tokenizer), max(tokenizer.get_vocab().values(), default=-1) + 1)


def resize_embedding(model: Any, tokenizer: PreTrainedTokenizerBase) -> Collection[int]:
    """Add rows to the embedding (and the output matrix) until ``tokenizer`` fits; returns the new rows that are to be trained.

    The pad token of the config follows the tokenizer's. Its row is not to be trained: nothing ever reads or predicts it.
    """
    model.config.pad_token_id = tokenizer.pad_token_id
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    return [row for row in grow_embedding(model, vocabulary_size(tokenizer)) if row != tokenizer.pad_token_id]


def grow_embedding(model: Any, size: int) -> range:
    """Give the embedding (and the output matrix) at least ``size`` rows; returns the new ones, each the mean of the old ones.

    The mean is deterministic, and no new token stands out among the logits.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    if size <= rows:
        return range(0)
    model.resize_token_embeddings(size, mean_resizing=False)
    matrices = [model.get_input_embeddings(), model.get_output_embeddings()]
    with torch.no_grad():
        for matrix in matrices:
            if matrix is not None and matrix.weight.shape[0] == size:
                matrix.weight[rows:] = matrix.weight[:rows].mean(dim=0)
    return range(rows, size)


def save_model(
    model: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path | str,
    *,
    state_dict: dict[str, torch.Tensor] | None = None,
    rows: Sequence[Sequence[int]] | None = None,
) -> None:
    """Write ``model`` as safetensors (of a PeftModel the fresh adapter alone) and its tokenizer into ``folder``.

    ``state_dict`` stands in for the model's own weights where they are spread over processes. Without one, what was written is read again
    and compared with the model in memory on ``rows`` of token ids (None: some of the vocabulary; models/published.py says what it covers).
    Raises ModelError where they differ.
    """
    from peft import PeftModel

    folder = Path(folder)
    is_adapter_alone = isinstance(model, PeftModel)
    if is_adapter_alone:
        # "auto" would ask the hub about the base's vocabulary; loading resizes the base by the tokenizer instead
        with quiet_transformers():
            model.save_pretrained(str(folder), save_embedding_layers=False, state_dict=state_dict, selected_adapters=[FRESH])
        (folder / "README.md").unlink(missing_ok=True)
        if str(model.peft_config[FRESH].task_type) == "SEQ_CLS":
            model.config.save_pretrained(folder)  # the class names; an adapter has no place for them
    else:
        if tokenizer is not None:
            _stop_at_turn_ends(model, tokenizer)
        with quiet_transformers():
            model.save_pretrained(folder, state_dict=state_dict)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    load = _loader_of(plain_model(model))
    if state_dict is not None or load is None:
        return
    device, ids = next(model.parameters()).device, rows_for(model, rows)

    def reload(saved: ResolvedModel) -> list[torch.Tensor]:
        dtype = torch.float32 if is_adapter_alone else next(model.parameters()).dtype
        return outputs_of(load(saved, dtype=dtype, trainable=False).to(device), ids)

    check = check_saved_adapter if is_adapter_alone else check_saved_weights
    check(model, folder, lambda: outputs_of(model, ids), reload)


def _stop_at_turn_ends(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Put the token that ends a turn of the chat template into the generation config, where other programs look for it."""
    config = getattr(model, "generation_config", None)
    if config is None:
        return
    known = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    ends = [token for token in (*known, *turn_end_ids(tokenizer)) if token is not None]
    if set(ends) != {token for token in known if token is not None}:
        config.eos_token_id = list(dict.fromkeys(ends))


def _loader_of(plain: Any) -> Any:
    """What loads a model of this class; None for classes that no role has, such as one that guesses masked words."""
    name = type(plain).__name__
    if name.endswith("ForSequenceClassification"):
        return load_classifier
    return load_language_model if name.endswith(("ForCausalLM", "LMHeadModel", "LMHead")) else None


# What cannot be loaded


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
        raise ModelError(f"{model.ref!r} ({path}) holds no *.safetensors; expected a folder written by save_pretrained")


def _refuse_missing(loaded: Any, report: dict[str, Any], model: ResolvedModel, require_head: bool, supplied: Collection[str] = ()) -> None:
    """Raise ModelError where transformers filled weights with random numbers that the checkpoint does not have."""
    missing = sorted(set(report["missing_keys"]))
    wrong = sorted(str(item[0] if isinstance(item, tuple) else item) for item in report.get("mismatched_keys", ()))
    prefix = f"{loaded.base_model_prefix}."
    names = {name for name, _ in loaded.named_parameters()}
    has_prefix = any(name.startswith(prefix) for name in names)
    # Buffers are computed, and a pooler that the architecture adds is part of no causal model.
    missing = [name for name in missing if name in names]
    body = [name for name in [*missing, *wrong] if not has_prefix or name.startswith(prefix)]
    if body:
        raise ModelError(
            f"{model.ref!r} lacks weights of {type(loaded).__name__} ({_some(body)} missing or of another shape); the folder is incomplete"
        )
    head = [name for name in [*missing, *wrong] if name not in supplied]  # the transformer is whole: only these are left
    if head and require_head:
        raise ModelError(
            f"{model.ref!r} has no trained head for {type(loaded).__name__} ({_some(head)} missing or of another shape); "
            "a random head is never used in silence. Train one with a step of this recipe, or name a model that has it"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No bars for every file that is read or written, and no tables of unexpected keys: what is missing is raised instead."""
    from transformers.utils import logging as hf_logging

    bar, level = hf_logging.is_progress_bar_enabled(), hf_logging.get_verbosity()
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bar:
            hf_logging.enable_progress_bar()
