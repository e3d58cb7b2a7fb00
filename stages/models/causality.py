"""Check that a model is causal: its prediction at a token must not depend on later tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from stages.errors import ModelError
from stages.models.parts import evaluation_mode
from stages.sampling.support import no_cache, says_causal, weight_of

if TYPE_CHECKING:
    from stages.model_types import TransformersModel

LENGTH = 6  # tokens of the test text


def require_causal(model: TransformersModel, name: str) -> None:
    """Raise ModelError if ``model``, called ``name``, is not causal.

    A class whose attention layers all declare themselves causal is trusted. Other models read two texts that differ in the last token: the
    logits (or the hidden states of a transformer without a head) before it must be equal.
    """
    if says_causal(model) or not _looks_ahead(model):
        return
    hint = "set is_decoder: true in its config.json if it was trained as a decoder" if hasattr(model.config, "is_decoder") else ""
    raise ModelError(
        f"{name!r} ({type(model).__name__}) is not a causal language model: its prediction at a token depends on later tokens. "
        f"Use a causal language model{f', or {hint}' if hint else ''}"
    )


@torch.no_grad()
def _looks_ahead(model: TransformersModel) -> bool:
    embedding = weight_of(model.get_input_embeddings())
    size, pad = embedding.shape[0], getattr(model.config, "pad_token_id", None)
    tokens = [token for token in range(min(size, LENGTH + 2)) if token != pad][: LENGTH + 1]
    text = torch.tensor([tokens[:LENGTH], [*tokens[: LENGTH - 1], tokens[-1]]], device=embedding.device)
    with evaluation_mode(model):
        outputs = model(input_ids=text, **no_cache(model))
    logits = getattr(outputs, "logits", None)
    seen = (outputs.last_hidden_state if logits is None else logits)[:, : LENGTH - 1].float()
    spread = (seen[0] - seen[0].mean(dim=-1, keepdim=True)).norm()
    # Both rows use the same kernels, so equal inputs differ at most by rounding.
    return float((seen[0] - seen[1]).norm()) > (1e-4 if model.dtype == torch.float32 else 0.05) * float(spread)
