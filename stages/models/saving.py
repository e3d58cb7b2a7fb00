"""Save models as safetensors with their tokenizers, and compare the files with the models in memory."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers.utils import cached_file

from stages.models.adapters.activation import NEW_ADAPTER, lora_config
from stages.models.adapters.variants import write_as_lora
from stages.models.loading import OPTIONAL, load_classifier, load_language_model, own_router_setting
from stages.models.parts import moved_to
from stages.models.quiet import quiet_transformers
from stages.models.verification import check_saved_adapter, check_saved_weights, outputs_of, rows_for
from stages.registry.references import ResolvedModel
from stages.sampling.support import plain_model
from stages.tokens.turns import turn_end_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from stages.model_types import TransformersModel

logger = logging.getLogger(__name__)


def save_model(
    model: TransformersModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path | str,
    *,
    state_dict: dict[str, torch.Tensor] | None = None,
    rows: Sequence[Sequence[int]] | None = None,
) -> None:
    """Save ``model`` as safetensors (for a PeftModel: only the trained adapter) and its tokenizer in ``folder``.

    ``state_dict`` replaces the model's own weights if they are sharded. Without it, the saved files are read again and compared with the
    model in memory on ``rows`` of token ids (None: ids from the vocabulary; see models/verification.py). Raises ModelError if they differ.
    """
    from peft import PeftModel

    folder = Path(folder)
    if isinstance(model, PeftModel):
        # "auto" would ask the Hub about the base's vocabulary; loading resizes the base to the tokenizer instead
        with quiet_transformers():
            model.save_pretrained(str(folder), save_embedding_layers=False, state_dict=state_dict, selected_adapters=[NEW_ADAPTER])
        (folder / "README.md").unlink(missing_ok=True)
        write_as_lora(model, NEW_ADAPTER, folder)
        if str(lora_config(model, NEW_ADAPTER).task_type) == "SEQ_CLS":
            with own_router_setting(model):
                model.config.save_pretrained(folder)  # for the class names, which adapter_config.json cannot contain
    else:
        if tokenizer is not None:
            _stop_at_turn_ends(model, tokenizer)
        with quiet_transformers(), own_router_setting(model):
            model.save_pretrained(folder, state_dict=state_dict)
        _copy_processor(model, folder)
    if tokenizer is not None:
        save_tokenizer(tokenizer, folder)
    load = _loader_of(plain_model(model))
    if state_dict is not None or load is None:
        return
    device, ids = next(model.parameters()).device, rows_for(model, rows)

    def reload(saved: ResolvedModel) -> list[torch.Tensor]:
        dtype = torch.float32 if isinstance(model, PeftModel) else next(model.parameters()).dtype
        return outputs_of(moved_to(load(saved, dtype=dtype, trainable=False), device), ids)

    if isinstance(model, PeftModel):
        check_saved_adapter(model, folder, lambda: outputs_of(model, ids), reload)
    else:
        check_saved_weights(model, folder, lambda: outputs_of(model, ids), reload)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path | str) -> None:
    """Save a tokenizer so that it encodes the same tokens when it is loaded again. transformers loses ``legacy`` of LlamaTokenizer."""
    if hasattr(tokenizer, "legacy"):
        tokenizer.init_kwargs["legacy"] = tokenizer.legacy
    tokenizer.save_pretrained(folder)


PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json", "audio_preprocessor_config.json")


def _copy_processor(model: TransformersModel, folder: Path) -> None:
    """Copy the settings for images, sound and video of a model that also has the parts for them, from where it was loaded.

    Logs a warning if that folder no longer exists, or if no file could be read there (also because the Hub does not answer).
    """
    config, source = model.config, model.name_or_path
    if config.get_text_config() is config or not source or Path(source) == folder:
        return
    if Path(source).is_absolute() and not Path(source).is_dir():
        told = "%s is gone, so %s lacks the settings of its processor (%s); copy those of the model that was trained"
        logger.warning(told, source, folder, ", ".join(PROCESSOR_FILES))
        return
    version = getattr(config, "_commit_hash", None)  # of a model from the Hub
    files = {name: cached_file(source, name, revision=version, **OPTIONAL) for name in PROCESSOR_FILES}
    for name, file in files.items():
        if file is not None:
            shutil.copyfile(file, folder / name)
    if not any(files.values()):
        told = "no settings of a processor (%s) could be read from %s, so %s has none, either"
        logger.warning(told, ", ".join(PROCESSOR_FILES), source, folder)


def _stop_at_turn_ends(model: TransformersModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Add the chat template's end-of-turn token to the generation config, where other programs look for it."""
    config = getattr(model, "generation_config", None)
    if config is None:
        return
    known = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    ends = [token for token in (*known, *turn_end_ids(tokenizer)) if token is not None]
    if set(ends) != {token for token in known if token is not None}:
        config.eos_token_id = list(dict.fromkeys(ends))


def _loader_of(plain: PreTrainedModel) -> Callable[..., TransformersModel] | None:
    """The load function for this class; None for classes without a role, such as masked language models."""
    name = type(plain).__name__
    if name.endswith("ForSequenceClassification"):
        return load_classifier
    return load_language_model if name.endswith(("ForCausalLM", "LMHeadModel", "LMHead", "ForConditionalGeneration")) else None
