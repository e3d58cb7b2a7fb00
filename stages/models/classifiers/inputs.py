"""Inputs of sequence classifiers: the tensors that a family reads, and the side on which its rows can be padded.

B rows, T tokens, C classes. A row is a dict of lists by the name of the model's argument: ``input_ids``, and ``token_type_ids`` if the
tokenizer makes them. Most families give the same outputs for rows that are padded on the right. XLNet reads its class from the last column,
so its rows are padded on the left. MobileBERT, ConvBERT, FNet and others mix padding into the texts: there only rows of one length share a
pass.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from stages.models.parts import evaluation_mode
from stages.sampling.support import PASS_FAILURES, plain_model
from stages.tokens.positions import readable_length

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from stages.model_types import TransformersModel

Row = dict[str, list[int]]
Padding = Literal["right", "left", "none"]
TEXTS = ("a", "was it good?", "a good film with a good end")
"""The texts of the measurement: in a short one every token is next to the padding, and some families mix only neighbours."""
COLUMNS = 3  # of padding in the measurement
SAME = {torch.float32: 1e-4}
"""Allowed difference between a padded and an unpadded row, relative to the largest logit; 0.05 in half precision."""


def arguments_of(model: TransformersModel) -> frozenset[str]:
    """The names of the arguments of the model's forward pass."""
    return frozenset(inspect.signature(plain_model(model).forward).parameters)


def row_of(encoded: Mapping[str, Sequence[int]], arguments: frozenset[str]) -> Row:
    """A tokenized text as a row: what the model reads, without the attention mask."""
    return {name: list(values) for name, values in encoded.items() if name != "attention_mask" and name in arguments}


def ended(row: Sequence[int], config: PretrainedConfig) -> list[int]:
    """The token ids ``row``. For a classifier that reads the end token (BART, T5) the last one becomes an end token if there is none."""
    end = getattr(config, "eos_token_id", None) if getattr(config, "is_encoder_decoder", False) else None
    return [*row] if not isinstance(end, int) or end in row else [*row[:-1], end]


def padded_rows(rows: Sequence[Row], pad_token_id: int, padding: Padding = "right") -> dict[str, Tensor]:
    """The rows as tensors [B, T], with ``attention_mask``. Padded ``token_type_ids`` are 0."""
    lengths = [len(row["input_ids"]) for row in rows]
    width = max(lengths)

    def padded(values: list[int], value: int) -> list[int]:
        fill = [value] * (width - len(values))
        return [*fill, *values] if padding == "left" else [*values, *fill]

    batch = {name: torch.tensor([padded(row[name], pad_token_id if name == "input_ids" else 0) for row in rows]) for name in rows[0]}
    batch["attention_mask"] = torch.tensor([padded([1] * length, 0) for length in lengths])
    return batch


def padding_of(model: TransformersModel, tokenizer: PreTrainedTokenizerBase) -> Padding:
    """Measure on which side rows can be padded without a change of the logits: five passes over short texts.

    ``none``: on neither side. ``right`` also if the model cannot compute the passes.
    """
    limit, pad = readable_length(model.config, tokenizer), tokenizer.pad_token_id
    cut = {} if limit is None else {"truncation": True, "max_length": limit - COLUMNS}
    rows = [row_of(tokenizer(text, verbose=False, **cut), arguments_of(model)) for text in TEXTS]
    if pad is None or any(not row.get("input_ids") or row["input_ids"][-1] == pad for row in rows):
        return "right"
    longest: Row = {name: [*[values[0]] * COLUMNS, *values] for name, values in rows[-1].items()}
    sides: tuple[Padding, Padding] = ("right", "left")
    try:
        with torch.random.fork_rng(devices=[]):
            alone = torch.cat([_logits(model, [row], pad, "right") for row in rows])
            allowed = SAME.get(alone.dtype, 0.05) * float(alone.abs().max())
            padded = {side: _logits(model, [*rows, longest], pad, side)[:-1] for side in sides}
    except PASS_FAILURES:
        return "right"
    return next((side for side in sides if float((padded[side] - alone).abs().max()) <= allowed), "none")


@torch.no_grad()
def _logits(model: TransformersModel, rows: Sequence[Row], pad: int, padding: Padding) -> Tensor:
    """Logits [B, C] in evaluation mode, in the dtype of the model."""
    with evaluation_mode(model):
        batch = {name: value.to(model.device) for name, value in padded_rows(rows, pad, padding).items()}
        logits: Tensor = model(**batch).logits
    return logits


def allow_end_tokens(model: PreTrainedModel) -> None:
    """Let an encoder-decoder classifier (BART, T5) read rows with different numbers of end tokens. The name of its class stays the same.

    It reads its class at the last end token, and transformers refuses such rows, because it selects all end tokens first. Here the head
    sees only the last one of each row; the transformer gets the ids of the texts.
    """
    kind, end = type(model), model.config.eos_token_id
    if not model.config.is_encoder_decoder or not isinstance(end, int):
        return

    @wraps(kind.forward)
    def forward(self: PreTrainedModel, input_ids: Tensor, **named: object) -> object:
        def with_ids_of_the_texts(_: nn.Module, inputs: object, others: dict[str, object]) -> tuple[tuple[()], dict[str, object]]:
            return (), {**others, "input_ids": input_ids}

        ends = input_ids == end
        earlier = ends & (ends.flip(1).cumsum(1).flip(1) > 1)
        shift = getattr(self, "_shift_right", None)  # T5 makes the ids of the decoder outside its transformer
        if shift is not None:
            named = {"decoder_input_ids": shift(input_ids), **named}
        hook = self.base_model.register_forward_pre_hook(with_ids_of_the_texts, with_kwargs=True)
        try:
            return kind.forward(self, input_ids.masked_fill(earlier, int(end == 0)), **named)
        finally:
            hook.remove()

    model.__class__ = type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})


def same_length_groups(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Indices in groups of at most ``most`` with one length each, from short to long."""
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: lengths[index]):
        if not groups or len(groups[-1]) == most or lengths[groups[-1][0]] != lengths[index]:
            groups.append([])
        groups[-1].append(index)
    return groups
