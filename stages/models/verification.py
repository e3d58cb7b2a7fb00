"""Check saved files before publishing: the saved model must compute the same outputs as the model in memory.

An adapter is always loaded again on the base in memory. Models with up to ``CHECKED_WEIGHTS`` parameters are also loaded completely, as the
next step would load them (adapters merged). For larger full weights only the number of values and the tying of weights are checked.
Sharded models are not checked by computation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from stages.config import CHECKED_WEIGHTS, ModelInput
from stages.errors import ModelError
from stages.models.adapters.activation import activate, active_adapters, remove_adapter
from stages.models.adapters.attaching import add_adapter, source_of
from stages.models.adapters.saved import base_of
from stages.models.classifiers.inputs import ended
from stages.models.parts import evaluation_mode
from stages.registry.references import ResolvedModel
from stages.sampling.support import has_int8_layers, no_cache, plain_model, weight_of
from stages.tokens.positions import readable_length

if TYPE_CHECKING:
    from peft import PeftModel

    from stages.model_types import TransformersModel

NUM_ROWS, NUM_TOKENS = 4, 64
"""Maximum number and length of the rows used in the check."""
SAME = {torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 1e-2}
"""Allowed root mean square difference, relative to the outputs', after reading the same weights again; by compute dtype."""
ROUNDED = {torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.05}
"""The same between an unmerged model and its merge in fp32."""
ROUNDED_INT8 = 0.25
"""The same for int8 layers, which also round activations."""


def rows_for(model: TransformersModel, rows: Sequence[Sequence[int]] | None) -> list[list[int]]:
    """The token ids to compute with: the first of ``rows``, or ids spread over the vocabulary if there are none."""
    config = plain_model(model).config
    longest = min(NUM_TOKENS, readable_length(config) or NUM_TOKENS)
    chosen = [ended(row[:longest], config) for row in rows or () if len(row) > 1][:NUM_ROWS]
    if chosen:
        return chosen
    plain = plain_model(model)
    # Some output layers have fewer rows: an embedding may have special tokens that are read, but never predicted.
    matrices = (plain.get_input_embeddings(), plain.get_output_embeddings())
    size = min(weight_of(base_of(matrix)).shape[0] for matrix in matrices if matrix is not None)
    return [ended(torch.linspace(1, size - 1, min(8, longest)).long().tolist(), config)]


