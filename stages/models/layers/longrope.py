"""Rotary embeddings with two sets of frequencies (longrope, e.g. of Phi-3 with 128k positions), chosen by sequence instead of by batch.

A sequence longer than the original length of the model uses the long frequencies at all of its positions, others use the short ones.
transformers chooses once per pass, by the largest position in it. The outputs of a short sequence would then depend on whether a long
sequence is in the same pass. Here every sequence has the same outputs as in a pass with no other sequence.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

if TYPE_CHECKING:
    from transformers import PretrainedConfig

LONGROPE = "longrope"


def choose_frequencies_by_sequence(model: nn.Module) -> int:
    """Replace the rotary embeddings of ``model`` that have two sets of frequencies. Returns their number. Outputs of single rows stay."""
    pairs = [(parent, child) for parent in model.modules() for child in parent.children() if _has_two_sets(child)]
    for parent, child in pairs:
        kind = type(child)
        child.__class__ = type(kind.__name__, (_BySequence, kind), {"__module__": kind.__module__})
        parent.register_forward_pre_hook(_note_lengths, with_kwargs=True)
        parent.register_forward_hook(_forget_lengths, always_call=True)
    return len(pairs)


def positions_of_rows(backbone: nn.Module, input_ids: Tensor, lengths: Tensor | None) -> dict[str, Tensor]:
    """The argument ``position_ids`` for a pass over right-padded ids [B, T] without a mask, from the lengths [B] of the rows.

    Empty unless the backbone must know the lengths.
    """
    if lengths is None or not any(isinstance(module, _BySequence) for module in backbone.modules()):
        return {}
    columns = torch.arange(input_ids.shape[1], device=input_ids.device)
    return {"position_ids": torch.minimum(columns, lengths[:, None] - 1)}


def _has_two_sets(module: nn.Module) -> bool:
    kinds = getattr(module, "rope_type", None)
    return LONGROPE in (kinds.values() if isinstance(kinds, dict) else (kinds,)) and not isinstance(module, _BySequence)


def _note_lengths(parent: nn.Module, inputs: tuple[object, ...], named: dict[str, object]) -> None:
    """Before a pass of a transformer: note the lengths of its rows if it gets a mask [B, T]."""
    mask = named.get("attention_mask")
    for child in parent.children():
        if isinstance(child, _BySequence):
            child.lengths = mask.bool().sum(dim=1) if isinstance(mask, Tensor) and mask.dim() == 2 else None


def _forget_lengths(parent: nn.Module, inputs: tuple[object, ...], outputs: object) -> None:
    for child in parent.children():
        if isinstance(child, _BySequence):
            child.lengths = None


class _BySequence(nn.Module):
    """Mixin for a family's rotary embedding. ``lengths`` [B]: of the rows of the current pass; None: the position ids decide."""

    config: PretrainedConfig
    lengths: Tensor | None = None

    def forward(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> tuple[Tensor, Tensor]:
        """Cosines and sines [B, T, D] for position ids [B, T]."""
        own: dict[str, str] = {} if layer_type is None else {"layer_type": layer_type}
        kinds: object = getattr(self, "rope_type")  # noqa: B009  # of the family's class
        if (kinds if layer_type is None or not isinstance(kinds, dict) else kinds[layer_type]) != LONGROPE:
            both: tuple[Tensor, Tensor] = super().forward(x, position_ids, **own)
            return both
        prefix = "" if layer_type is None else f"{layer_type}_"
        settings = self.config.rope_parameters if layer_type is None else self.config.rope_parameters[layer_type]
        original: int = settings["original_max_position_embeddings"]
        plain = inspect.unwrap(super().forward)  # without the choice by the largest position
        frequencies = getattr(self, f"{prefix}inv_freq")
        embeddings = []
        for chosen in (getattr(self, f"{prefix}original_inv_freq"), self._long(x.device, original, layer_type, prefix)):
            frequencies.copy_(chosen)  # in place, because recorded decoding steps replay with this address
            embeddings.append(plain(self, x, position_ids, **own))
        is_long = _is_long(position_ids, self.lengths, original)[..., None]
        cosines, sines = (torch.where(is_long, long, short) for short, long in zip(*embeddings, strict=True))
        return cosines, sines

    def _long(self, device: torch.device, original: int, layer_type: str | None, prefix: str) -> Tensor:
        """The long frequencies. Kept, because a recording of a decoding step may not copy from the CPU."""
        known: Tensor | None = getattr(self, f"{prefix}long_inv_freq", None)
        if known is None or known.device != device:
            known, _ = ROPE_INIT_FUNCTIONS[LONGROPE](self.config, device, seq_len=original + 1, layer_type=layer_type)
            setattr(self, f"{prefix}long_inv_freq", known)
        return known


def _is_long(position_ids: Tensor, lengths: Tensor | None, original: int) -> Tensor:
    """Whether the sequence of each position is longer than ``original`` tokens: bool, [B, 1] from ``lengths`` [B], or else [B, T].

    A row of position ids [B, T] may have several sequences. Each begins where the position does not grow; so padding whose positions repeat
    the last one is not part of the sequence before it.
    """
    if lengths is not None:
        return (lengths > original)[:, None]
    begins = functional.pad(position_ids[:, 1:] <= position_ids[:, :-1], (1, 0))
    sequences = begins.long().cumsum(dim=1)
    largest = torch.zeros_like(position_ids).scatter_reduce(1, sequences, position_ids, "amax")
    return largest.gather(1, sequences) >= original
