"""The maximum input length of a model: the smaller limit of its position embeddings and its tokenizer."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

NAMES = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_sequence_length",
    "max_seq_length",
    "seq_length",
    "n_ctx",
    "context_length",
    "model_max_length",
)
"""Config fields for the number of positions. The first one present is used."""

SKIP_TO_PAD = frozenset(
    {
        "camembert",
        "data2vec-text",
        "esm",
        "ibert",
        "layoutlmv3",
        "lilt",
        "longformer",
        "luke",
        "markuplm",
        "roberta",
        "roberta-prelayernorm",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xmod",
    }
)
"""Model types with positions that start at ``pad_token_id + 1``; earlier rows are unused."""

SKIP_TWO = frozenset({"mpnet"})
"""Model types with positions that start at 2, independent of the pad token."""

WITHOUT_LIMIT = frozenset({"bloom", "falcon_mamba", "funnel", "mamba", "mamba2", "mt5", "recurrent_gemma", "t5", "umt5", "xlnet", "xlstm"})
"""Model types without a length limit: ALiBi, relative positions, or a recurrent state."""

TOKENIZER_SENTINEL = 10**9
"""A tokenizer without ``model_max_length`` reports 1e30. Values above this number are not limits."""


def readable_length(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase | None = None) -> int | None:
    """The maximum sequence length, in tokens including special ones, that the model and its tokenizer both support.

    None if neither has a limit, e.g. a Mamba or ALiBi model whose tokenizer has none. For rotary embeddings it is the length in the config,
    although such a model could compute beyond it. For learned embeddings it is the number of usable rows, which in the RoBERTa family is
    less than the total.
    """
    limits = [limit for limit in (model_length(config), tokenizer_length(tokenizer)) if limit is not None]
    return min(limits, default=None)


def row_length(asked: int | None, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase | None, *, unlimited: int) -> int:
    """The maximum row length of a step: ``asked`` (max_length of its recipe), but at most what model and tokenizer support.

    Without ``asked`` it is the supported length, or ``unlimited`` if there is no limit. Logs a warning if ``asked`` is lowered.
    """
    readable = readable_length(config, tokenizer)
    if asked is None or readable is None:
        return asked or readable or unlimited
    if asked > readable:
        logger.warning("max_length=%d: lowered to %d, the limit of model and tokenizer", asked, readable)
    return min(asked, readable)


def model_length(config: PretrainedConfig | SimpleNamespace) -> int | None:
    """The maximum length that the model's positions allow; None if unlimited. A multimodal config is reduced to its text config."""
    text = _text_config(config)
    kind = getattr(text, "model_type", "")
    if kind in WITHOUT_LIMIT or (kind == "falcon" and getattr(text, "alibi", False)):
        return None
    named = next((value for value in (_positive(text, name) for name in NAMES) if value is not None), None)
    if named is None:
        return None
    return max(1, _extended(text, named) - _skipped_rows(text, kind))


def frequency_switch(config: PretrainedConfig) -> int | None:
    """The length in tokens beyond which a longrope model uses other frequencies for all tokens of a sequence; None for other models."""
    rope = getattr(_text_config(config), "rope_parameters", None)
    candidates = [rope, *rope.values()] if isinstance(rope, dict) else []  # some families have parameters for each type of layer
    longropes = [item for item in candidates if isinstance(item, dict) and item.get("rope_type") == "longrope"]
    return min((int(item["original_max_position_embeddings"]) for item in longropes), default=None)


def tokenizer_length(tokenizer: PreTrainedTokenizerBase | None) -> int | None:
    """The tokenizer's ``model_max_length``; None if it is not set."""
    limit = getattr(tokenizer, "model_max_length", None)
    return int(limit) if limit is not None and 0 < limit < TOKENIZER_SENTINEL else None


def _text_config(config: object) -> object:
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _positive(config: object, name: str) -> int | None:
    """A positive integer field of the config. XLNet's -1 and a missing field give None."""
    value = getattr(config, name, None)
    return value if isinstance(value, int) and value > 0 else None


def _extended(config: object, positions: int) -> int:
    """Positions with YaRN: Qwen2.5 configs keep ``max_position_embeddings`` and add a factor on the original length."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if not isinstance(rope, dict):
        return positions
    factor, original = rope.get("factor"), rope.get("original_max_position_embeddings")
    if rope.get("rope_type", rope.get("type")) != "yarn" or not factor or not original:
        return positions
    return max(positions, int(factor * original))


def _skipped_rows(config: object, kind: str) -> int:
    """Rows of the position embedding that no token uses."""
    if kind in SKIP_TO_PAD:
        pad = getattr(config, "pad_token_id", None)
        return 1 + (1 if pad is None else int(pad))
    return 2 if kind in SKIP_TWO else 0