@torch.no_grad()
def outputs_of(model: TransformersModel, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """A transformers model's outputs for each row, one row per pass: token log-probabilities [T - 1], or classifier logits [labels].

    They are computed in the dtype of the weights, also if a Trainer in half precision has trained the model.
    """
    device = next(model.parameters()).device
    outputs = []
    with evaluation_mode(model), _without_trainer_autocast(model):
        for row in rows:
            ids = torch.tensor([row], device=device)
            logits = model(input_ids=ids, **no_cache(model)).logits.float().cpu()
            if logits.dim() == 3 and logits.shape[1] == len(row):
                logits = logits[0, :-1].log_softmax(dim=-1).gather(1, ids[0, 1:, None].cpu())
            outputs.append(logits.flatten())
    return outputs


@contextmanager
def _without_trainer_autocast(model: nn.Module) -> Iterator[None]:
    """Context without the autocast that accelerate puts around ``forward`` of a model in a Trainer, and leaves there after the training.

    The model that is loaded again has no such autocast, so the rounding of half precision would look like a difference of the weights.
    """
    attributes = vars(model)
    plain = attributes.get("_original_forward")  # set by accelerate
    if plain is None:
        yield
        return
    wrapped, model.forward = attributes["forward"], plain
    try:
        yield
    finally:
        model.forward = wrapped


# Adapters


def check_saved_adapter(
    model: PeftModel,
    folder: Path,
    compute: Callable[[], list[Tensor]],
    reload: Callable[[ResolvedModel], list[Tensor]],
    *,
    scale: float = 0.0,
) -> None:
    """Raise ModelError unless the adapter in ``folder`` computes the same as the highest active adapter of the PeftModel ``model``.

    ``compute`` returns the outputs of the model in memory, ``reload`` those of the saved model, loaded and merged. ``scale``: minimum
    output scale for the relative comparison. Random number generators are restored.
    """
    with torch.random.fork_rng():
        _check_adapter(model, folder, compute, reload, scale)


def _check_adapter(
    model: PeftModel, folder: Path, compute: Callable[[], list[Tensor]], reload: Callable[[ResolvedModel], list[Tensor]], scale: float
) -> None:
    expected, acting = compute(), active_adapters(model)
    name, dtype = "published", _dtype_of(model)
    saved = ResolvedModel(folder.name, "folder", str(folder), "", _as_input(model, folder), base=source_of(model, acting[-1]))
    trainable = {parameter for parameter in model.parameters() if parameter.requires_grad}
    activate(model, acting[:-1])
    try:
        add_adapter(model, saved, name)
        outputs = compute()
    finally:
        if name in model.peft_config:
            remove_adapter(model, name)
        activate(model, acting)
        for parameter in model.parameters():
            parameter.requires_grad_(parameter in trainable)
    _compare(outputs, expected, SAME[dtype], scale, "read again and put on its base")
    if saved.base is None or _size_of(model) > CHECKED_WEIGHTS:
        return
    tolerance = max(ROUNDED[dtype], ROUNDED_INT8 if has_int8_layers(model) else 0.0)
    _compare(reload(saved), expected, tolerance, scale, "merged into its base")


# Full weights


def check_saved_weights(
    model: nn.Module,
    folder: Path,
    compute: Callable[[], list[Tensor]],
    reload: Callable[[ResolvedModel], list[Tensor]],
    *,
    scale: float = 0.0,
) -> None:
    """Raise ModelError unless the full weights in ``folder`` equal those of ``model``. Arguments as in ``check_saved_adapter``."""
    _check_sharing(model)
    _check_value_count(model, folder)
    if _size_of(model) > CHECKED_WEIGHTS:
        return
    saved = ResolvedModel(folder.name, "folder", str(folder), "", _as_input(model, folder))
    dtype = next(parameter.dtype for parameter in model.parameters())
    with torch.random.fork_rng():
        _compare(reload(saved), compute(), SAME.get(dtype, SAME[torch.bfloat16]), scale, "loaded again")


def _as_input(model: nn.Module, folder: Path) -> ModelInput:
    """The saved model as an input. Remote code is allowed if this process already runs it, because the recipe then trusts it."""
    return ModelInput(ref=folder.name, trust_remote_code=type(plain_model(model)).__module__.startswith("transformers_modules"))


def _check_value_count(model: nn.Module, folder: Path) -> None:
    """Raise ModelError if the files in ``folder`` contain fewer values than ``model`` has weights (tied weights count once)."""
    stored = 0
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(str(file), framework="pt") as content:
            stored += sum(math.prod(content.get_slice(name).get_shape()) for name in content.keys())  # noqa: SIM118
    needed = _size_of(model)
    if stored < needed:
        raise _refusal(f"its files contain {stored} values, but the model in memory has {needed} weights")


def _check_sharing(model: nn.Module) -> None:
    """Raise ModelError if the config says that embedding and output layer are tied, but they differ."""
    output = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    if not isinstance(model, PreTrainedModel) or output is None or not getattr(model.config, "tie_word_embeddings", False):
        return
    embedding = model.get_input_embeddings()
    one, other = weight_of(output), weight_of(embedding)
    if one.shape == other.shape and not torch.equal(one, other):
        raise _refusal("its config says that embedding and output layer are tied (tie_word_embeddings), but they differ")


def _size_of(model: nn.Module) -> int:
    """Number of weights of ``model``; tied weights count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def _dtype_of(model: TransformersModel) -> torch.dtype:
    """The compute dtype of a model: that of its embedding."""
    dtype = weight_of(base_of(plain_model(model).get_input_embeddings())).dtype
    return dtype if dtype in SAME else torch.float32


def _compare(outputs: list[Tensor], expected: list[Tensor], tolerance: float, scale: float, what: str) -> None:
    mine, theirs = torch.cat(outputs).double(), torch.cat(expected).double()
    if mine.shape != theirs.shape:
        raise _refusal(f"{what}, it gives {len(mine)} outputs, but the model in memory gives {len(theirs)}")
    difference = float((mine - theirs).pow(2).mean().sqrt())
    size = max(float(theirs.pow(2).mean().sqrt()), scale, 1e-6)
    if not difference <= tolerance * size:
        raise _refusal(f"{what}, its outputs differ by {difference:.3g} (root mean square; output scale {size:.3g})")


def _refusal(problem: str) -> ModelError:
    return ModelError(
        f"the saved model is not the model in memory: {problem}. Nothing was published, and the checkpoints are kept. Please report this "
        "with the model's family, the step's lora settings and its quantization"
    )
