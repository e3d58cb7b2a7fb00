"""How many tokens a model can read: the smaller limit of its position embeddings and of its tokenizer."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

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
"""What families call their number of positions. The first that a config has counts."""

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
"""Model types that number their tokens from ``pad_token_id + 1``: the rows before that one hold no token."""

SKIP_TWO = frozenset({"mpnet"})
"""Model types that number their tokens from 2, whatever the pad token is."""

WITHOUT_LIMIT = frozenset({"bloom", "falcon_mamba", "funnel", "mamba", "mamba2", "mt5", "recurrent_gemma", "t5", "umt5", "xlnet", "xlstm"})
"""Model types that read texts of any length: ALiBi, relative distances alone, or a state."""

TOKENIZER_SENTINEL = 10**9
"""A tokenizer that was given no ``model_max_length`` says 1e30; nothing above this number is a limit."""


def readable_length(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase | None = None) -> int | None:
    """The longest sequence, in tokens with the special ones, that a model of ``config`` and ``tokenizer`` can both read.

    None where neither of them sets a limit, for instance a Mamba or an ALiBi model whose tokenizer does not say. For rotary embeddings the
    limit is the length that the config names, although such a model would compute beyond it. For learned embeddings it is the number of
    rows that a token can have, which is less than the number of rows in the RoBERTa family.
    """
    limits = [limit for limit in (model_length(config), tokenizer_length(tokenizer)) if limit is not None]
    return min(limits, default=None)


def row_length(asked: int | None, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase | None, *, unlimited: int) -> int:
    """The longest row that a step reads: ``asked`` by its recipe (max_length), but never more than model and tokenizer can read.

    Where the recipe asks for nothing it is what they can read, or ``unlimited`` where they set no limit. Logs a warning where ``asked`` is
    lowered.
    """
    readable = readable_length(config, tokenizer)
    if asked is None or readable is None:
        return asked or readable or unlimited
    if asked > readable:
        logger.warning("max_length=%d: model and tokenizer read at most %d tokens, so rows are held to that", asked, readable)
    return min(asked, readable)


def model_length(config: PretrainedConfig | SimpleNamespace) -> int | None:
    """The longest sequence that the model's positions allow; None for no limit. A config of several modalities is read for its text."""
    text = _text_config(config)
    kind = getattr(text, "model_type", "")
    if kind in WITHOUT_LIMIT or (kind == "falcon" and getattr(text, "alibi", False)):
        return None
    named = next((value for value in (_number(text, name) for name in NAMES) if value is not None), None)
    if named is None:
        return None
    return max(1, _extended(text, named) - _skipped_rows(text, kind))


def tokenizer_length(tokenizer: PreTrainedTokenizerBase | None) -> int | None:
    """The tokenizer's ``model_max_length``; None where it was given none."""
    limit = getattr(tokenizer, "model_max_length", None)
    return int(limit) if limit is not None and 0 < limit < TOKENIZER_SENTINEL else None


def _text_config(config: Any) -> Any:
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _number(config: Any, name: str) -> int | None:
    """A positive number of the config; XLNet's -1 and a missing field are None."""
    value = getattr(config, name, None)
    return value if isinstance(value, int) and value > 0 else None


def _extended(config: Any, positions: int) -> int:
    """Positions with YaRN: configs of Qwen2.5 keep ``max_position_embeddings`` and add a factor on the original length."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if not isinstance(rope, dict):
        return positions
    factor, original = rope.get("factor"), rope.get("original_max_position_embeddings")
    if rope.get("rope_type", rope.get("type")) != "yarn" or not factor or not original:
        return positions
    return max(positions, int(factor * original))


def _skipped_rows(config: Any, kind: str) -> int:
    """Rows of the position embedding that no token can have."""
    if kind in SKIP_TO_PAD:
        pad = getattr(config, "pad_token_id", None)
        return 1 + (1 if pad is None else int(pad))
    return 2 if kind in SKIP_TWO else 0
